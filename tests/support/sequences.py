"""Tiny federated runs over two tasks, of three clients with 200 digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedpeft.record import checkpoint

SMALL: dict[str, Any] = {
    "data.limit": 200,
    "data.clients": 3,
    "data.partition": "iid",
    "continual.tasks": 2,
    "run.rounds": 4,
    "client.local_steps": 2,
    "client.batch_size": 8,
    "run.baselines": False,
    "privacy.accountant": "rdp",
}
DP_LDA = {"continual.head": "lda", "continual.statistics_noise": 2.0}


def ended(run: Path):
    return checkpoint.latest(run / "checkpoints")
