"""fedpeft strategies behind Flower's own Strategy API: a stock app, and Flower's wrappers around a strategy.

A stock app sends and receives a peft state dict, an array per tensor. `start` runs our round with that codec. Flower's
wrappers (its differential-privacy ones, say) call `configure_train` and `aggregate_train` instead; between the two the
round is open, and its state lies in the strategy's `open_round`. Nodes are named by their node id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedpeft.errors import RunError
from fedpeft.state import AdaptedLayer, AdapterState, Update
from fedpeft.strategies import asking, opening, wire
from fedpeft.strategies.client import client_halves, list_layers
from fedpeft.strategies.instructions import Instructions
from fedpeft.strategies.opening import blame_message

if TYPE_CHECKING:
    from fedpeft.state import Rules, ServerState
    from fedpeft.strategies.base import FederatedStrategy

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]


@dataclass(frozen=True)
class Named:
    """A stock Flower app: an array per tensor under peft's names; nodes are named by their id.

    A reply may hold frozen tensors too, if they came back as they were sent.
    """

    names: dict[str, str]
    config: dict[str, Any]

    @classmethod
    def of(cls, arrays: ArrayRecord, config: dict[str, Any]) -> tuple[Named, AdapterState]:
        """The codec and the adapter of a peft state dict. What is not a LoRA factor is taken as head.

        Raises:
            RunError: there is no LoRA factor in it, or a factor misses its partner.
        """
        names, tensors, sites = {}, {}, {}
        for name, array in arrays.items():
            site, role = named_site(name)
            names[f"{site}/{role}"] = name
            tensors[f"{site}/{role}"] = torch.from_numpy(array.numpy())
        for key in tensors:
            site, _, role = key.rpartition("/")
            if role in ("A", "B"):
                if f"{site}/A" not in tensors or f"{site}/B" not in tensors:
                    raise RunError(
                        f"initial_arrays: {names[key]} has no partner; both LoRA factors of a module are needed."
                    )
                sites[site] = AdaptedLayer("lora", (tensors[f"{site}/B"].shape[0], tensors[f"{site}/A"].shape[1]))
            else:
                sites[site] = AdaptedLayer("head")
        if not any(site.kind == "lora" for site in sites.values()):
            raise RunError(f"initial_arrays: no lora_A / lora_B weights among {', '.join(list(names.values())[:3])}...")
        return cls(names, config), AdapterState(tensors, sites)

    def adapter(self, arrays: ArrayRecord, like: AdapterState) -> AdapterState:
        """The inverse of `arrays`."""
        tensors = {key: torch.from_numpy(arrays[name].numpy()) for key, name in self.names.items()}
        return AdapterState(tensors, like.sites)

    def arrays(self, adapter: AdapterState) -> ArrayRecord:
        """The adapter's tensors under the names that the client app knows."""
        return ArrayRecord({name: Array(adapter[key].numpy()) for key, name in self.names.items()})

    def roster(self, grid: Grid, expected: int | None) -> dict[str, int]:
        return {str(node): node for node in wire.joined(grid, expected)}

    def content(self, adapter: AdapterState, told: Instructions) -> RecordDict:
        config = {**self.config, "server-round": told.round, "trains": list(told.trains)}
        return RecordDict({"arrays": self.arrays(adapter), "config": ConfigRecord(config)})

    def read(
        self, reply: Message | None, sent: AdapterState, uploads: tuple[str, ...], number: int
    ) -> tuple[AdapterState, dict[str, float]]:
        content = wire.opened(reply)
        values = wire.metrics(content, strict=False)
        keys = {name: key for key, name in self.names.items()}
        found = [item for record in content.array_records.values() for item in record.items()]
        tensors: dict[str, torch.Tensor] = {}
        for name, array in found:
            if name not in keys:
                raise wire.BadReply(f"unexpected array {name}")
            if keys[name] in tensors:
                raise wire.BadReply(f"array {name} comes twice")
            like = sent[keys[name]].numpy()
            with blame_message(f"array {name}", wire.BadReply):
                given = opening.array(array, str(like.dtype), like.shape, f"array {name}")
            # A view of the message's bytes may not be written to; torch wants memory that may.
            tensors[keys[name]] = torch.from_numpy(given.copy())
        wanted = sent.select(uploads)
        for key, value in tensors.items():
            if key not in wanted and not torch.equal(value, sent[key]):
                raise wire.BadReply(
                    f"{self.names[key]} was trained, but clients train only {', '.join(uploads)} in this round"
                )
        trained = {key: value for key, value in tensors.items() if key in wanted}
        return wire.checked(AdapterState(trained, sent.sites), wanted), values


@dataclass(frozen=True)
class OpenRound:
    """A round between `configure_train` and `aggregate_train`, and the state from one round to the next."""

    server: ServerState
    sent: dict[str, AdapterState]
    codec: Named
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
        return wire.read_update(strategy, last.server, last.sent, client, reply, last.rules, last.codec)

    answers = {client: asking.read_or_refuse(read, client, reply) for client, reply in answered.items()}
    updates, bad = wire.sort_answers(answers)
    server, event = strategy.conclude(last.server, updates, bad, last.rules, lambda event: None)
    return replace(last, server=server), _arrays_of(strategy, last.codec, server), _train_metrics(event)


def _open_codec(
    strategy: FederatedStrategy, arrays: ArrayRecord, config: ConfigRecord | None, rounds: int, deadline_s: float | None
) -> tuple[Named, ServerState, Rules]:
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
    codec, adapter = Named.of(arrays, settings)
    rules = Rules(
        rounds=rounds,
        seed=int(settings.get("seed", 0)),
        clients=int(settings.get("min-available-nodes", 2)),
        clients_per_round=settings.get("clients-per-round"),
        deadline_s=deadline_s,
    )
    return codec, strategy.initial(adapter, rules.seed), rules


def _arrays_of(strategy: FederatedStrategy, codec: Named, server: ServerState) -> ArrayRecord:
    return codec.arrays(strategy.before_round(server).adapter)


def _train_metrics(event: dict[str, Any]) -> MetricRecord:
    return MetricRecord({key: value for key, value in event.items() if key.startswith("train_")})


def named_site(name: str) -> tuple[str, str]:
    """Site and role of a peft parameter name.

    >>> named_site("base_model.model.vit.q_proj.lora_A.default.weight")
    ('vit.q_proj', 'A')
    """
    parts = [
        part for part in name.removeprefix("base_model.model.").split(".") if part not in ("default", "modules_to_save")
    ]
    if len(parts) > 2 and parts[-2] in ("lora_A", "lora_B"):
        return ".".join(parts[:-2]), parts[-2][-1]
    return ".".join(parts[:-1]), parts[-1]
