"""Whole runs never count fewer releases than there were: processes killed in a round, budgets that run out."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from fedpeft.clients.store import Store
from fedpeft.privacy.accounting import composed
from fedpeft.privacy.ledger import Ledger
from fedpeft.simulations import run as runs

DELTA = 1e-5
PRIVATE = {"strategy.weighting": "uniform", "privacy.unit": "sample", "privacy.noise_multiplier": 1.0,
           "privacy.accountant": "rdp", "client.batch_size": 4}
NAMES = [f"client-{index:03d}" for index in range(4)]


def steps_of(run):
    return {name: [(one.round, one.steps) for one in Ledger(run / "ledger" / f"{name}.jsonl").entries()]
            for name in NAMES}


def adapter(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def killed(tiny, name, config, client, number, after):
    """Run in a process that is killed in a client's round: just before its reply is saved, or just after."""
    save, calls = Store.save_reply, []

    def strike(self, who, *reply):
        calls.append(who)
        last = calls.count(client) == number and who == client
        if after or not last:
            save(self, who, *reply)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    def child():
        Store.save_reply = strike
        tiny(name, config)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("after", [False, True], ids=["before the reply is saved", "after"])
def test_a_killed_client_never_counts_less_than_it_released(after, tiny, tmp_path):
    config = {**PRIVATE, "privacy.planned_rounds": 10}
    tiny("whole", config)
    killed(tiny, "broken", config, "client-001", 2, after)
    assert steps_of(tmp_path / "broken")["client-001"] == [(1, 2), (2, 2)]  # counted before anything left
    runs.resume(tmp_path / "broken")
    once = [(1, 2), (2, 2), (3, 2)]
    twice = [(1, 2), (2, 2), (2, 2), (3, 2)]
    assert steps_of(tmp_path / "whole") == dict.fromkeys(NAMES, once)
    assert steps_of(tmp_path / "broken") == {**dict.fromkeys(NAMES, once), "client-001": once if after else twice}
    assert same(adapter(tmp_path / "whole"), adapter(tmp_path / "broken"))


def test_a_release_lost_to_a_kill_is_paid_from_the_same_budget(tiny, tmp_path):
    """Three rounds are planned. One client makes round 2 twice: there is nothing left for it in round 3."""
    killed(tiny, "run", PRIVATE, "client-001", 2, after=False)
    summary = runs.resume(tmp_path / "run")
    assert steps_of(tmp_path / "run")["client-001"] == [(1, 2), (2, 2), (2, 2)]
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    out = [(event["round"], event["client"], event["reason"]) for event in events if event["event"] == "quarantine"]
    assert [(number, client) for number, client, _ in out] == [(3, "client-001")]
    assert "budget exhausted" in out[0][2]
    clients = summary["privacy"]["clients"]
    assert len({row["epsilon"] for row in clients.values()}) == 1 and clients["client-001"]["steps"] == 6


def test_the_round_goes_on_without_a_client_whose_budget_is_spent(tiny, tmp_path):
    folder = tmp_path / "policies"
    folder.mkdir()
    records = 20
    one, two = (composed(((4 / records, 1.0, steps),), DELTA, "rdp") for steps in (2, 4))
    for name in NAMES:
        most = (one + two) / 2 if name == "client-002" else 50.0
        (folder / f"{name}.yaml").write_text(f"max_epsilon: {most}\nseeded_noise: true\nrecords: {records}\n"
                                             "unbounded: [max_rounds]\n")
    summary = tiny("run", {**PRIVATE, "privacy.policy": str(folder)})
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    out = [event for event in events if event["event"] == "quarantine"]
    assert [(event["round"], event["client"]) for event in out] == [(2, "client-002"), (3, "client-002")]
    assert all("budget exhausted" in event["reason"] for event in out)
    rounds = [event for event in events if event["event"] == "round"]
    assert [event["round"] for event in rounds] == [1, 2, 3]
    assert [len(event["clients"]) for event in rounds] == [4, 3, 3]
    spent = {name: row["epsilon"] for name, row in summary["privacy"]["clients"].items()}
    assert spent["client-002"] == pytest.approx(one) and spent["client-002"] < (one + two) / 2
    assert all(spent[name] > two for name in NAMES if name != "client-002")
    assert [event["epsilon_max"] for event in rounds] == sorted(event["epsilon_max"] for event in rounds)


def test_epsilon_over_rounds_is_that_of_all_steps_together(tiny, tmp_path):
    """Neither one round's nor three times it."""
    summary = tiny("run", {**PRIVATE, "privacy.records": 100})
    row = summary["privacy"]["clients"]["client-000"]
    assert row["epsilon"] == pytest.approx(composed(((0.04, 1.0, 6),), DELTA, "rdp"))
    assert row["sample_rate"] == 0.04 and row["steps"] == 6 and row["delta"] == DELTA
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.jsonl")} == {"run"}
