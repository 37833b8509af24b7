"""The jobs of other projects are configs: valid with the real names, and run on their stand-ins."""

from __future__ import annotations

import pytest

from fedpeft import config as configs
from fedpeft import simulate
from fedpeft.simulations import stand_ins

NAMES = [name.removeprefix("jobs/") for name in configs.job_configs()]
SAMPLE = {"flowertune_nlp", "flowertune_dora", "openfedllm_dpo", "fedllm_wildchat"}
every = [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.full) for name in NAMES]


def test_there_are_twelve_and_each_has_a_stand_in():
    assert len(NAMES) == 12 and set(NAMES) == set(stand_ins.JOBS)


@pytest.mark.parametrize("name", NAMES)
def test_a_job_is_valid_with_its_real_names(name):
    config = configs.load(f"jobs/{name}")
    assert "/" in config.model.name and "/" in config.data.source, "real names, which are not looked up to validate"
    assert config.client.schedule == "cosine" and config.run.rounds in (50, 100, 200)


def test_the_four_of_flowertune_have_its_numbers():
    asked = {"nlp": (20, 2), "finance": (50, 5), "medical": (20, 2), "code": (10, 2)}
    for name, (clients, a_round) in asked.items():
        config = configs.load(f"jobs/flowertune_{name}")
        assert (config.data.clients, config.run.clients_per_round) == (clients, a_round)
        assert (config.adapter.r, config.adapter.alpha, config.adapter.dropout) == (32, 64, 0.075)
        assert (config.client.lr, config.client.min_lr, config.client.local_steps) == (5e-5, 1e-6, 10)
        assert config.model.quantization == "nf4" and config.run.max_traffic_mb == 200_000


@pytest.mark.parametrize("name", every)
def test_a_job_runs_on_its_stand_in(name, tmp_path):
    summary = simulate(f"jobs/{name}", stand_ins.overrides(name, tmp_path), out=tmp_path / "run")
    assert summary["rounds"] == 2 and (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert summary["texts"]["template"] == configs.load(f"jobs/{name}").data.template
    form = {"wildchat": "sharegpt", "dpo": "preference", "pa": "preference"}.get(name.rpartition("_")[2], "alpaca")
    assert summary["texts"]["form"] == form
