"""Shared by all tests: one thread, no telemetry, no hub, and a tiny simulation that takes half a second."""

from __future__ import annotations

import os

os.environ.update(FLWR_TELEMETRY_ENABLED="0", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)

TINY: dict[str, Any] = {
    "data.limit": 120, "data.clients": 4, "data.partition": "iid", "client.local_steps": 2, "client.local_epochs": None,
    "client.batch_size": 8, "client.lr": 0.01, "run.rounds": 3, "run.baselines": False,
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`tiny(name, config)` runs a tiny simulation into tmp_path/name and returns its summary, without plots."""
    from fedpeft.record import report
    from fedpeft.simulations.run import simulate

    monkeypatch.setattr(report, "write", lambda run: [])

    def run(name: str = "run", config: dict[str, Any] | None = None, **arguments: Any) -> dict[str, Any]:
        return simulate({}, {**TINY, **(config or {})}, tmp_path / name, **arguments)

    return run
