"""Has Flower believe that it is inside a run."""

from __future__ import annotations

import pytest


@pytest.fixture
def flower_run(monkeypatch):
    """Flower builds no message outside of a run."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
