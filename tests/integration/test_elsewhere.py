"""Whole runs with `run.device` another than the CPU (`elsewhere.py` stands for a GPU): the same bytes in the end."""

from __future__ import annotations

import pytest

from support.elsewhere import elsewhere
from support.sample import few

UNIFORM = {"privacy.noise_multiplier": 1.0, "strategy.weighting": "uniform"}
PRIVATE = {"privacy.unit": "sample", "data.limit": 200, **UNIFORM}
TASKS = {"continual.tasks": 2, "run.rounds": 2, "client.lr": 0.05}
CASES = {
    "fedit": {},
    "fedsvd": {"strategy": "fedsvd"},
    "lora_fair": {"strategy": "lora_fair"},
    "fedex": {"strategy": "fedex"},
    "fedsa": {"strategy": "fedsa", "data.holdout": 0.2},
    "fed_sb": {"strategy": "fed_sb", "adapter": "lora_sb"},
    "ranks": {"strategy": "hetlora", "adapter.client_ranks": [2, 4]},
    "scaffold": {"strategy": "scaffold", "client.optimizer": "sgd"},
    "fedprox": {"strategy": "fedprox"},
    "one by one": {"run.cohort_tokens": 0},
    "dropout": {"adapter.dropout": 0.2},
    "private": PRIVATE,
    "private one by one": {**PRIVATE, "run.cohort_tokens": 0},
    "client": {"privacy.unit": "client", **UNIFORM},
    "secagg": {"secagg.enabled": True, "strategy.weighting": "uniform"},
    "tent": {"tta.method": "tent", "data.holdout": 0.2, "tta.keep": True},
    "roid": {"tta.method": "roid", "data.holdout": 0.2},
    "atp": {"tta.method": "atp", "strategy.wrap": ["atp"], "data.holdout": 0.2},
    "fedthe": {"tta.method": "fedthe", "strategy.wrap": ["fedthe"], "data.holdout": 0.2, "run.rounds": 1},
    **{
        body: {"continual.body": body, "continual.head": head, **TASKS}
        for body, head in (
            ("sequential", "masked"),
            ("factor_coso", "lda"),
            ("coso", "ranpac"),
            ("lae", "ncm"),
            ("conpet_static", "linear"),
            ("inflora", "lda"),
            ("merging", "linear"),
        )
    },
    "bfloat16": {"model.dtype": "bfloat16"},
}


# One of each kind of work at the server and at clients: merges, kept and drawn factors, noise, masks, sums, bodies.
SAMPLE = (
    "fedex",
    "fedsa",
    "fed_sb",
    "scaffold",
    "dropout",
    "private",
    "secagg",
    "fedthe",
    "coso",
    "lae",
    "inflora",
    "bfloat16",
)


@pytest.mark.parametrize("name", few(CASES, SAMPLE))
def test_a_run_is_the_same(tiny, tmp_path, name):
    options = {"run.rounds": 2, **CASES[name]}
    here = tiny("here", options)
    with elsewhere() as device:
        there = tiny("there", {**options, "run.device": device.type})
    assert here["final"] == there["final"]
    files = [tmp_path / run / "adapter" / "adapter_model.safetensors" for run in ("here", "there")]
    assert files[0].read_bytes() == files[1].read_bytes()
