"""Secure aggregation: the server learns the sum of the clients' updates and none of them alone (SecAgg+).

Bonawitz et al., CCS 2017 (ePrint 2017/281): every pair of clients adds a mask that cancels in the sum, every client one
of its own, and shares of both secrets lie with others, so that the masks of clients that drop out can be removed. Bell
et al., CCS 2020 (ePrint 2020/704): a client shares masks with k neighbours only, on a random graph.

    y_i = q_i + PRG(b_i) + sum_{j in N(i), i < j} PRG(s_ij) - sum_{j in N(i), i > j} PRG(s_ij)   (mod 2^32)

q_i is the change of what the client uploads in fixed point (`masking` has the arithmetic and the error bound), b_i its
own seed, s_ij the key that i and j agree on. `secagg_stages` has the four stages of a round. The strategy gets one
update, the plain mean over the clients that uploaded: it may need sums only, and weights are uniform.

Two sums that differ in one client tell its update by subtraction. So a client gives shares for one set of clients for
one start state and round (`clients.secagg`). A round that failed under its masks begins anew with others, and what was
sent before stays hidden. One that failed when masks may have been removed is dropped: the next one has a new number,
and with it fresh batches. One client can upload anything: a sum outside of what the clips of all allow drops the round;
within it, it can shift a coordinate of the sum by up to (n - 1) clip and nobody sees it.

Deviations: keys are not signed, so this holds against a server that follows the protocol and tries to learn more, not
against one that invents clients. The graph is a circle in random order, drawn by the operating system's generator. The
threshold must be a majority of those who hold shares, so that two groups that are told different things about who
dropped out cannot both reach it.

    >>> from fedpeft.config import Config, DataConfig
    >>> plan = Terms.of(Config(data=DataConfig(clients=10)))
    >>> plan.neighbours, plan.threshold
    (9, 6)
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedpeft import registry
from fedpeft.config import Config
from fedpeft.errors import InputError, RunError
from fedpeft.state import AdapterState, Exchange, Needs, Rules, ServerState, StillMasked, Update
from fedpeft.strategies.base import FederatedStrategy
from fedpeft.strategies.build import build
from fedpeft.strategies.secagg import masking
from fedpeft.strategies.secagg.stages import Stages
from fedpeft.strategies.wrappers.wrapper import Wrapper, name_of

log = logging.getLogger("fedpeft")


@dataclass(frozen=True)
class Terms:
    """What server and clients take from the config, each from its own: who shares with how many, and the fixed point.

    Attributes:
        clients: asked in a round.
        neighbours: of each client, itself not counted.
        threshold: how many of a client and its neighbours must be there for shares to give a secret.
        fewest: how many of them must be there in every stage.
    """

    clients: int
    neighbours: int
    threshold: int
    fewest: int
    clip: float
    bits: int

    @classmethod
    def of(cls, config: Config) -> Terms:
        """The plan of a config; `min_clients` has no effect below the threshold."""
        own, clients = config.secagg, config.run.clients_per_round or config.data.count
        neighbours = clients - 1 if own.neighbours is None else own.neighbours
        threshold = math.ceil(own.threshold * (neighbours + 1) - 1e-9)  # 0.55 * 100 is a little over 55
        return cls(clients, neighbours, threshold, max(threshold, own.min_clients or 0), own.clip, own.bits)


def check(config: Config) -> None:
    """Refuse what secure aggregation cannot do or cannot keep secret, before anything is loaded."""
    if not config.secagg.enabled:
        return
    _check_strategy(config)
    if config.run.clients_per_round is None and config.data.clients is None:
        return  # checked again once the data have said how many there are
    own, plan = config.secagg, Terms.of(config)
    if plan.clients < 3:
        raise InputError(
            f"secagg.enabled=true with {plan.clients} clients a round: with fewer than 3 the sum tells a "
            "client the other's update. Raise data.clients or run.clients_per_round."
        )
    if plan.neighbours > plan.clients - 1 or (plan.neighbours % 2 and plan.neighbours < plan.clients - 1):
        raise InputError(
            f"secagg.neighbours={own.neighbours}: must be even and at most {plan.clients - 1}, as a round "
            f"has {plan.clients} clients; or null for all others."
        )
    if plan.threshold < 2 or 2 * plan.threshold <= plan.neighbours + 1:
        raise InputError(
            f"secagg.threshold={own.threshold:g} of a client and its {plan.neighbours} neighbours is "
            f"{plan.threshold}; at least {(plan.neighbours + 1) // 2 + 1} must be needed, so that no two "
            "groups can unmask apart. Raise secagg.threshold."
        )
    if plan.fewest > plan.neighbours + 1:
        raise InputError(
            f"secagg.min_clients={own.min_clients}: a client sees itself and its {plan.neighbours} "
            f"neighbours only. Allowed are at most {plan.neighbours + 1}."
        )
    most = masking.max_bits(plan.clients)
    if plan.bits > most:
        raise InputError(
            f"secagg.bits={plan.bits}: the sum of {plan.clients} clients a round could overflow 32 bits. "
            f"Allowed are at most {most}; set secagg.bits={most} or ask fewer clients a round."
        )


def _check_strategy(config: Config) -> None:
    if config.privacy.unit == "client":
        raise InputError(
            "privacy.unit=client: the server must clip each client's update, which secagg.enabled=true "
            "hides. Set secagg.enabled=false, or privacy.unit=sample."
        )
    layer: FederatedStrategy | None = build(config)
    while layer is not None:
        if type(layer).needs is Needs.INDIVIDUAL:
            wrapping = type(layer).wraps
            key = f"strategy.wrap: {name_of(layer)}" if wrapping else f"strategy.name={name_of(layer)}"
            able = [
                name
                for name in registry.names("strategies")
                if (cls := registry.load("strategies", name)).needs is Needs.SUM and cls.wraps == wrapping
            ]
            raise InputError(
                f"{key} must see each client's update, which secagg.enabled=true hides. "
                f"{'Wrappers' if wrapping else 'Strategies'} that need sums only: {', '.join(able)}."
            )
        layer = layer.inner if isinstance(layer, Wrapper) else None
    if config.strategy.weighting != "uniform":
        raise InputError(
            f"strategy.weighting={config.strategy.weighting}: secure aggregation gives the plain sum of "
            "the updates. Set strategy.weighting=uniform."
        )
    if config.run.max_update_norm is not None:
        raise InputError(
            f"run.max_update_norm={config.run.max_update_norm:g}: under secagg.enabled=true the server "
            "sees no single update to measure. Set run.max_update_norm=null; secagg.clip bounds updates."
        )
    if unequal := config.unequal_ranks:
        raise InputError(f"{unequal}: updates of unequal ranks cannot be summed. Set {unequal.partition('=')[0]}=null.")


def describe(config: Config) -> str:
    """What each party sees under secure aggregation, and what that rests on; for the summary of a run."""
    plan = Terms.of(config)
    text = (
        f"Secure aggregation: the server sees only sums of at least {plan.fewest} clients' updates, and who "
        "took part, if it follows the protocol: keys are not signed, so a server that invents clients can unmask "
        "the others. Clients that collude with it can take their own updates out of the sum"
    )
    text += (
        f", and {plan.threshold} of a client's {plan.neighbours} neighbours can unmask that client."
        if plan.threshold <= plan.neighbours
        else "."
    )
    if config.privacy.unit == "sample":
        text += " Epsilon is each client's own local guarantee; the sum does not make it smaller."
    if config.data.holdout > 0:
        text += " Scores of evaluation on the clients go to the server one by one."
    return text


def make_exchange(config: Config) -> Exchange | None:
    """The exchange of a round, for `Rules.secagg`; None when the config does not ask for secure aggregation."""
    return SecAgg(Terms.of(config)) if config.secagg.enabled else None


@dataclass(frozen=True)
class SecAgg:
    """The exchange of every round under one plan."""

    plan: Terms

    def __call__(
        self,
        grid: Grid,
        roster: dict[str, int],
        strategy: FederatedStrategy,
        server: ServerState,
        sent: dict[str, AdapterState],
        contents: dict[int, RecordDict],
        rules: Rules,
    ) -> tuple[list[Update], dict[str, str], dict[str, Any]]:
        """One round: a single update, the reason for each client that is not in it, and the traffic.

        Raises:
            RoundFailed: too few clients were left in a stage; names the stage and every client's reason. RoundDropped
                once updates may have been sent, and where the sum is outside of what the clip allows.
            RunError: more clients than planned, or they are not all sent the same.
        """
        plan, clients = self.plan, sorted(sent)
        if len(clients) > plan.clients:
            raise RunError(f"secure aggregation is planned for {plan.clients} clients a round, not {len(clients)}.")
        start = zero_reference(sent[clients[0]], strategy.uploads(server))
        for client in clients:
            if any(not torch.equal(value, sent[client][key]) for key, value in start.tensors.items()):
                raise RunError(f"{client} is sent other values than {clients[0]}: their changes have no common start.")
        nodes, size = {client: roster[client] for client in clients}, sum(value.numel() for value in start.payload)
        for left in reversed(range(1 + rules.again)):
            stages = Stages(grid, nodes, plan, server.round + 1, rules)
            try:
                total, uploaded = stages.run({client: contents[node] for client, node in nodes.items()}, size)
                break
            except StillMasked as error:
                if not left:
                    raise
                log.warning("%s It begins anew, with new masks.", error)
        try:
            mean = masking.dequantise(total, len(uploaded), plan.clip, plan.bits)
        except ValueError as error:
            raise stages.failed(3, f"an upload was damaged or made up: {error}") from error
        # No metrics: each client's would tell of it alone.
        update = Update("secure sum", 1.0, _move_start(start, mean), {}, count=len(uploaded))
        return [update], stages.without_upload(uploaded), stages.report(uploaded)


def zero_reference(adapter: AdapterState, roles: tuple[str, ...]) -> AdapterState:
    """What an upload of these roles is a change of: the values sent; zero for what travels beside, summed as it is."""
    chosen = adapter.select(roles)
    return replace(chosen, extra={name: torch.zeros_like(value) for name, value in chosen.extra.items()})


def _move_start(start: AdapterState, mean: masking.Floats) -> AdapterState:
    """`start` plus a flat vector of changes, in float64."""
    parts = np.split(mean, np.cumsum([value.numel() for value in start.payload])[:-1])
    moved = [
        value.cpu().double() + torch.from_numpy(part).reshape(value.shape)
        for value, part in zip(start.payload, parts, strict=True)
    ]
    tensors, extra = moved[: len(start.tensors)], moved[len(start.tensors) :]
    return replace(
        start, tensors=dict(zip(start.tensors, tensors, strict=True)), extra=dict(zip(start.extra, extra, strict=True))
    )
