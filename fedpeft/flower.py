"""Names that Flower keeps private and that messages in one process need; what deployments need is in `deploy.flower`.

Flower's public interface is flwr.app, flwr.clientapp and flwr.serverapp; no other module of fedpeft imports more of it
(tests/unit/test_flower_names.py, which also lists each name that another version lacks).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode, SType
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["ErrorCode", "OwnGrid", "Run", "SType", "empty_run", "identify"]


def identify(run: int, node: int, task: int) -> None:
    """Say whose task this process works on: Flower looks that up whenever a message is made."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run, node, task


def empty_run(number: int) -> Run:
    """A run of which nothing is known but its number."""
    return Run.create_empty(number)


class OwnGrid(Grid):
    """What our grids have in common: their run, and messages made as they are asked for. Answers are pulled."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def get_node_ids(self) -> Iterable[int]:
        return [node.node_id for node in self.get_nodes()]

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        raise NotImplementedError("a strategy of ours pulls its answers itself")
