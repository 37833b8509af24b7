"""A run with hostile clients finishes, names each of them, and under a robust wrapper loses hardly any accuracy."""

from __future__ import annotations

import math

import pytest

from fedpeft.errors import InputError
from fedpeft.state import RoundFailed
from support.sample import few

# 12 clients, half of them hostile in one way or another; x1000 is not malformed and has to be survived by the rule.
FAULTS = {
    "client-000": "nan",
    "client-002": "shape",
    "client-004": "empty",
    "client-006": "crash",
    "client-008": "scale",
}
RUN = {
    "data.clients": 12,
    "data.limit": 600,
    "client.local_steps": 10,
    "run.rounds": 4,
    "run.quorum": 0.3,
    "client.lr": 0.005,
}


def accuracy(summary: dict) -> float:
    return summary["final"]["accuracy"]


def updates_of(summary: dict, client: str) -> dict:
    return next(row for row in summary["updates"] if row["client"] == client)


@pytest.mark.parametrize("wrapper", few(["trimmed_mean", "median", "krum"], ["krum"]))
def test_a_robust_run_survives_hostile_clients_and_names_them(wrapper, tiny):
    entry = {"name": "krum", "byzantine": 1, "keep": 4} if wrapper == "krum" else wrapper
    clean = tiny("clean", {**RUN, "strategy.wrap": [entry]})
    hostile = tiny("hostile", {**RUN, "strategy.wrap": [entry], "run.faults": FAULTS})
    named, rounds = {(row["client"], row["round"]) for row in hostile["quarantined"]}, [1, 2, 3, 4]
    assert named == {(client, number) for client, fault in FAULTS.items() if fault != "scale" for number in rounds}
    reasons = {row["client"]: row["reason"] for row in hostile["quarantined"]}
    assert "NaN" in reasons["client-000"] and "expected float32" in reasons["client-002"]
    assert "adapter" in reasons["client-004"] and "injected crash" in reasons["client-006"]
    loud = updates_of(hostile, "client-008")
    assert loud["far_rounds"] == loud["treated_rounds"] == rounds and loud["times_median"] > 100
    assert loud["treated"] == "not selected" if wrapper == "krum" else loud["treated"].startswith("trimmed in ")
    assert not any(row["far_rounds"] for row in hostile["updates"] if row["client"] != "client-008")
    assert not any(row["far_rounds"] for row in clean["updates"])
    # The test set has 597 records: a standard error of at most 2 points for each run.
    noise = 3 * math.sqrt(2 * 0.25 / 597)
    assert accuracy(hostile) > accuracy(clean) - noise
    assert accuracy(hostile) > clean["baseline"]["accuracy"] + 0.1


def test_without_a_robust_wrapper_the_scaled_update_ruins_the_run(tiny):
    config = {**RUN, "run.rounds": 3}
    clean, ruined = tiny("clean", config), tiny("ruined", {**config, "run.faults": {"client-008": "scale"}})
    assert accuracy(ruined) < accuracy(clean) - 0.2
    assert updates_of(ruined, "client-008")["far_rounds"] == [1, 2, 3]
    assert updates_of(ruined, "client-008")["treated"] is None


def test_a_norm_bound_names_the_scaled_update(tiny):
    bounds = {"run.rounds": 2, "run.max_update_norm": 20.0}
    bounded = tiny("bounded", {**RUN, **bounds, "run.faults": {"client-008": "scale"}})
    assert {row["client"] for row in bounded["quarantined"]} == {"client-008"}
    assert all("norm" in row["reason"] for row in bounded["quarantined"])


def test_clients_that_hang_or_die_are_dropped_at_the_deadline(tiny, forked):
    config = {
        "run.workers": 3,
        "run.deadline_s": 10.0,
        "run.rounds": 1,
        "data.clients": 6,
        "data.limit": 200,
        "run.faults": {"client-001": "hang", "client-003": "die"},
    }
    summary = tiny("run", config)
    reasons = {row["client"]: row["reason"] for row in summary["quarantined"]}
    assert set(reasons) == {"client-001", "client-003"}
    assert "deadline" in reasons["client-001"] and "process ended" in reasons["client-003"]
    assert summary["final"]["accuracy"] is not None


def test_too_few_good_replies_end_the_run_with_the_reasons(tiny):
    with pytest.raises(RoundFailed, match=r"client-001.*injected crash"):
        tiny(
            "run",
            {"run.faults": {"client-001": "crash", "client-002": "nan", "client-003": "crash"}, "run.quorum": 0.5},
        )


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"client-009": "nan"}, "run.faults: 'client-009' is not known"),
        ({"client-001": "nann"}, "run.faults.client-001: 'nann' is not known. Did you mean 'nan'"),
        ({"client-001": "die"}, "needs run.workers"),
        ({"client-001": "hang"}, "needs run.deadline_s"),
    ],
)
def test_impossible_faults_are_refused(faults, message, tiny):
    with pytest.raises(InputError) as error:
        tiny("run", {"run.faults": faults})
    assert message in str(error.value)


def test_a_run_that_no_client_can_evaluate_ends_with_the_reason(tiny, monkeypatch, caplog):
    from fedpeft.clients.app import Local

    def broken(self, client, received, task):
        raise RuntimeError("disk is gone")

    monkeypatch.setattr(Local, "evaluate", broken)
    with pytest.raises(RoundFailed, match="no client could evaluate"):
        tiny("run", {"strategy": "fedsa", "data.holdout": 0.25})
    assert "client-000 was not evaluated" in caplog.text and "disk is gone" in caplog.text
