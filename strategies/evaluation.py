"""Clients score their own models on their own held-out records, and the server takes the mean."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flwr.serverapp import Grid

from fedpeft.record.measured import mean_over_clients
from fedpeft.state import RoundFailed, Rules, ServerState
from fedpeft.strategies import asking, wire

if TYPE_CHECKING:
    from fedpeft.strategies.base import FederatedStrategy

log = logging.getLogger("fedpeft")


def evaluate_clients(
    strategy: FederatedStrategy,
    grid: Grid,
    server: ServerState,
    roster: dict[str, int],
    rules: Rules,
    record: Callable[[dict[str, Any]], None],
) -> dict[str, float]:
    """The clients' scores as `client_accuracy`, `client_loss`, ..., weighted by their numbers of held-out records.

    Raises:
        RoundFailed: no client answered.
    """
    told = replace(strategy.instructions(server), round=server.round)  # of the round behind, not of the next one
    sent = {client: strategy.broadcast(server, client) for client in sorted(roster)}
    contents = {roster[client]: content for client, content in wire.contents(wire.PACKED, sent, told).items()}
    scores = asking.ask_nodes(grid, "evaluate", contents, rules.deadline_s, lambda _, reply: wire.scores(reply))
    results = {}
    for client in sorted(roster):
        score = scores[roster[client]]
        if isinstance(score, wire.BadReply):
            log.warning("round %d: %s was not evaluated: %s", server.round, client, score)
            record({"event": "evaluation_failed", "round": server.round, "client": client, "reason": str(score)})
        else:
            results[client] = score
    if not results:
        raise RoundFailed(f"round {server.round}: no client could evaluate its model; the log names the reasons.")
    record({"event": "clients_evaluated", "round": server.round, "clients": results})
    means = mean_over_clients([(result, result["num-examples"]) for result in results.values()])
    return {f"client_{key}": value for key, value in means.items() if key != "num-examples"}
