"""Clients that upload known changes under secure aggregation, and a grid that keeps what the server was told."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from flwr.app import Error, Message

from fedpeft.clients.app import client_app
from fedpeft.clients.store import Store
from fedpeft.config import Config
from fedpeft.data.split import client_name
from fedpeft.simulations.grid import LocalGrid
from fedpeft.state import AdaptedLayer, AdapterState, Rules, ServerState
from fedpeft.strategies.rules.fedit import FedIT
from fedpeft.strategies.secagg.stages import KINDS
from fedpeft.strategies.secagg.terms import make_exchange
from fedpeft.strategies.wire import PACKED

SITES = {"q": AdaptedLayer("lora", (60, 40), 2.0)}
START = AdapterState({"q/A": torch.full((16, 40), 0.25), "q/B": torch.zeros(60, 16)}, SITES)
SIZE = START.parameters


def config(clients: int = 5, **secagg) -> Config:
    made = Config()
    made.data.clients, made.strategy.weighting, made.secagg.enabled = clients, "uniform", True
    for key, value in secagg.items():
        setattr(made.secagg, key, value)
    return made


def updates(clients: int, scale: float = 0.3) -> dict[str, AdapterState]:
    """What each client trains to, from START."""
    generator = torch.Generator().manual_seed(5)
    return {
        client_name(index): START.map(lambda value: value + scale * torch.randn(value.shape, generator=generator))
        for index in range(clients)
    }


def changes(update: AdapterState) -> torch.Tensor:
    return torch.cat([(value.double() - START[key].double()).reshape(-1) for key, value in update.tensors.items()])


class Watched(LocalGrid):
    """Remembers (stage, client, request, reply) of everything; loses replies on demand.

    Args:
        dies: client -> stage in which it is gone before it handles the message.
        late: client -> stage in which it handles the message, and its reply comes too late.
        spoiled: client -> stage, and what its content then becomes.
    """

    def __init__(self, own: Config, after: dict[str, AdapterState], dies=None, late=None, spoiled=None) -> None:
        self.kept = tempfile.TemporaryDirectory()
        self.local = local = SimpleNamespace(
            config=own,
            initial=START,
            prepare=lambda requests: None,
            store=Store(Path(self.kept.name), 9),
            train=lambda client, received, task: (after[client], {"secret": 1.0}),
        )
        self.app_of = client_app(lambda: local, lambda context: client_name(int(context.node_config["partition-id"])))
        super().__init__(lambda: self.app_of, {index + 2: {"partition-id": index} for index in range(len(after))})
        self.dies, self.late, self.spoiled = dies or {}, late or {}, spoiled or {}
        self.seen: list[tuple[int, str, Message, Message]] = []

    @property
    def roster(self) -> dict[str, int]:
        return {client_name(index): node for index, node in enumerate(self.nodes)}

    def finish(self, name, outcome):
        request = self.queue[name]
        client = client_name(request.metadata.dst_node_id - 2)
        kind = request.metadata.message_type
        stage = KINDS.index(kind) if kind in KINDS else -1
        gone = self.dies.get(client, 9) <= stage
        reply = super().finish(name, "it is gone" if gone else outcome)
        self.seen.append((stage, client, request, reply))
        if self.late.get(client) == stage:
            reply = Message(Error(3, "too late"), reply_to=request)
        if self.spoiled.get(client, (9,))[0] == stage:
            reply = Message(self.spoiled[client][1](reply.content), reply_to=request)
        return reply

    def replies(self, stage: int) -> dict[str, Message]:
        return {client: reply for at, client, _, reply in self.seen if at == stage and not reply.has_error()}


def exchanged(own: Config, after: dict[str, AdapterState], number: int = 1, **faults):
    """(updates, bad, traffic) of one round, and the grid."""
    grid = Watched(own, after, **faults)
    return play(grid, own, number), grid


def play(grid: Watched, own: Config, number: int = 1, **rules):
    strategy, server = FedIT(), ServerState(START, round=number - 1)
    server, sent, contents = strategy.plan(server, grid.roster, Rules(rounds=number), PACKED)
    return make_exchange(own)(grid, grid.roster, strategy, server, sent, contents, Rules(rounds=number, **rules))
