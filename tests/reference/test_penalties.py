"""Penalties of an adapter: each against its formula with dense products, in both engines, and beside DP-SGD, where it
reads nothing but what has been released.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.adapters.penalties.base import OverScores
from fedpeft.clients.cohort.engine import Job, train_cohort
from fedpeft.clients.train import train
from fedpeft.errors import InputError
from fedpeft.privacy.plan import Plan
from support import own_adapters
from support.cohort_jobs import ADAMW, SGD, UNEVEN, check, private, records

# Every penalty on adapters that have what it is over, with weights that are felt.
CASES = [
    ("sorsa", "lora", {"gamma": 2.0}),
    ("sorsa", "sorsa", {"gamma": 2.0}),
    ("kasa", "sorsa", {"beta": 0.5, "gamma": 0.5}),
    ("pego", "lora", {"lambda": 0.5}),
    ("pego", "soma", {"lambda": 0.5, "groups": 4}),
]
ONE_STEP = replace(SGD, local_steps=1)


@pytest.fixture
def make(tmp_path):
    def made(penalty, adapter, options, kind="bert"):
        section = {} if penalty is None else {"penalty": penalty, "penalty_options": options}
        return own_adapters.in_double(tmp_path, kind, adapter, **section)

    return made


def start_of(model, adapter, seed=1):
    roles = own_adapters.roles_of(adapter) if adapter in own_adapters.OWN else ("A", "B", "head")
    draw, state = torch.Generator().manual_seed(seed), model.state()
    moved = {
        key: value + 0.2 * torch.randn(value.shape, generator=draw, dtype=value.dtype)
        for key, value in state.select(roles).tensors.items()
    }
    return [role for role in roles if state.select([role]).tensors], moved


def by_hand(model, penalty, options, values):
    """R, with every product made."""

    def distance(gram):
        off = gram - torch.eye(len(gram), dtype=gram.dtype)
        return (off.square().sum() + 1e-6).sqrt() - 1e-3

    each = []
    for site in model.form.lora_sites():
        A, B = values[f"{site}/A"], values[f"{site}/B"]
        W = model.base.values(site)
        if penalty == "pego":
            n = options.get("groups", 2)
            parts = [b @ a for a, b in zip(A.chunk(n), B.chunk(n, dim=1), strict=True)]
            kept = sum((W @ part.T).square().sum() for part in parts)
            apart = sum((parts[i] @ parts[j].T).square().sum() for i in range(n) for j in range(i + 1, n))
            each.append(options["lambda"] * (kept + apart))
            continue
        off = distance(A @ A.T) + distance(B.T @ B)
        if penalty == "sorsa":
            each.append(options["gamma"] * off / 2)
        else:
            each.append(options["beta"] * values[f"{site}/d"].square().sum() + options["gamma"] * off)
    return torch.stack(each).mean()


def test_every_penalty_is_tried():
    over_scores = {
        name for name in registry.names("penalties") if issubclass(registry.load("penalties", name), OverScores)
    }
    assert {penalty for penalty, *_ in CASES} | over_scores == set(registry.names("penalties"))


@pytest.mark.parametrize(("penalty", "adapter", "options"), CASES)
def test_value_and_slope_are_those_of_the_formula(penalty, adapter, options, make):
    model = make(penalty, adapter, options)
    _, moved = start_of(model, adapter)
    leaves = {key: value.requires_grad_() for key, value in moved.items()}
    wanted = by_hand(model, penalty, options, leaves)
    torch.testing.assert_close(model.penalty.total(moved), wanted, rtol=1e-10, atol=1e-12)
    got = model.penalty.gradients(moved, model.parameters)
    read = [key for key in moved if model.form.role(key) in model.penalty.penalty.roles]
    slopes = dict(zip(read, torch.autograd.grad(wanted, [leaves[key] for key in read]), strict=True))
    assert got.keys() == slopes.keys() and all(bool(value.any()) for value in got.values())
    for key, value in got.items():
        torch.testing.assert_close(value, slopes[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("penalty", "adapter", "options"), CASES)
def test_an_untrained_adapter_is_pulled_as_in_a_cohort_and_as_much_in_float32(penalty, adapter, options, make):
    model = make(penalty, adapter, options)
    state = {key: value for key, value in model.state().tensors.items() if key in model.parameters}
    alone = model.penalty.gradients(state, {})
    many = model.penalty.gradients({key: torch.stack([value, value]) for key, value in state.items()}, {})
    narrow = model.penalty.gradients({key: value.float() for key, value in state.items()}, {})
    for key, value in alone.items():
        torch.testing.assert_close(many[key], torch.stack([value, value]), rtol=1e-9, atol=1e-12)
        # Where factors begin orthonormal their distance is rounding, which must not say where they are pulled.
        torch.testing.assert_close(narrow[key].double(), value, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(("penalty", "adapter", "options"), CASES)
@pytest.mark.parametrize("config", [replace(SGD, local_steps=2), ADAMW], ids=["sgd", "adamw"])
def test_a_cohort_is_one_after_another(penalty, adapter, options, config, make):
    model = make(penalty, adapter, options)
    trains = start_of(model, adapter)[0]
    jobs = [
        Job(start_of(model, adapter, 10 + k)[1], records("bert", size, k), seed=100 + k)
        for k, size in enumerate(UNEVEN)
    ]
    check(model, jobs, trains, replace(config, lr=0.02), limit=1e-10)
    jobs = [replace(job, private=private(1.5, 0.5, k)) for k, job in enumerate(jobs)]
    check(model, jobs, trains, replace(config, lr=0.02), limit=1e-10)


def ends(model, adapter, jobs, config, engine):
    """What each client has after its round."""
    trains = start_of(model, adapter)[0]
    jobs = [replace(job, private=copy.deepcopy(job.private)) for job in jobs]
    if engine == "cohort":
        return [done.after for done in train_cohort(model, jobs, trains, config)]
    found = []
    for job in jobs:
        model.write(model.state().replace(job.start))
        train(model, job.data, trains, config, job.seed, **job.settings)
        found.append({key: model.parameters[key].detach().clone() for key in job.start})
    return found


@pytest.mark.parametrize("engine", ["alone", "cohort"])
@pytest.mark.parametrize(("penalty", "adapter", "options"), CASES)
def test_under_dp_the_pull_is_added_after_the_noise_and_is_neither_clipped_nor_noised(
    penalty, adapter, options, engine, make
):
    model, plain = make(penalty, adapter, options), make(None, adapter, {})
    starts = [start_of(model, adapter, 10 + k)[1] for k in range(2)]
    # A clip that no record is under: what is part of a record's loss would hardly be felt.
    jobs = [
        Job(start, records("bert", 6, k), seed=100 + k, private=private(1.5, 0.5, k, clip=1e-3))
        for k, start in enumerate(starts)
    ]
    pulled, free = (ends(one, adapter, jobs, ONE_STEP, engine) for one in (model, plain))
    for start, with_penalty, without in zip(starts, pulled, free, strict=True):
        pull = model.penalty.gradients(start, model.parameters)
        for key, value in without.items():
            wanted = value - ONE_STEP.lr * pull[key] if key in pull else value
            torch.testing.assert_close(with_penalty[key], wanted, rtol=1e-9, atol=1e-12)
        assert max(float(value.abs().max()) for value in pull.values()) > 1e-2


@pytest.mark.parametrize("engine", ["alone", "cohort"])
@pytest.mark.parametrize(("penalty", "adapter", "options"), CASES)
def test_under_dp_all_that_a_penalty_reads_of_records_has_been_released(
    penalty, adapter, options, engine, make, monkeypatch
):
    """The same releases from other records leave the same adapter: what a step is beside them is a function of them."""
    model = make(penalty, adapter, options)
    start = start_of(model, adapter)[1]

    def released(self, total, source):
        return torch.from_numpy(source.normal(total.numel())).to(total).view_as(total)

    monkeypatch.setattr(Plan, "noised_mean", released)
    config = replace(SGD, local_steps=3, lr=0.05)
    found = [
        ends(
            model,
            adapter,
            [Job(start, records("bert", 6, k), seed=1, private=private(1.0, 1.0, 7)) for k in pair],
            config,
            engine,
        )
        for pair in ((1, 2), (3, 4))
    ]
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert not all(torch.equal(value, start[key]) for key, value in found[0][0].items())


def test_a_run_goes_on_bit_for_bit_and_its_adapter_is_another_one(ends_alike, tiny, tmp_path):
    pulled = {"adapter": {"name": "sorsa", "penalty": "sorsa", "penalty_options": {"gamma": 5.0}}, "run.rounds": 2}
    ends_alike(pulled)
    tiny("free", {"adapter": "sorsa", "run.rounds": 2})
    folders = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "free")]
    assert folders[0] != folders[1]


def test_sorsas_penalty_draws_factors_back_to_orthonormal(make):
    model = make("sorsa", "sorsa", {"gamma": 1.0})
    trains, start = start_of(model, "sorsa")
    before = float(model.penalty.total(start))
    [after] = ends(model, "sorsa", [Job(start, records("bert", 6, 0), seed=1)], replace(SGD, local_steps=60), "alone")
    [free] = ends(
        make(None, "sorsa", {}),
        "sorsa",
        [Job(start, records("bert", 6, 0), seed=1)],
        replace(SGD, local_steps=60),
        "alone",
    )
    assert float(model.penalty.total(after)) < 0.3 * before < 0.6 * float(model.penalty.total(free))
    assert trains


def test_a_factor_that_does_not_train_is_read_and_stays(make):
    model = make("sorsa", "lora", {"gamma": 2.0})
    start = start_of(model, "lora")[1]
    mine = {key: value for key, value in start.items() if model.form.role(key) == "B"}
    pull = model.penalty.gradients(mine, start)
    assert pull.keys() == mine.keys()
    whole = model.penalty.gradients(start, {})
    assert all(torch.equal(value, whole[key]) for key, value in pull.items())


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"name": "ia3", "penalty": "pego"}, r"adapter\.penalty=pego: it is over A, B, of which strategy fedit over"),
        ({"penalty": "sorsaa"}, r"adapter\.penalty: 'sorsaa' is not known\. Did you mean 'sorsa'"),
        ({"penalty": "pego", "penalty_options": {"group": 2}}, r"adapter\.penalty_options\.group"),
        ({"penalty": "sorsa", "penalty_options": {"gamma": 0}}, r"adapter\.penalty_options\.gamma"),
        (
            {"penalty_options": {"gamma": 1}},
            r"adapter\.penalty_options: options gamma, but adapter\.penalty=null has none",
        ),
        ({"penalty": "sorsa", "client_ranks": [2, 4]}, r"adapter\.client_ranks"),
    ],
)
def test_what_cannot_be_penalised_is_refused_before_anything_is_loaded(adapter, message):
    with pytest.raises(InputError, match=message):
        configs.load({"adapter": adapter, "strategy": {"name": "hetlora" if "client_ranks" in adapter else "fedit"}})


@pytest.mark.parametrize(
    ("penalty", "adapter", "options", "message"),
    [
        ("kasa", "lora", {}, r"adapter\.penalty=kasa: it is over A and B and d of every layer"),
        (
            "sorsa",
            "bd_lora",
            {},
            r"adapter\.penalty=sorsa: it is over A and B of every layer, with A and B as matrices",
        ),
        ("pego", "lora", {"groups": 3}, r"adapter\.penalty_options\.groups=3 does not divide the rank 4"),
    ],
)
def test_an_adapter_without_what_it_is_over_is_refused(penalty, adapter, options, message, make):
    with pytest.raises(InputError, match=message):
        make(penalty, adapter, options)
