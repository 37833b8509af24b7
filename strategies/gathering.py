"""The updates of a round, each checked as it comes: what may be aggregated, in the order of clients' names."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedpeft.state import AdapterState, Rules, ServerState, Update
from fedpeft.state_file import StateFile
from fedpeft.strategies import asking, wire

if TYPE_CHECKING:
    from fedpeft.strategies.base import FederatedStrategy


def gather_updates(
    strategy: FederatedStrategy,
    grid: Grid,
    server: ServerState,
    roster: dict[str, int],
    sent: dict[str, AdapterState],
    contents: dict[int, RecordDict],
    rules: Rules,
    codec: wire.Codec,
) -> tuple[list[Update], dict[str, str]]:
    """Ask clients to train; good updates sorted by client name, and the reason for each bad one.

    With `rules.folder` the tensors of an update go to the disk as soon as it is checked, and are mapped when all are
    there: what then takes sums has no two of them in memory.
    """
    names, file = {roster[client]: client for client in sent}, StateFile(rules.folder)

    def read(node: int, reply: Message | None) -> Update:
        update = read_update(strategy, server, sent, names[node], reply, rules, codec)
        return replace(update, adapter=file.put(update.adapter))

    answers = asking.ask_nodes(grid, "train", contents, rules.deadline_s, read)
    updates, bad = sort_answers({names[node]: answer for node, answer in answers.items()})
    return [replace(update, adapter=file.get(update.adapter)) for update in updates], bad


def read_update(
    strategy: FederatedStrategy,
    server: ServerState,
    sent: dict[str, AdapterState],
    client: str,
    reply: Message | None,
    rules: Rules,
    codec: wire.Codec,
) -> Update:
    """The update in a client's reply.

    Raises:
        BadReply: it may not be aggregated.
    """
    adapter, metrics = codec.read(reply, sent[client], strategy.uploads(server), server.round + 1)
    limit = rules.max_update_norm
    if limit is not None and (moved := adapter.distance(sent[client])) > limit:
        raise wire.BadReply(f"update norm {moved:.3g} is over run.max_update_norm={limit:g}")
    count = metrics.pop("num-examples")
    return Update(client, count if strategy.context.weighting == "examples" else 1.0, adapter, metrics)


def sort_answers(answers: dict[str, Update | wire.BadReply]) -> tuple[list[Update], dict[str, str]]:
    """Good updates and the reason for each bad one, by client name: not as replies came in, as sums must round alike in
    every run.
    """
    updates: list[Update] = []
    bad: dict[str, str] = {}
    for client in sorted(answers):
        answer = answers[client]
        if isinstance(answer, Update):
            updates.append(answer)
        else:
            bad[client] = str(answer)
    return updates, bad
