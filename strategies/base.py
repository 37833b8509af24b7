"""The round, once, for every strategy; and what a strategy is.

A strategy subclasses Flower's `Strategy`, so it runs in any Flower app. A concrete one is a file that says what clients
train (`trains`), what stays with them (`keeps`), and how updates become the next global adapter (`aggregate`, pure).
Whatever it keeps between rounds is in `ServerState`, plain data, so that checkpoint and resume need no code of its own.

    >>> from fedpeft.strategies.rules.fedit import FedIT
    >>> FedIT().trains, FedIT().needs.value
    (('A', 'B', 'head'), 'sum')
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fedpeft import lowrank, seeds
from fedpeft.adapters.flat import flatten_adapter
from fedpeft.config import Configured
from fedpeft.errors import InputError, RunError
from fedpeft.state import (
    DROPPED,
    DROPS,
    FROZEN,
    AdapterState,
    Needs,
    RoundDropped,
    RoundFailed,
    Rules,
    RunContext,
    ServerState,
    Update,
)
from fedpeft.strategies import flower_api, round_facts, wire
from fedpeft.strategies.client import ClientHalf
from fedpeft.strategies.evaluation import evaluate_clients
from fedpeft.strategies.instructions import Instructions
from fedpeft.strategies.parts.frozen_factors import tell_drawn

log = logging.getLogger("fedpeft")


class FederatedStrategy(Configured, Strategy):
    """Base of all strategies. Class attributes declare; `aggregate` computes.

    Attributes:
        needs: whether the server must see individual updates.
        trains: roles that clients train.
        keeps: roles that stay with each client (personalised parts).
        adapter: registered adapter that the strategy works on.
        takes_any_adapter: whether it is right for tensors of any meaning, and so takes every adapter that `averages`.
        unequal_ranks: whether clients may have ranks below the server's.
        changes_base: whether it moves the frozen base (the exported adapter then has a higher rank).
        fixed_basis: whether coordinates of the factors mean the same from round to round; what carries per-coordinate
            state over rounds (server optimizers, control variates) needs it.
        plain_sgd: whether its client half is only right with plain SGD as the local optimizer.
        client_half: what the method does at a client beside training.
        inner: the strategy that it goes around.
        needs_start: whether the rule measures updates against what was sent, so that finished adapters can only be
            aggregated together with the adapter that they started from.
        robust: whether it bounds what single updates can do to the aggregate.
        takes_fixed_factor: whether the rule is right where nobody trains one factor of the pairs.
    """

    needs: Needs = Needs.SUM
    trains: tuple[str, ...] = ("A", "B", "head")
    keeps: tuple[str, ...] = ()
    adapter: str = "lora"
    unequal_ranks: bool = False
    changes_base: bool = False
    fixed_basis: bool = True
    plain_sgd: bool = False
    needs_start: bool = False
    wraps: ClassVar[bool] = False
    inner: FederatedStrategy | None = None
    robust: ClassVar[bool] = False
    takes_fixed_factor: ClassVar[bool] = False
    takes_any_adapter: ClassVar[bool] = False
    client_half: ClassVar[type[ClientHalf]] = ClientHalf
    context = RunContext()  # likewise, of a subclass that does not call `__init__`

    def __init__(self, *, context: RunContext = RunContext(), **options: Any) -> None:
        super().__init__(**options)
        self.context = context
        if self.takes_any_adapter and context.averages:
            self.adapter, self.keeps = context.adapter, (*self.keeps, *context.keeps)
            self.trains = (*context.averages, *context.keeps, "head")

    # What a strategy defines ---------------------------------------------------------------------------------------

    def initial(self, adapter: AdapterState, seed: int) -> ServerState:
        """The state before round 1, with the products of this adapter (`adapter.start`'s or a fresh one: B zero)."""
        return ServerState(adapter)

    def before_round(self, server: ServerState) -> ServerState:
        """Change of representation before a broadcast (FedSVD's refactorisation); what is computed stays the same."""
        return server

    def trained(self, server: ServerState) -> tuple[str, ...]:
        """Roles trained in the round about to start."""
        return self.trains

    def broadcast(self, server: ServerState, client: str) -> AdapterState:
        """What this client receives. Trained roles that it does not keep must be among them."""
        return server.adapter.without((*self.keeps, FROZEN)).beside(self.extra(server))

    def extra(self, server: ServerState) -> dict[str, Tensor]:
        """What the method itself sends beside the adapter; clients send back tensors of the same names and shapes."""
        return {}

    def uploads(self, server: ServerState) -> tuple[str, ...]:
        """Roles sent back: what is trained and not kept."""
        return tuple(role for role in self.trained(server) if role not in self.keeps)

    def choose(self, names: list[str], rules: Rules, number: int) -> list[str]:
        """The clients of round `number`, sorted."""
        return choose_clients(names, rules, number)

    def instructions(self, server: ServerState) -> Instructions:
        """What clients are told beside tensors of the round about to start."""
        static = tell_drawn(server.adapter, (FROZEN,)) if server.adapter.select((FROZEN,)).tensors else None
        return Instructions(server.round + 1, self.trained(server), self.uploads(server), self.keeps, static)

    def facts(self, server: ServerState, sent: dict[str, AdapterState], updates: list[Update]) -> dict[str, Any]:
        """What the round's event says of single updates."""
        return round_facts.of_single(sent, updates, list(self.uploads(server)))

    def require_clients(self, count: int) -> None:
        """Raise InputError if it needs more updates than a round of this many clients has."""

    def treatments(self) -> dict[str, str]:
        """Clients that the last `aggregate` cut, clipped or left out, and how; for the record alone."""
        return {}

    def aggregate(self, server: ServerState, updates: list[Update]) -> ServerState:
        """The next state from checked updates, sorted by client name. Pure."""
        return server.with_tensors(self.average(same_scale(server, updates), self.uploads(server)))

    def offline(self, server: ServerState, updates: list[Update]) -> tuple[AdapterState, list[str]]:
        """One aggregation of finished adapters, and notes for the user; what is added to the base goes into factors."""
        return flatten_adapter(self.aggregate(server, updates).adapter), []

    @staticmethod
    def average(updates: list[Update], roles: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Weighted mean of every uploaded tensor (of these roles), in float64."""
        weights = [update.weight for update in updates]
        first = updates[0].adapter
        keys = first.tensors if roles is None else first.select(roles).tensors
        return {key: lowrank.mean([update.adapter[key] for update in updates], weights) for key in keys}

    @staticmethod
    def average_extra(updates: list[Update], names: Iterable[str]) -> dict[str, Tensor]:
        """Weighted mean of what clients sent under these names beside their updates, in float64."""
        weights = [update.weight for update in updates]
        return {name: lowrank.mean([update.adapter.extra[name] for update in updates], weights) for name in names}

    # The round -----------------------------------------------------------------------------------------------------

    def run(
        self,
        grid: Grid,
        server: ServerState,
        rules: Rules,
        *,
        stop: int | None = None,
        codec: wire.Codec = wire.PACKED,
        evaluate: Callable[[ServerState], dict[str, Any]] | None = None,
        record: Callable[[dict[str, Any]], None] = lambda event: None,
        after_round: Callable[[ServerState], None] = lambda server: None,
    ) -> ServerState:
        """Run rounds from `server.round` + 1 to `rules.rounds`.

        Args:
            stop: the round to return after, where others will run those that are left.
            codec: how states become messages; a stock Flower app speaks another than ours.
            evaluate: metrics of the global model; called every `rules.evaluate_every` rounds and after the last.
            record: receives one JSON-ready event at a time.
            after_round: receives the state of every complete round (checkpoints).

        Raises:
            RoundFailed: fewer than quorum x asked good replies.
            RunError: too few clients joined, or one round after another was dropped.
        """
        roster, warned = codec.roster(grid, rules.clients), set[str]()
        while server.round < (stop or rules.rounds):
            number, begun = server.round + 1, time.monotonic()
            try:
                server, event = self.attempt(grid, server, roster, rules, codec, record, warned)
            except RoundDropped as error:
                server = self.drop(server, error, record)
                after_round(server)  # also this is checkpointed: clients may have answered under its number
                continue
            # 8. Evaluate, record, checkpoint.
            if number % rules.evaluate_every == 0 or number == rules.rounds:
                if rules.evaluate_clients:
                    event |= evaluate_clients(self, grid, server, roster, rules, record)
                if evaluate is not None:
                    event |= evaluate(server)
            record({**event, "seconds": round(time.monotonic() - begun, 3)})
            after_round(server)
        return server

    def attempt(
        self,
        grid: Grid,
        server: ServerState,
        roster: dict[str, int],
        rules: Rules,
        codec: wire.Codec,
        record: Callable[[dict[str, Any]], None],
        warned: set[str],
    ) -> tuple[ServerState, dict[str, Any]]:
        """One round, but for its evaluation: the state after it and its event.

        Raises:
            RoundFailed, RoundDropped: it has no result.
        """
        # 1. Choose clients, by stable name.  2. Plan what each receives and trains.
        number = server.round + 1
        server, sent, contents = self.plan(server, roster, rules, codec)
        # 3. Send.  4. Wait until all answered, or the deadline.
        # 5. Check every reply; the bad ones are left out.
        if rules.secagg is None:
            updates, bad = wire.gather_updates(self, grid, server, roster, sent, contents, rules, codec)
            traffic = wire.traffic(sent, [update.adapter for update in updates])
        else:
            updates, bad, traffic = rules.secagg(grid, roster, self, server, sent, contents, rules)
        # 6. Aggregate.  7. The new strategy state.
        facts = self.facts(server, sent, updates) if rules.secagg is None else {}
        try:
            server, event = self.conclude(server, updates, bad, rules, record)
        except RoundFailed as error:
            if rules.secagg is None:
                raise
            raise RoundDropped(str(error)) from error  # the sum is known: the same number again would tell differences
        return server, {
            **event,
            "clients": [client for client in sorted(sent) if client not in bad],
            **traffic,
            **round_facts.told(number, facts, self.treatments(), warned),
        }

    def drop(self, server: ServerState, error: RoundDropped, record: Callable[[dict[str, Any]], None]) -> ServerState:
        """The state before the round, under its number; recorded.

        Raises:
            RunError: it is the third in a row.
        """
        number, dropped = server.round + 1, server.numbers.get(DROPPED, 0) + 1
        record({"event": "round_dropped", "round": number, "reason": str(error)})
        log.warning("round %d is dropped: %s", number, error)
        if dropped == DROPS:
            raise RunError(f"{error} {DROPS} rounds in a row were dropped, so the run stops.") from error
        return replace(server, round=number, numbers={**server.numbers, DROPPED: dropped})

    def plan(
        self, server: ServerState, roster: dict[str, int], rules: Rules, codec: wire.Codec
    ) -> tuple[ServerState, dict[str, AdapterState], dict[int, RecordDict]]:
        """The state as broadcast, what each chosen client gets, and the message contents by node."""
        chosen = self.choose(sorted(roster), rules, server.round + 1)
        server = self.before_round(server)  # not checkpointed: a round that is done again begins in the old form
        sent = {client: self.broadcast(server, client) for client in chosen}
        told = self.instructions(server)  # the same for all: who is asked does not show in it
        return server, sent, {roster[client]: content for client, content in wire.contents(codec, sent, told).items()}

    def conclude(
        self,
        server: ServerState,
        updates: list[Update],
        bad: dict[str, str],
        rules: Rules,
        record: Callable[[dict[str, Any]], None],
    ) -> tuple[ServerState, dict[str, Any]]:
        """The state after the round and its event; quarantined clients are recorded on the way.

        Raises:
            RoundFailed: too few good replies, or they cannot be aggregated.
        """
        number = server.round + 1
        good = sum(update.count for update in updates)
        for client, reason in bad.items():
            log.warning("round %d: %s quarantined: %s", number, client, reason)
            record({"event": "quarantine", "round": number, "client": client, "reason": reason})
        asked = good + len(bad)
        needed = math.ceil(rules.quorum * asked)
        if good < needed:
            reasons = "; ".join(f"{client}: {reason}" for client, reason in bad.items())
            raise RoundFailed(
                f"round {number}: {good} good replies of {asked}, but run.quorum={rules.quorum} needs "
                f"{needed}. {reasons}"
            )
        try:
            after = self.aggregate(server, updates)
            numbers = {key: value for key, value in after.numbers.items() if key != DROPPED}
            server = replace(after, round=number, numbers=numbers)
        except InputError as error:
            raise RoundFailed(f"round {number}: {error}") from error
        broken = [key for key, value in server.adapter.tensors.items() if not torch.isfinite(value).all()]
        if broken:  # before a checkpoint could keep it and end every resume
            raise RoundFailed(
                f"round {number}: the aggregate has NaN or inf in {broken[0]}, though every update was finite. "
                "Bound updates with run.max_update_norm or a robust wrapper, or lower client.lr."
            )
        return server, {
            "event": "round",
            "round": number,
            "quarantined": bad,
            **round_facts.mean_metrics(updates),
        }

    # Flower's Strategy API (see flower_api.py) ---------------------------------------------------------------------

    open_round: flower_api.OpenRound | None = None

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        return flower_api.start(self, grid, initial_arrays, num_rounds, timeout, train_config, evaluate_fn)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.open_round, messages = flower_api.configure_train(self, server_round, arrays, config, grid)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self.open_round, arrays, metrics = flower_api.aggregate_train(self, replies)
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return None

    def summary(self) -> None:
        log.info("%s: clients train %s, needs %s", type(self).__name__, ", ".join(self.trains), self.needs.value)


def same_scale(server: ServerState, updates: list[Update]) -> list[Update]:
    """Updates that all use the server's scaling s: where client k's is s_k, s_k / s goes on its R, else B, else A."""
    return [_rescale_update(server.adapter, update) for update in updates]


def _rescale_update(like: AdapterState, update: Update) -> Update:
    tensors = dict(update.adapter.tensors)
    for site in like.lora_sites():
        ratio = update.adapter.sites[site].scaling / like.sites[site].scaling
        key = next((f"{site}/{role}" for role in ("R", "B", "A") if f"{site}/{role}" in tensors), None)
        if key is not None and ratio != 1:  # on one factor: on both it would count twice
            tensors[key] = tensors[key].double() * ratio
    return replace(update, adapter=replace(update.adapter, tensors=tensors, sites=like.sites))


def choose_clients(names: list[str], rules: Rules, number: int) -> list[str]:
    """The clients of a round: a seeded draw without replacement that does not depend on the order or ids of nodes."""
    count = min(rules.clients_per_round or len(names), len(names))
    order = seeds.numpy_generator(rules.seed, "round", number, "choose").permutation(len(names))
    return sorted(names[index] for index in order[:count])
