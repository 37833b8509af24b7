"""Clients that follow a script, and a Flower grid of them, for tests of the round."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace

import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedpeft.state import AdaptedLayer, AdapterState, Rules, ServerState
from fedpeft.strategies.base import FederatedStrategy
from fedpeft.strategies.rules.fedit import FedIT
from fedpeft.strategies.wire import PACKED

SITES = {"q": AdaptedLayer("lora", (3, 4), 2.0)}
START = AdapterState({"q/A": torch.ones(2, 4), "q/B": torch.zeros(3, 2)}, SITES)

Reply = Callable[[Message], "RecordDict | Error | None"]


class ScriptedGrid(Grid):
    """Nodes that answer at once with what `clients[name](message)` gives; None never answers.

    Remembers what was sent to each (`sent`: client name -> messages but for queries).
    """

    def __init__(self, clients: dict[str, Reply], nodes: dict[str, int] | None = None) -> None:
        self.clients = clients
        self.nodes = nodes or {name: 100 + index for index, name in enumerate(clients)}
        self.names = {node: name for name, node in self.nodes.items()}
        self.sent: dict[str, list[Message]] = {name: [] for name in clients}
        self.replies: dict[str, Message] = {}
        self.count = 0

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes.values())

    def get_nodes(self):
        return [SimpleNamespace(node_id=node) for node in self.nodes.values()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._push(message) for message in messages]

    @property
    def rounds(self) -> dict[int, list[str]]:
        """Names of the clients asked to train, by round."""
        asked: dict[int, list[str]] = {}
        for name in sorted(self.sent):
            for message in self.sent[name]:
                asked.setdefault(PACKED.open(message.content)[1].round, []).append(name)
        return asked

    def _push(self, message: Message) -> str:
        self.count += 1
        message.metadata.__dict__["_message_id"] = number = f"message-{self.count}"
        name = self.names[message.metadata.dst_node_id]
        if message.metadata.message_type == "query":
            answer = RecordDict({"identity": ConfigRecord({"name": name})})
        else:
            self.sent[name].append(message)
            answer = self.clients[name](message)
        if answer is not None:
            self.replies[number] = Message(answer, reply_to=message)
        return number

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(number) for number in message_ids if number in self.replies]

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        raise NotImplementedError

    def set_run(self, run) -> None:
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError


def good(step: float, count: float = 10, **metrics: float) -> Reply:
    """A client that adds `step` to every tensor that it uploads."""

    def reply(message: Message) -> RecordDict:
        adapter, task = PACKED.open(message.content)
        trained = adapter.select(task.uploads).map(lambda value: value + step)
        return PACKED.reply(trained, {"num-examples": count, **metrics}, task.round)

    return reply


def spoiled(change: Callable[[AdapterState], AdapterState], **overrides) -> Reply:
    """A client whose otherwise good upload is passed through `change`."""

    def reply(message: Message) -> RecordDict:
        adapter, task = PACKED.open(message.content)
        upload = change(adapter.select(task.uploads).map(lambda value: value + 1.0))
        return PACKED.reply(
            upload, overrides.get("metrics", {"num-examples": 10.0}), overrides.get("round", task.round)
        )

    return reply


def raw(**records) -> Reply:
    """A client that answers with exactly these records."""
    return lambda message: RecordDict(records)


def with_value(value: float) -> Callable[[AdapterState], AdapterState]:
    def change(adapter: AdapterState) -> AdapterState:
        spoiled_tensor = adapter["q/B"].clone()
        spoiled_tensor[1, 1] = value
        return adapter.replace({"q/B": spoiled_tensor})

    return change


def run(clients: dict[str, Reply], strategy: FederatedStrategy | None = None, *, start: AdapterState = START, **rules):
    """Final state, events and grid of a run over scripted clients."""
    grid, events = ScriptedGrid(clients), []
    rules = Rules(**{"rounds": 1, "clients": len(clients), **rules})
    server = (strategy or FedIT()).run(grid, ServerState(start), rules, record=events.append)
    return server, events, grid
