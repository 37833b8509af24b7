"""Has Flower believe that it is inside a run, and torch draw the same in every test."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def flower_run(monkeypatch):
    """Flower builds no message outside of a run."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def seeded():
    """Torch draws the same in every test."""
    torch.manual_seed(0)
