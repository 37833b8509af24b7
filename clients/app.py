"""The Flower ClientApp: unpack, train, pack. The same app runs here, in worker processes, under Ray and at a site.

    query     -> {"name"}
    train     adapter, instructions -> update, {"num-examples", "train_loss"}
    evaluate  adapter, instructions -> {"num-examples", "accuracy", "loss"} on the client's held-out records
    sums      adapter, instructions -> sums over records that a head or body of a task sequence needs

Under secure aggregation the four stages of `clients.secagg` take the place of train.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from fedpeft.clients import requests, secagg
from fedpeft.clients.local import Local
from fedpeft.state import AdapterState
from fedpeft.strategies.instructions import Instructions
from fedpeft.strategies.wire import PACKED

__all__ = ["CohortApp", "Local", "client_app"]


class CohortApp(ClientApp):
    """A ClientApp that can be shown the messages of a round before it gets them one by one, to train them together."""

    def __init__(self, prepare: Callable[[list[tuple[Message, Context]]], None]) -> None:
        super().__init__()
        self.prepare = prepare


def client_app(local: Callable[[], Local], name: Callable[[Context], str], mods: list[Mod] | None = None) -> CohortApp:
    """The ClientApp. `local` is called once a message, in the process that trains; it should not load anything then."""

    opened: dict[str, tuple[AdapterState, Instructions]] = {}  # by message id, what `prepare` has opened

    def read(message: Message) -> tuple[AdapterState, Instructions]:
        return requests.opened(message.content, local().initial)

    def request(message: Message) -> tuple[AdapterState, Instructions]:
        known = message.metadata.message_id in opened
        return opened.pop(message.metadata.message_id) if known else read(message)

    def prepare(messages: list[tuple[Message, Context]]) -> None:
        kind = secagg.UPLOAD if local().config.secagg.enabled else "train"
        mine = [(message, name(context)) for message, context in messages if message.metadata.message_type == kind]
        # Of a round before: messages that never came would keep their tensors in memory.
        opened.clear()
        known: dict[tuple[Any, ...], tuple[AdapterState, Instructions]] = {}
        for message, _ in mine:
            key = requests.identity_of(message.content)
            if key not in known:
                known[key] = read(message)
            opened[message.metadata.message_id] = known[key]
        local().prepare([(client, *opened[message.metadata.message_id]) for message, client in mine])

    app = CohortApp(prepare)

    @app.query()
    def identify(message: Message, context: Context) -> Message:
        return Message(RecordDict({"identity": ConfigRecord({"name": name(context)})}), reply_to=message)

    @app.train(mods=mods or [])
    def fit(message: Message, context: Context) -> Message:
        secagg.refuse_clear(local().config)
        received, told = request(message)
        update, metrics = local().train(name(context), received, told)
        return Message(PACKED.reply(update, metrics, told.round), reply_to=message)

    @app.evaluate()
    def score(message: Message, context: Context) -> Message:
        received, told = read(message)
        metrics = local().evaluate(name(context), received, told)
        return Message(RecordDict({"metrics": MetricRecord({**metrics})}), reply_to=message)

    @app.query("sums")
    def sums(message: Message, context: Context) -> Message:
        received, told = read(message)
        found, metrics = local().sums(name(context), received, told)
        return Message(PACKED.reply(found, metrics, told.round), reply_to=message)

    def update(context: Context, received: AdapterState, told: Instructions) -> AdapterState:
        return local().train(name(context), received, told)[0]

    secagg.register(app, lambda: local().config, name, request, update, lambda: local().store, mods or [])
    return app
