"""Messages to nodes and the replies to them: each is matched, read as it comes, and refused where it is not one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from fedpeft import progress
from fedpeft.flower import ErrorCode
from fedpeft.foreign import BadMessage

POLL_S = 0.05
N = TypeVar("N")
T = TypeVar("T")


class BadReply(BadMessage):
    """A reply that may not be aggregated, with the reason: one line of at most 2 kB."""


def ask_nodes(
    grid: Grid,
    kind: str,
    contents: dict[int, RecordDict],
    deadline_s: float | None,
    read: Callable[[int, Message | None], T],
) -> dict[int, T | BadReply]:
    """Send one message a node, and read each reply as it comes, until all have answered, or the deadline.

    Replies are matched by message id: Flower reports a dead node's error from another node's id.

    Args:
        read: what is kept of a node's reply, which is None if it gave none; nothing else of the reply stays in memory.
    """
    sent: dict[str, int] = {}
    for node, content in contents.items():
        # A message that the link did not take has no id, or none is returned: there is no reply to wait for.
        sent |= dict.fromkeys((name for name in grid.push_messages([Message(content, node, kind)]) if name), node)
    answers: dict[int, T | BadReply] = {}
    for reply in collect_replies(grid, list(sent), deadline_s):
        node = sent[reply.metadata.reply_to_message_id]
        if node in answers:
            # Neither is taken: which of the two was meant nobody can tell.
            reply = refused(reply, "it answered one message twice")
        elif not reply.has_error() and reply.metadata.src_node_id != node:
            reply = refused(reply, f"node {reply.metadata.src_node_id} answered in its name")
        answers[node] = read_or_refuse(read, node, reply)
    return {node: answers[node] if node in answers else read_or_refuse(read, node, None) for node in contents}


def read_or_refuse(read: Callable[[N, Message | None], T], sender: N, reply: Message | None) -> T | BadReply:
    """What is read in a reply, or why it is a bad one."""
    try:
        return read(sender, reply)
    except BadReply as error:
        return error


def refused(reply: Message, reason: str) -> Message:
    """An error in the place of a reply."""
    return Message(Error(ErrorCode.UNKNOWN, reason), reply_to=reply)


def collect_replies(grid: Grid, names: list[str], deadline_s: float | None) -> Iterator[Message]:
    """Replies to these messages as they come, until all are there or the deadline; a grid that can, gives up on the
    rest.
    """
    waiting = dict.fromkeys(names)  # not a list, of which each reply would be searched for: of 1,000 clients a million
    progress.step("clients", 0, len(names))
    until = math.inf if deadline_s is None else time.monotonic() + deadline_s
    while waiting:
        answered = set()
        with progress.share_of("clients", len(names) - len(waiting), len(names)):  # clients may train ahead together
            pulled = grid.pull_messages(list(waiting))
        for reply in pulled:
            name = reply.metadata.reply_to_message_id
            if name in waiting:
                answered.add(name)
                yield reply
        for name in answered:
            del waiting[name]
        progress.step("clients", len(names) - len(waiting), len(names))
        if waiting and time.monotonic() > until:
            # Flower's own grids have no such thing.
            if hasattr(grid, "cancel"):
                grid.cancel(list(waiting))
            break
        if waiting and not answered:
            time.sleep(POLL_S)
