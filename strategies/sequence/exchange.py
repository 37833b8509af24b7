"""Asking clients for sums over their records: what a head is fitted on after a task, or a sketch before it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from flwr.app import Message
from flwr.serverapp import Grid

from fedpeft.state import AdapterState, RoundFailed, Rules
from fedpeft.state_file import StateFile
from fedpeft.strategies import asking, opening, wire
from fedpeft.strategies.instructions import Instructions
from fedpeft.strategies.sequence.base import Tensors
from fedpeft.strategies.sequence.sequence import TaskSequence

log = logging.getLogger("fedpeft")
Record = Callable[[dict[str, Any]], None]
Answers = list[tuple[Tensors, float]]


def ask_for_sums(
    grid: Grid,
    codec: wire.Packed,
    sequence: TaskSequence,
    rules: Rules,
    record: Record,
    number: int,
    what: str,
    view: str,
    adapter: AdapterState,
    form: dict[str, tuple[int, ...]],
) -> Answers:
    """Every client's tensors and weight, in the order of names. Clients without records of the task send none.

    With `rules.folder` they are on the disk, as updates are (`wire.gather_updates`).

    Args:
        number: round whose task is meant: the first one for a sketch of its records, the last one for a head.
        what: "head", or one of the body's `sketches`.
        view: the adapter's name among the body's views.
        form: names and shapes that an answer must have.

    Raises:
        RoundFailed: fewer than the quorum answered.
    """
    roster = codec.roster(grid, rules.clients)
    task = sequence.curriculum.task(number)
    message = Instructions(number, learn=sequence.make_lesson(task), sums=what, view=view)
    made = wire.contents(codec, dict.fromkeys(roster, adapter), message)
    contents = {roster[client]: content for client, content in made.items()}
    file = StateFile(rules.folder)

    def read(node: int, reply: Message | None) -> tuple[AdapterState, float]:
        sums, weight = read_sums(reply, number, form)
        return file.put(sums), weight

    answers = asking.ask_nodes(grid, "query.sums", contents, rules.deadline_s, read)
    about = {"round": number, "task": task, "sums": what}
    found, names = [], []
    # By name, as sums must round alike in every run.
    for client in sorted(roster):
        answer = answers[roster[client]]
        if isinstance(answer, wire.BadReply):
            log.warning("task %d: no %s sums from %s: %s", task, what, client, answer)
            record({"event": "sums_missing", **about, "client": client, "reason": str(answer)})
        else:
            sums, weight = answer
            found.append((file.get(sums).extra, weight))
            names.append(client)
    needed = math.ceil(rules.quorum * len(roster))
    if len(found) < needed:
        raise RoundFailed(
            f"task {task}: sums from {len(found)} of {len(roster)} clients, but run.quorum="
            f"{rules.quorum} needs {needed}."
        )
    sent = sum(value.nbytes for tensors, _ in found for value in tensors.values())
    traffic = {"bytes_up": sent, "bytes_down": adapter.nbytes * len(roster)}
    record({"event": "sums", **about, "view": view, "clients": names, **traffic})
    return found


def read_sums(reply: Message | None, number: int, form: dict[str, tuple[int, ...]]) -> tuple[AdapterState, float]:
    """A state that has the tensors of one reply beside it, and its weight.

    Raises:
        BadReply: an error, of another form or round, or not finite.
    """

    def check(given: AdapterState) -> None:
        if (
            given.tensors
            or {name: tuple(value.shape) for name, value in given.extra.items()} != form
            or not all(value.dtype in (torch.float32, torch.float64) for value in given.extra.values())
        ):
            raise wire.BadReply("sums of another form than was asked for")

    content = wire.opened(reply)
    weight = wire.metrics(content)["num-examples"]
    wanted = {name: torch.empty(shape, device="meta") for name, shape in form.items()}
    # From what was asked for: a client cannot choose how much the server reads.
    longest = wire.manifest_bytes(AdapterState({}, extra=wanted))
    with opening.blame_message("sums", wire.BadReply):
        answer, told = opening.packed(content, longest, check, ("metrics",))
    if told.round != number:
        raise wire.BadReply(f"stale: sums of round {told.round}, not {number}")
    for name, value in answer.extra.items():
        if not torch.isfinite(value).all():
            raise wire.BadReply(f"{name} has NaN or inf")
    return answer, weight
