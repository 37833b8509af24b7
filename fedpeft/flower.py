"""Names that Flower keeps private and that messages in one process need; what deployments need is in `deploy.flower`.

Flower's public interface is flwr.app, flwr.clientapp and flwr.serverapp; no other module of fedpeft imports more of it
(tests/unit/test_flower_names.py, which also lists each name that another version lacks).
"""

from __future__ import annotations

from flwr.common.constant import ErrorCode, SType
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["ErrorCode", "Run", "SType", "empty_run", "identify"]


def identify(run: int, node: int, task: int) -> None:
    """Say whose task this process works on: Flower looks that up whenever a message is made."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run, node, task


def empty_run(number: int) -> Run:
    """A run of which nothing is known but its number."""
    return Run.create_empty(number)
