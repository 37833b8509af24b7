"""fedpeft strategies behind Flower's own Strategy API: a stock app, and Flower's wrappers around a strategy.

A stock app sends and receives a peft state dict, an array per tensor. `start` runs our round with that codec. Flower's
wrappers (its differential-privacy ones, say) call `configure_train` and `aggregate_train` instead; between the two the
round is open, and its state lies in the strategy's `open_round`. Nodes are named by their node id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedpeft.errors import RunError
from fedpeft.state import AdapterState, Update
from fedpeft.strategies import asking, wire
from fedpeft.strategies.client import client_halves, list_layers
from fedpeft.strategies.gathering import read_update, sort_answers

if TYPE_CHECKING:
    from fedpeft.state import Rules, ServerState
    from fedpeft.strategies.base import FederatedStrategy

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]


@dataclass(frozen=True)
class OpenRound:
    """A round between `configure_train` and `aggregate_train`, and the state from one round to the next."""

    server: ServerState
    sent: dict[str, AdapterState]
    codec: wire.Named
    rules: Rules


def start(
    strategy: FederatedStrategy,
    grid: Grid,
    initial_arrays: ArrayRecord,
    num_rounds: int,
    timeout: float,
    train_config: ConfigRecord | None,
    evaluate_fn: Evaluate | None,
) -> Result:
    """Run in a stock Flower app.

    Entries of `train_config` are sent along; `seed`, `clients-per-round` and `min-available-nodes` also steer the
    choice of clients.

    Raises:
        RunError: the strategy sends more than a state dict, or the arrays are no peft LoRA.
    """
    codec, server, rules = _open_codec(strategy, initial_arrays, train_config, num_rounds, timeout)
    result = Result()

    def evaluate(server: ServerState) -> dict[str, float]:
        metrics = evaluate_fn(server.round, _arrays_of(strategy, codec, server)) if evaluate_fn else None
        if metrics is not None:
            result.evaluate_metrics_serverapp[server.round] = metrics
        return {}

    def record(event: dict[str, Any]) -> None:
        if event["event"] == "round":
            result.train_metrics_clientapp[event["round"]] = _train_metrics(event)

    evaluate(server)
    server = strategy.run(grid, server, rules, codec=codec, evaluate=evaluate, record=record)
    result.arrays = _arrays_of(strategy, codec, server)
    return result


def configure_train(
    strategy: FederatedStrategy, number: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
) -> tuple[OpenRound, list[Message]]:
    """Messages of a round. After round 1 `arrays` is what the caller made of the last aggregate (it may be noised)."""
    last = strategy.open_round
    if last is None or number == 1:
        codec, server, rules = _open_codec(strategy, arrays, config, number, None)
    else:
        codec, rules = last.codec, last.rules
        server = replace(last.server, adapter=codec.adapter(arrays, last.server.adapter))
    roster = codec.roster(grid, rules.clients)
    server, sent, contents = strategy.plan(server, roster, rules, codec)
    messages = [Message(content, node, "train") for node, content in contents.items()]
    return OpenRound(server, sent, codec, rules), messages


def aggregate_train(
    strategy: FederatedStrategy, replies: Iterable[Message]
) -> tuple[OpenRound, ArrayRecord, MetricRecord]:
    """The arrays after the round, as they would be broadcast, and the clients' mean metrics."""
    last = strategy.open_round
    if last is None:
        raise RunError("aggregate_train was called before configure_train.")
    answered: dict[str, Message | None] = dict.fromkeys(last.sent)
    # A stock app hands over whatever came: strangers are left out, and who answers twice is refused.
    for reply in replies:
        if (client := str(reply.metadata.src_node_id)) in answered:
            first = answered[client] is None
            answered[client] = reply if first else asking.refused(reply, "it answered one message twice")

    def read(client: str, reply: Message | None) -> Update:
        return read_update(strategy, last.server, last.sent, client, reply, last.rules, last.codec)

    updates, bad = sort_answers({client: asking.read_or_refuse(read, client, answered[client]) for client in answered})
    server, event = strategy.conclude(last.server, updates, bad, last.rules, lambda event: None)
    return replace(last, server=server), _arrays_of(strategy, last.codec, server), _train_metrics(event)


def _open_codec(
    strategy: FederatedStrategy, arrays: ArrayRecord, config: ConfigRecord | None, rounds: int, deadline_s: float | None
) -> tuple[wire.Named, ServerState, Rules]:
    from fedpeft.state import Rules

    if strategy.changes_base or strategy.keeps:
        raise RunError(
            f"{type(strategy).__name__} sends more than named adapter weights; a stock Flower app cannot apply it. "
            "Use fedpeft's client app."
        )
    needed = next((half.strategy for half in client_halves(strategy) if not half.alone), None)
    if needed is not None:
        raise RunError(
            f"{type(needed).__name__} needs its half at the clients, which a stock Flower app has not. Use "
            "fedpeft's client app."
        )
    rule = list_layers(strategy)[0]
    if hasattr(rule.config, "transport"):  # a stock app draws no factors from a seed
        rule.config = replace(rule.config, transport="dense")
    settings: dict[str, Any] = dict(config or {})
    codec, adapter = wire.Named.of(arrays, settings)
    rules = Rules(
        rounds=rounds,
        seed=int(settings.get("seed", 0)),
        clients=int(settings.get("min-available-nodes", 2)),
        clients_per_round=settings.get("clients-per-round"),
        deadline_s=deadline_s,
    )
    return codec, strategy.initial(adapter, rules.seed), rules


def _arrays_of(strategy: FederatedStrategy, codec: wire.Named, server: ServerState) -> ArrayRecord:
    return codec.arrays(strategy.before_round(server).adapter)


def _train_metrics(event: dict[str, Any]) -> MetricRecord:
    return MetricRecord({key: value for key, value in event.items() if key.startswith("train_")})
