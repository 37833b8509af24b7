"""Whole runs never count fewer releases than there were: processes killed in a round, budgets that run out."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from fedpeft.clients import local
from fedpeft.clients.store import Store
from fedpeft.privacy.accounting import compose_epsilon
from fedpeft.privacy.ledger import Ledger
from fedpeft.simulations import run as runs

DELTA = 1e-5
PRIVATE = {
    "strategy.weighting": "uniform",
    "privacy.unit": "sample",
    "privacy.noise_multiplier": 1.0,
    "privacy.accountant": "rdp",
    "client.batch_size": 4,
}
NAMES = [f"client-{index:03d}" for index in range(4)]


def steps_of(run):
    return {
        name: [(one.round, one.steps) for one in Ledger(run / "ledger" / f"{name}.jsonl").entries()] for name in NAMES
    }


def adapter(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def killed(tiny, name, config, client, number, where):
    """Run in a process that is killed in a client's round: before its reply is saved, after, or once it is counted."""
    save, reserve = Store.save_reply, Ledger.reserve
    now = []

    def saved(self, who, round_, *reply):
        now[:] = [who, round_]
        if where == "before" and now == [client, number]:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, who, round_, *reply)

    def reserved(*arguments, **options):
        if where == "saved" and now == [client, number]:
            os.kill(os.getpid(), signal.SIGKILL)
        reserve(*arguments, **options)
        if where == "counted" and now == [client, number]:
            os.kill(os.getpid(), signal.SIGKILL)

    def child():
        Store.save_reply, Ledger.reserve = saved, reserved
        tiny(name, config)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("where", ["before", "saved", "counted"])
def test_a_killed_client_counts_what_it_released_once_and_the_run_ends_bit_for_bit(where, tiny, tmp_path):
    """The budget is that of three rounds and not one more. Dropout masks are drawn from all clients of a cohort."""
    config = {**PRIVATE, "adapter.dropout": 0.2}
    tiny("whole", config)
    killed(tiny, "broken", config, "client-001", 2, where)
    done = [(1, 2), (2, 2)] if where == "counted" else [(1, 2)]
    assert steps_of(tmp_path / "broken")["client-001"] == done
    assert steps_of(tmp_path / "broken")["client-000"] == [(1, 2), (2, 2)]  # before it, and counted before it left
    runs.resume(tmp_path / "broken")
    assert (
        steps_of(tmp_path / "broken")
        == steps_of(tmp_path / "whole")
        == {name: [(1, 2), (2, 2), (3, 2)] for name in NAMES}
    )
    assert same(adapter(tmp_path / "whole"), adapter(tmp_path / "broken"))


def test_clients_that_have_answered_train_beside_the_others_and_their_answers_stand(tiny, tmp_path, monkeypatch):
    """Cohorts are composed in the same way after a kill; where all have answered nobody is trained."""
    made, cohorts = local.train_cohort, []

    def watched(model, jobs, *arguments):
        cohorts.append(len(jobs))
        return made(model, jobs, *arguments)

    monkeypatch.setattr(local, "train_cohort", watched)
    killed(tiny, "run", PRIVATE, "client-002", 2, "before")
    runs.resume(tmp_path / "run")
    assert cohorts == [4, 4]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    runs.resume(tmp_path / "run")
    assert cohorts == [4, 4] and steps_of(tmp_path / "run") == {name: [(1, 2), (2, 2), (3, 2)] for name in NAMES}


def test_metrics_of_an_answer_are_repeated_with_it(tiny, tmp_path):
    """Else the mean over clients of a round would be over those that the kill spared."""
    config = {**PRIVATE, "privacy.release_metrics": True}

    def losses(run):
        events = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").open()]
        return [event["train_loss"] for event in events if event["event"] == "round"]

    tiny("whole", config)
    killed(tiny, "broken", config, "client-003", 2, "counted")
    runs.resume(tmp_path / "broken")
    assert losses("broken") == losses("whole") and len(set(losses("whole"))) == 3


def test_the_round_goes_on_without_a_client_whose_budget_is_spent(tiny, tmp_path):
    folder = tmp_path / "policies"
    folder.mkdir()
    records = 20
    one, two = (compose_epsilon(((4 / records, 1.0, steps),), DELTA, "rdp") for steps in (2, 4))
    for name in NAMES:
        most = (one + two) / 2 if name == "client-002" else 50.0
        (folder / f"{name}.yaml").write_text(
            f"max_epsilon: {most}\nseeded_noise: true\nrecords: {records}\nunbounded: [max_rounds]\n"
        )
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
    assert row["epsilon"] == pytest.approx(compose_epsilon(((0.04, 1.0, 6),), DELTA, "rdp"))
    assert row["sample_rate"] == 0.04 and row["steps"] == 6 and row["delta"] == DELTA
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.jsonl")} == {"run"}
