"""Whole runs under secure aggregation: the same adapters as in the clear, with faults, in workers, and resumed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fedpeft.errors import RunError
from fedpeft.record import checkpoint
from fedpeft.simulations import run as runs
from fedpeft.strategies.secagg import masking

CONFIG = {"data.clients": 5, "strategy.weighting": "uniform", "run.rounds": 1}
ON = {**CONFIG, "secagg.enabled": True}


def tensors(path, number: int = 1):
    """The server's adapter after a round, before any change of representation."""
    adapter = checkpoint.read(path / "checkpoints" / f"round-{number:06d}").adapter
    return {key: value.numpy() for key, value in adapter.tensors.items()}


def events(path, kind: str = "round"):
    return [
        event
        for line in (path / "metrics.jsonl").read_text().splitlines()
        if (event := json.loads(line))["event"] == kind
    ]


@pytest.mark.parametrize("strategy", ["fedit", "ffa_lora", "fedsvd"])
def test_a_round_is_the_one_in_the_clear_to_half_a_quantisation_step(strategy, tiny, tmp_path):
    tiny("clear", {**CONFIG, "strategy": strategy})
    tiny("masked", {**ON, "strategy": strategy, "secagg.clip": 0.5})
    clear, masked = tensors(tmp_path / "clear"), tensors(tmp_path / "masked")
    bound = 0.5 / masking.levels(22) / 2
    assert set(clear) == set(masked)
    for key, value in clear.items():  # both were rounded to float32 once
        assert (np.abs(masked[key] - value) <= bound * (1 + 1e-6) + 2 * np.spacing(np.abs(value))).all(), key
    fresh = events(tmp_path / "masked")[0]
    assert "train_loss" not in fresh and fresh["secagg"]["uploaded"] == 5
    assert events(tmp_path / "clear")[0]["bytes_up"] < fresh["bytes_up"]


def test_controls_of_scaffold_are_summed_too(tiny, tmp_path):
    sgd = {"strategy.wrap": ["scaffold"], "client.optimizer": "sgd", "client.lr": 0.1, "run.rounds": 2}
    tiny("clear", {**CONFIG, **sgd})
    tiny("masked", {**ON, **sgd, "secagg.clip": 10.0, "secagg.bits": 29})
    clear, masked = (checkpoint.latest(tmp_path / name / "checkpoints").memory for name in ("clear", "masked"))
    assert set(clear) == set(masked) and any(key.startswith("control:") for key in clear)
    for key, value in clear.items():
        assert value.abs().max() > 0 and (value - masked[key]).abs().max() < 1e-4, key


def test_faulty_clients_are_left_out_with_the_stage(tiny, tmp_path):
    """A crash happens while the upload is made; a NaN upload reaches the server as an array of the wrong type."""
    summary = tiny("run", {**ON, "run.faults": {"client-001": "crash", "client-003": "nan"}})
    reasons = {entry["client"]: entry["reason"] for entry in summary["quarantined"]}
    assert "stage 2 (masked upload): client error" in reasons["client-001"] and "crash" in reasons["client-001"]
    assert "masked upload: float64" in reasons["client-003"]
    (event,) = events(tmp_path / "run")
    assert event["secagg"]["dropped"] == {"masked upload": ["client-001", "client-003"]}
    assert event["clients"] == ["client-000", "client-002", "client-004"]


def test_too_many_faulty_clients_end_the_run(tiny):
    faults = {f"client-00{index}": "crash" for index in range(3)}
    with pytest.raises(RunError, match=r"none of the 1 rounds had a result.*stage 2 .*: 2 of 5 .*client-002"):
        tiny("run", {**ON, "run.faults": faults})


def test_clipped_changes_are_told_at_the_client_only(tiny, tmp_path, caplog):
    tiny("run", {**ON, "secagg.clip": 1e-4})
    assert "client-000" in caplog.text and "changes were cut to secagg.clip=0.0001" in caplog.text
    assert "cut" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_run_in_a_worker_and_a_resumed_one_give_the_same_adapter(tiny, interrupted, tmp_path, forked):
    """State travels to the worker and back; sums do not depend on masks, so the adapters are equal bit for bit."""
    longer = {**ON, "run.rounds": 3, "run.clients_per_round": 4}
    tiny("whole", longer)
    tiny("worker", {**longer, "run.workers": 1})

    interrupted("broken", longer)
    runs.resume(tmp_path / "broken")
    whole, *others = (tensors(tmp_path / name, 3) for name in ("whole", "worker", "broken"))
    for other in others:
        assert all(np.array_equal(value, other[key]) for key, value in whole.items())
