"""Training on a GPU: `make gpu` on a machine that has one. FEDPEFT_DEVICE=cpu runs the same without, to test the tests.

A GPU adds in another order, so nothing is compared bit for bit with the CPU, and float64 stands in for patience.
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace

import pytest
import torch

from fedpeft.clients.cohort.engine import train_cohort
from fedpeft.clients.train import evaluate
from fedpeft.simulations.run import simulate
from support import small_models as small
from support.cohort_jobs import ADAMW, EPOCHS, EVEN, SGD, UNEVEN, WIDE, make_jobs, one_by_one, private

pytestmark = pytest.mark.gpu
DEVICE = torch.device(os.environ.get("FEDPEFT_DEVICE", "cuda"))
KINDS = ["bert", "roberta", "vit", "llama"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`models(kind, device)`: a small model in float64 without dropout."""
    root = tmp_path_factory.mktemp("models")
    made = {}

    def get(kind, device):
        if not (root / kind).exists():
            small.save(kind, root / kind)
        if (kind, device) not in made:
            model = small.adapted(root / kind, kind, r=4).to(device)
            for module in model.base.modules:
                module.double()
            model.training_mode = lambda: None
            made[kind, device] = model
        return made[kind, device]

    return get


def trains(kind):
    return ["A", "B", "head"] if small.HEADS[kind] else ["A", "B"]


def apart(some, others):
    return max(
        float((one[key] - other[key]).abs().max()) for one, other in zip(some, others, strict=True) for key in other
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [SGD, ADAMW, EPOCHS], ids=["sgd", "adamw", "epochs"])
@pytest.mark.parametrize("sizes", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_cohort_is_what_the_cpu_computes(models, kind, config, sizes):
    """As a cohort and one after another on the device, against one after another on the CPU."""
    here, cpu = models(kind, DEVICE), models(kind, torch.device("cpu"))
    wanted = [after for after, *_ in one_by_one(cpu, make_jobs(cpu, sizes, kind), trains(kind), config)]
    alone = [after for after, *_ in one_by_one(here, make_jobs(cpu, sizes, kind), trains(kind), config)]
    for tokens in (40, WIDE):
        done = train_cohort(here, make_jobs(cpu, sizes, kind), trains(kind), config, tokens)
        assert all(value.device.type == "cpu" for one in done for value in one.after.values())
        assert apart([one.after for one in done], wanted) < 1e-10
    assert apart(alone, wanted) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigma", [0.0, 1.5])
def test_private_cohort_is_what_the_cpu_computes(models, kind, sigma):
    """Ragged and empty Poisson batches, noise of the same source."""
    here, cpu = models(kind, DEVICE), models(kind, torch.device("cpu"))
    jobs = [
        replace(job, private=private(sigma, rate, k))
        for k, (job, rate) in enumerate(zip(make_jobs(cpu, EVEN, kind), (0.0, 0.1, 0.5, 1.0), strict=True))
    ]
    twin = [replace(job, private=copy.deepcopy(job.private)) for job in jobs]
    wanted = [after for after, *_ in one_by_one(cpu, twin, trains(kind), ADAMW)]
    done = train_cohort(here, jobs, trains(kind), ADAMW, WIDE)
    assert apart([one.after for one in done], wanted) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_what_the_cpu_computes(models, kind):
    here, cpu = models(kind, DEVICE), models(kind, torch.device("cpu"))
    data = make_jobs(cpu, (20,), kind)[0].data
    state = small.randomised(cpu, scale=0.3)
    here.write(state)
    cpu.write(state)
    one, two = evaluate(here, data), evaluate(cpu, data)
    assert one["accuracy"] == two["accuracy"] and abs(one["loss"] - two["loss"]) < 1e-10


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": "fedsvd"},
        {"adapter": "lora_sb", "strategy": "fed_sb"},
        {"strategy": "fedex"},
        {"privacy.unit": "sample", "privacy.noise_multiplier": 1.0, "strategy.weighting": "uniform", "data.limit": 400},
        {"tta.method": "tent", "data.holdout": 0.2},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "fedit",
)
def test_a_simulation_runs(tmp_path, options):
    """From the start to the report, and close to the same run on the CPU."""
    config = {
        "data.limit": 120,
        "data.clients": 4,
        "data.partition": "iid",
        "client.local_steps": 2,
        "client.local_epochs": None,
        "client.batch_size": 8,
        "run.rounds": 2,
        "run.baselines": False,
    }
    one = simulate({}, {**config, **options, "run.device": DEVICE.type}, tmp_path / "one")
    two = simulate({}, {**config, **options, "run.device": "cpu"}, tmp_path / "two")
    assert one["rounds"] == two["rounds"] == 2
    assert abs(one["final"]["loss"] - two["final"]["loss"]) < 1e-2
