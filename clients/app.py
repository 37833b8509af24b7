"""The Flower ClientApp: unpack, train, pack. The same app runs here, in worker processes, under Ray and at a site.

    query     -> {"name"}
    train     adapter, instructions -> update, {"num-examples", "train_loss"}
    evaluate  adapter, instructions -> {"num-examples", "accuracy", "loss"} on the client's held-out records
    sums      adapter, instructions -> sums over records that a head or body of a task sequence needs

Under secure aggregation the four stages of `clients.secagg` take the place of train. How large a message may be follows
from the client's own model, and is looked at before anything in it is decoded; what its tensors and its instructions
mean is checked where they are used (`clients.asked`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.app import Array, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from fedpeft.clients import secagg
from fedpeft.clients.local import Local
from fedpeft.clients.policy import Refused
from fedpeft.foreign import BadMessage, shown
from fedpeft.packing import manifest_of
from fedpeft.state import AdapterState
from fedpeft.strategies import opening
from fedpeft.strategies.instructions import Instructions
from fedpeft.strategies.wire import PACKED

__all__ = ["CohortApp", "Local", "client_app"]

Received = tuple[AdapterState, Instructions]

MANIFESTS, STATES = 8, 4  # times its own that a client takes: controls, cores and residuals come with the adapter
PREFIX = 40  # characters that a strategy puts before or after a tensor's name: control:, rates:, residual_B
SMALL = 2**20  # bytes that are taken whatever the model
BESIDE = ("secagg", "fedpeft.run")  # records that a message may have, which are read elsewhere


class CohortApp(ClientApp):
    """A ClientApp that can be shown the messages of a round before it gets them one by one, to train them together."""

    def __init__(self, prepare: Callable[[list[tuple[Message, Context]]], None]) -> None:
        super().__init__()
        self.prepare = prepare


def client_app(local: Callable[[], Local], name: Callable[[Context], str], mods: list[Mod] | None = None) -> CohortApp:
    """The ClientApp. `local` is called once a message, in the process that trains; it should not load anything then."""

    opened: dict[str, Received] = {}  # by message id, what `prepare` has opened

    def read(message: Message) -> Received:
        return open_request(message.content, local().initial)

    def request(message: Message) -> Received:
        known = message.metadata.message_id in opened
        return opened.pop(message.metadata.message_id) if known else read(message)

    def prepare(messages: list[tuple[Message, Context]]) -> None:
        kind = secagg.UPLOAD if local().config.secagg.enabled else "train"
        mine = [(message, name(context)) for message, context in messages if message.metadata.message_type == kind]
        # Of a round before: messages that never came would keep their tensors in memory.
        opened.clear()
        known: dict[tuple[Any, ...], Received] = {}
        for message, _ in mine:
            key = identity_of(message.content)
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


def open_request(content: RecordDict, own: AdapterState) -> Received:
    """Adapter and instructions of a request.

    Args:
        own: an adapter of the client's own model.

    Raises:
        Refused: it is malformed, or larger than the client's model can need; one sentence of at most 2 kB.
    """
    most = most_bytes(own)
    longest = max(map(len, own.tensors), default=0) + PREFIX

    def check(form: AdapterState) -> None:
        if form.nbytes > most:
            raise BadMessage(f"{form.nbytes} bytes of tensors; this client's model takes at most {most}")
        for name in (*form.tensors, *form.extra):
            if not name.isprintable() or len(name) > longest:
                raise BadMessage(f"{shown(name, 200)} is no name of a tensor of this client's model")
        for name, site in form.sites.items():
            mine = own.sites.get(name)
            if mine is None or (mine.kind, mine.shape) != (site.kind, site.shape):
                raise BadMessage(
                    f"site {shown(name, 200)} of kind {shown(site.kind, 60)} and shape "
                    f"{list(site.shape)} is not one of this client's model"
                )

    try:
        with opening.blame_message("message"):
            return opening.packed(content, MANIFESTS * len(manifest_of(own)) + SMALL, check, BESIDE)
    except BadMessage as error:
        raise Refused(f"refused: the server's message: {error}") from error


def identity_of(content: RecordDict) -> tuple[Any, ...]:
    """Equal for messages that are all there, and hold the same texts and arrays of the very same bytes."""

    def of(value: Any) -> Any:
        if isinstance(value, Array):
            return value.dtype, tuple(value.shape), value.stype, id(value.data)
        return value if isinstance(value, str) else id(value)

    return tuple((name, key, of(value)) for name, record in content.items() for key, value in record.items())


def most_bytes(own: AdapterState) -> int:
    """Bytes of the largest state that a strategy may send: beside adapters, dense changes of the base as factors."""
    dense = sum(
        8 * (rows + columns) * min(rows, columns)
        for rows, columns in (site.shape for site in own.sites.values() if len(site.shape) == 2)
    )
    return STATES * own.nbytes + dense + SMALL
