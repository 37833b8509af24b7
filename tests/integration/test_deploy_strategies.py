"""What strategies do beyond averaging, with real sites: every run ends as its simulation does.

One coordinator and three sites serve all tests of this file.
"""

from __future__ import annotations

import json

import pytest
import torch
from deployed import NAMES, TRAIN, simulated, three_sites
from safetensors.torch import load_file

from fedpeft.adapters import folder
from fedpeft.metrics import read

CLEAR = {"privacy": {"unit": "none"}}
CLIENT_DP = {"privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3, "clip": 1.0}}
HELD = {"data.holdout": 0.2, "tta.corruption": "clean"}
CASES = {
    "secagg": ({}, {"secagg.enabled": True}),
    "kept": (CLEAR, {"strategy.name": "fedsa", **HELD}),
    "client-dp": (CLIENT_DP, {"strategy.name": "fedit"}),
    "atp": (CLEAR, {"strategy.name": "fedit", "strategy.wrap": ["atp"], "tta.method": "atp", **HELD}),
    "scaffold": (CLEAR, {"strategy.name": "ffa_lora", "strategy.wrap": ["scaffold"]}),
    "flora": (CLEAR, {"strategy.name": "flora"}),
    "secagg-clear": (CLEAR, {"secagg.enabled": True}),
    "tent": (CLEAR, {"strategy.name": "fedit", "tta.method": "tent", "tta.keep": True, **HELD}),
    "fedthe": (CLEAR, {"strategy.name": "fedit", "strategy.wrap": ["fedthe"], "tta.method": "fedthe", **HELD}),
}
ALWAYS = ("secagg", "kept")  # the others are slow
OWN = {"time", "seconds", "push_s", "pull_s"}  # of a run
POLICY = "unit: none\nmax_delta: 0.01\nseeded_noise: true\nmetrics: [train_loss, loss, accuracy, num-examples]\n"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    with three_sites(tmp_path_factory.mktemp("deployment"), POLICY) as made:
        yield made


@pytest.mark.parametrize(
    "case", [case if case in ALWAYS else pytest.param(case, marks=pytest.mark.slow) for case in CASES])
def test_sites_end_as_the_simulation_does(deployment, case):
    """The adapter, what every round reports, and what stays with each site."""
    privacy, options = CASES[case]
    tree, test = {**TRAIN, **privacy}, str(deployment.root / "test.csv")
    options = {**options, "privacy.randomness": "seeded", "run.rounds": 2, "data.test": test}
    run = deployment.submit(tree, *(f"{key}={json.dumps(value)}" for key, value in options.items()))
    twin = simulated(deployment, tree, options, case)
    deployment.wait(run)
    close(folder.load(deployment.coordinator / "runs" / run / "adapter").tensors, folder.load(twin / "adapter").tensors)
    wanted = [event for event in read(twin / "metrics.jsonl") if event["event"] == "round"]
    for event, expected in zip(deployment.rounds(run), wanted, strict=True):
        assert event["clients"] == NAMES
        if case == "secagg":  # what a record has spent, real sites keep to themselves
            assert "epsilon_max" not in event and expected.pop("epsilon_max") > 0
        assert event.keys() - OWN == expected.keys() - OWN
        for key in expected.keys() - OWN:
            value = expected[key]
            assert event[key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), key
    kept = 0
    for name in NAMES:
        here, there = deployment.root / name / "state" / run / name, twin / "clients" / name
        assert sorted(path.name for path in here.glob("*")) == sorted(path.name for path in there.glob("*"))
        for path in here.glob("*.safetensors"):
            close(load_file(path), load_file(there / path.name))
            kept += 1
    assert bool(kept) == (case in ("kept", "scaffold", "secagg"))


def close(some, others):
    assert some.keys() == others.keys()
    for key, value in others.items():
        torch.testing.assert_close(some[key], value, rtol=1e-4, atol=1e-6)
