"""What strategies do beyond averaging, with real sites: every run ends as its simulation does.

One coordinator and three sites serve all tests of this file.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from fedpeft.adapters import folder
from fedpeft.privacy.ledger import Ledger
from fedpeft.record.metrics import read
from support.deployed import NAMES, TRAIN, simulated, three_sites, until

WORDS = {"no": ["bad", "sad", "mad"], "yes": ["fun", "joy", "win"], "up": ["hill", "sky"], "down": ["well", "pit"]}
CLEAR = {"privacy": {"unit": "none"}}
CLIENT_DP = {"privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3, "clip": 1.0}}
SIGMA = {"privacy": {"unit": "sample", "noise_multiplier": 1.0, "delta": 1e-3}}
HELD = {"data.holdout": 0.2, "tta.corruption": "clean"}
TASKS = {"continual.tasks": 2, "continual.head": "lda"}
CASES = {
    "secagg": ({}, {"secagg.enabled": True}),
    "kept": (CLEAR, {"strategy.name": "fedsa", **HELD}),
    "tasks-dp": (SIGMA, {"strategy.transport": "dense", "continual.body": "factor_coso", "continual.side": "both",
                         "continual.statistics_noise": 2.0, **TASKS}),
    "tasks-lae": (CLEAR, {"strategy.name": "ffa_lora", "continual.body": "lae", **TASKS}),
    "tasks-sketch": (CLEAR, {"strategy.name": "fedit", "continual.body": "coso", "continual.side": "in", **TASKS}),
    "tasks-replay": (CLEAR, {"strategy.name": "lora_fair", "continual.body": "conpet_static", "continual.tasks": 2}),
    "client-dp": (CLIENT_DP, {"strategy.name": "fedit"}),
    "atp": (CLEAR, {"strategy.name": "fedit", "strategy.wrap": ["atp"], "tta.method": "atp", **HELD}),
    "scaffold": (CLEAR, {"strategy.name": "ffa_lora", "strategy.wrap": ["scaffold"]}),
    "flora": (CLEAR, {"strategy.name": "flora"}),
    "secagg-clear": (CLEAR, {"secagg.enabled": True}),
    "tent": (CLEAR, {"strategy.name": "fedit", "tta.method": "tent", "tta.keep": True, **HELD}),
    "fedthe": (CLEAR, {"strategy.name": "fedit", "strategy.wrap": ["fedthe"], "tta.method": "fedthe", **HELD}),
}
ALWAYS = ("secagg", "tasks-dp")  # the others are slow
SAMPLE = ("secagg", "tasks-dp")
EVENTS = ("round", "sums", "task")
OWN = {"time", "seconds", "push_s", "pull_s"}  # of a run
POLICY = ("unit: none\nmax_delta: 0.01\nseeded_noise: true\nunbounded: [max_epsilon, max_rounds, records]\n"
          "metrics: [train_loss, loss, accuracy, num-examples, missed_tasks]\n")


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    with three_sites(tmp_path_factory.mktemp("deployment"), POLICY, WORDS) as made:
        yield made


@pytest.mark.parametrize(
    "case", [case if case in ALWAYS else pytest.param(case, marks=pytest.mark.slow) for case in CASES])
def test_sites_end_as_the_simulation_does(deployment, case):
    """The adapter, what every round reports, and what stays with each site."""
    privacy, options = CASES[case]
    tree, test = {**TRAIN, "data": {"labels": list(WORDS)}, **privacy}, str(deployment.root / "test.csv")
    options = {**options, "privacy.randomness": "seeded", "run.rounds": 2, "data.test": test}
    run = deployment.submit(tree, *(f"{key}={json.dumps(value)}" for key, value in options.items()))
    twin = simulated(deployment, tree, options, case)
    deployment.wait(run)
    close(folder.load(deployment.coordinator / "runs" / run / "adapter").tensors, folder.load(twin / "adapter").tensors)
    wanted = [event for event in read(twin / "metrics.jsonl") if event["event"] in EVENTS]
    found = [event for event in deployment.events(run) if event["event"] in EVENTS]
    assert case.startswith("tasks") == any(event["event"] == "task" for event in found)
    for event, expected in zip(found, wanted, strict=True):
        assert event.get("clients", NAMES) == NAMES
        if event["event"] == "round" and case in SAMPLE:  # what a record has spent stays with real sites
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
    assert bool(kept) == (case in ("kept", "scaffold") or case.startswith("tasks") or case in SAMPLE)


def test_a_sequence_needs_a_test_set_of_the_coordinator(deployment):
    path = deployment.root / "untested.yaml"
    path.write_text(json.dumps({**TRAIN, **CLEAR, "continual": {"body": "sequential", "tasks": 2}}))
    said = deployment.call("server", "run", deployment.coordinator, path, "run.rounds=2", code=2)
    assert "Set data.test." in said and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["round", "sums", "task"])
def test_a_sequence_goes_on_where_its_coordinator_was_killed(deployment, cut):
    """After a round of the first task, after the sums for its head, or after its row of the matrix."""
    privacy, options = CASES["tasks-dp"]
    tree = {**TRAIN, "data": {"labels": list(WORDS)}, **privacy}
    options = {**options, "privacy.randomness": "seeded", "run.rounds": 4, "client.batch_size": 8,
               "data.test": str(deployment.root / "test.csv")}
    run = deployment.submit(tree, *(f"{key}={json.dumps(value)}" for key, value in options.items()))
    until(lambda: any(event["event"] == cut for event in deployment.events(run)), cut)
    deployment.kill_all("coordinator")
    assert not any(event["event"] == "end" for event in deployment.events(run))
    deployment.start("coordinator")
    twin = simulated(deployment, tree, options, f"cut-{cut}")
    deployment.wait(run)
    place = deployment.coordinator / "runs" / run
    close(folder.load(place / "adapter").tensors, folder.load(twin / "adapter").tensors)
    ours, theirs = (json.loads((path / "summary.json").read_text())["continual"] for path in (place, twin))
    assert ours == theirs and len(ours["right"]) == 2
    for event in EVENTS:
        assert [(one["round"], one.get("task")) for one in deployment.events(run) if one["event"] == event] == [
            (one["round"], one.get("task")) for one in read(twin / "metrics.jsonl") if one["event"] == event]
    for name in NAMES:  # what was answered again cost nothing more
        for task in range(2):
            account = f"{name}+task-{task}.jsonl"
            spent = [entry.release for entry in Ledger(deployment.root / name / "ledger" / account).entries()
                     if entry.run.startswith(run)]
            assert spent == [entry.release for entry in Ledger(twin / "ledger" / account).entries()]


def close(some, others):
    assert some.keys() == others.keys()
    for key, value in others.items():
        torch.testing.assert_close(some[key], value, rtol=1e-4, atol=1e-6)
