"""Adapter states as Flower messages, and the checks that every reply passes before it may be aggregated.

What crosses the wire, each way: one ArrayRecord (ours: a single packed array, the adapter's values and then those of
what travels beside it, which the manifest lists apart; a stock Flower app: an array per tensor, `flower_api`), one
ConfigRecord (ours: the manifest and the instructions as JSON), and on the way back one MetricRecord with
`num-examples`.
"""

from __future__ import annotations

import io
import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from numpy.lib import format as npy

from fedpeft.data.split import is_name
from fedpeft.errors import RunError
from fedpeft.flower import SType
from fedpeft.foreign import shown
from fedpeft.packing import manifest_of, pack_state
from fedpeft.state import AdapterState, Rules, ServerState, StateMismatch, Update
from fedpeft.state_file import StateFile
from fedpeft.strategies import opening
from fedpeft.strategies.asking import POLL_S, ask_nodes
from fedpeft.strategies.asking import BadReply as BadReply
from fedpeft.strategies.instructions import Instructions
from fedpeft.strategies.opening import blame_message

if TYPE_CHECKING:
    from fedpeft.strategies.base import FederatedStrategy

log = logging.getLogger("fedpeft")
JOIN_DEADLINE_S = 120.0
ROLL = 256  # nodes asked for their names at a time: a message of each of many would fill the memory
OWN = 2**30  # bytes of a manifest that is not foreign
SLACK = 4096  # bytes of a foreign one, so that a tensor too many can be named
ERROR = re.compile(r"<class '(?:\w+\.)*(\w+)'>:<(.*?)>(?=$| at )", re.DOTALL)  # an exception as Flower writes it


class Codec(Protocol):
    """How clients are named and messages are written; `Packed` for our client app, `flower_api.Named` for others."""

    def roster(self, grid: Grid, expected: int | None) -> dict[str, int]:
        """Client name -> node id, once `expected` nodes have joined; None waits for one."""

    def content(self, adapter: AdapterState, told: Instructions) -> RecordDict:
        """A message to a client: the adapter and what the client is told."""

    def read(
        self, reply: Message | None, sent: AdapterState, uploads: tuple[str, ...], number: int
    ) -> tuple[AdapterState, dict[str, float]]:
        """The upload and the metrics of a good reply to what was `sent` in round `number`.

        Raises:
            BadReply: the reply may not be aggregated.
        """


class Packed:
    """fedpeft's client app: one packed array, clients known by the name that they answer to a query."""

    def roster(self, grid: Grid, expected: int | None) -> dict[str, int]:
        """Client name -> node id, once `expected` nodes have joined."""
        nodes = joined(grid, expected)
        names: dict[str, int] = {}
        silent: dict[int, str] = {}
        for start in range(0, len(nodes), ROLL):
            asked = {node: RecordDict() for node in nodes[start : start + ROLL]}
            for node, name in ask_nodes(
                grid, "query", asked, JOIN_DEADLINE_S, lambda _, reply: identity(reply)
            ).items():
                if isinstance(name, BadReply):
                    silent[node] = str(name)
                    log.warning("node %d takes no part, as it does not tell its name: %s", node, name)
                    continue
                if name in names:
                    raise RunError(
                        f"nodes {names[name]} and {node} both say that they are {name}: {len(nodes)} nodes "
                        "must have different names."
                    )
                names[name] = node
        if len(names) < (expected or 1):
            raise RunError(
                f"{len(names)} of {expected or 1} clients told their names. "
                + "; ".join(f"node {node}: {reason}" for node, reason in list(silent.items())[:ROLL])
            )
        return names

    def content(self, adapter: AdapterState, told: Instructions) -> RecordDict:
        flat, manifest = pack_state(adapter)
        return RecordDict(
            {
                "arrays": ArrayRecord({"adapter": write_array(flat)}),
                "config": ConfigRecord({"manifest": manifest, "task": _write_task(told)}),
            }
        )

    @staticmethod
    def open(
        content: RecordDict, longest: int | None = None, check: Callable[[AdapterState], None] = lambda form: None
    ) -> tuple[AdapterState, Instructions]:
        """Adapter and instructions of a message: what the client calls.

        Args:
            longest: bytes of the manifest; without a bound the message is one's own, and may have more records.
            check: raises for a form that may not be sent (see `opening.packed`).

        Raises:
            BadMessage: it is malformed, or more than the bounds allow.
        """
        if longest is None:
            return opening.packed(content, OWN, check, tuple(name for name in content if name not in opening.PARTS))
        return opening.packed(content, longest, check)

    def reply(self, adapter: AdapterState, metrics: dict[str, float], number: int) -> RecordDict:
        """A client's answer in round `number`: its upload and metrics, which `read` takes."""
        content = self.content(adapter, Instructions(number))
        content["metrics"] = MetricRecord({**metrics})
        return content

    def read(
        self, reply: Message | None, sent: AdapterState, uploads: tuple[str, ...], number: int
    ) -> tuple[AdapterState, dict[str, float]]:
        """The upload and the metrics of a good reply.

        Raises:
            BadReply: error, missing, extra or misshapen tensors, NaN or inf, weight not positive or finite, old round.
        """
        content, wanted = opened(reply), sent.select(uploads)
        values = metrics(content)
        with blame_message("reply", BadReply):
            adapter, told = opening.packed(
                content,
                manifest_bytes(sent),
                lambda form: wanted.require_same_form(form, "update"),
                ("metrics",),
                finite=True,
            )
        # A reply to an earlier round has the right form, and would be taken for this one's.
        if told.round != number:
            raise BadReply(f"stale: an update of round {told.round}, not {number}")
        return replace(adapter, sites=sent.sites), values


PACKED = Packed()


@lru_cache(maxsize=16)  # all clients of a round are told the same, and say the same
def _write_task(told: Instructions) -> str:
    return json.dumps(told.to_json())


def write_array(values: np.ndarray) -> Array:
    """The array as an npy file, byte for byte as Flower writes it, whose header is written once for all clients."""
    return Array(
        str(values.dtype), values.shape, SType.NUMPY, _npy_header(values.dtype, values.shape) + values.tobytes()
    )


@lru_cache(maxsize=16)
def _npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    npy.write_array_header_1_0(file, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
    return file.getvalue()


def joined(grid: Grid, expected: int | None) -> list[int]:
    """Ids of the nodes, once at least `expected` (or one) have joined."""
    until = time.monotonic() + JOIN_DEADLINE_S
    while len(nodes := sorted(grid.get_node_ids())) < (expected or 1):
        if time.monotonic() > until:
            raise RunError(f"{len(nodes)} of {expected or 1} clients joined within {JOIN_DEADLINE_S:g} s.")
        time.sleep(POLL_S)
    return nodes


def contents(codec: Codec, sent: dict[str, AdapterState], told: Instructions) -> dict[str, RecordDict]:
    """A message for each client. The very same tensors are packed once, as that takes longer than a short training."""
    packed: dict[tuple[Any, ...], RecordDict] = {}
    found = {}
    for client, state in sent.items():
        key = (*state.tensors, *state.extra, *map(id, state.payload), id(state.sites))
        if key not in packed:
            packed[key] = codec.content(state, told)
        # Records of its own: what a client's app does to its message is no other client's.
        found[client] = RecordDict({name: _copy_record(record) for name, record in packed[key].items()})
    return found


def _copy_record(record: Any) -> Any:
    return type(record)({**record})


def manifest_bytes(form: AdapterState) -> int:
    """The most that a foreign manifest of this form may have."""
    return 2 * len(manifest_of(form)) + SLACK


def failure(reply: Message | None) -> str | None:
    """Why there is no content, or None."""
    if reply is None:
        return "no reply before the deadline"
    if reply.has_error():
        reason = ERROR.sub(r"\1: \2", reply.error.reason or "")
        return shown(f"client error: {reason}")
    return None


def opened(reply: Message | None) -> RecordDict:
    """The content of a reply that has one.

    Raises:
        BadReply: there was no reply, or it is an error.
    """
    reason = failure(reply)
    if reply is None or reason:
        raise BadReply(reason)
    if not reply.has_content():
        raise BadReply("a reply without content")
    return reply.content


def identity(reply: Message | None) -> str:
    """The name that a client gives itself.

    Raises:
        BadReply: no reply, or no name.
    """
    content = opened(reply)
    with blame_message("identity", BadReply):
        opening.require_names(content, ("identity",), "records")
        record = content.config_records["identity"]
        opening.require_names(record, ("name",), "identity")
        name = record["name"]
        if not isinstance(name, str) or not is_name(name):
            raise BadReply(
                f"{shown(name, 100)!r} is no name of a client: letters, digits, spaces inside, '-_.@', "
                "and others as %XX"
            )
        return name


def metrics(content: RecordDict, strict: bool = True) -> dict[str, float]:
    """The scalars of a reply, finite, and `num-examples` positive (see `opening.metrics`)."""
    with blame_message("metrics", BadReply):
        return opening.metrics(content, strict)


def scores(reply: Message | None) -> dict[str, float]:
    """The metrics of a reply that has nothing else."""
    content = opened(reply)
    with blame_message("reply", BadReply):
        opening.require_names(content, ("metrics",), "records")
    return metrics(content)


def checked(adapter: AdapterState, wanted: AdapterState) -> AdapterState:
    """`adapter` itself if it has exactly the tensors of `wanted`, all finite."""
    try:
        wanted.require_same_form(adapter, "update")
    except StateMismatch as error:
        raise BadReply(str(error)) from error
    with blame_message("reply", BadReply):
        opening.require_finite(adapter)
    return adapter


def traffic(sent: dict[str, AdapterState], received: list[AdapterState]) -> dict[str, int]:
    """Payload bytes of a round: tensors down and up."""
    return {
        "bytes_down": sum(state.nbytes for state in sent.values()),
        "bytes_up": sum(state.nbytes for state in received),
    }


def gather_updates(
    strategy: FederatedStrategy,
    grid: Grid,
    server: ServerState,
    roster: dict[str, int],
    sent: dict[str, AdapterState],
    contents: dict[int, RecordDict],
    rules: Rules,
    codec: Codec,
) -> tuple[list[Update], dict[str, str]]:
    """Ask clients to train; good updates sorted by client name, and the reason for each bad one.

    With `rules.folder` the tensors of an update go to the disk as soon as it is checked, and are mapped when all are
    there: what then takes sums has no two of them in memory.
    """
    names, file = {roster[client]: client for client in sent}, StateFile(rules.folder)

    def read(node: int, reply: Message | None) -> Update:
        update = read_update(strategy, server, sent, names[node], reply, rules, codec)
        return replace(update, adapter=file.put(update.adapter))

    answers = ask_nodes(grid, "train", contents, rules.deadline_s, read)
    updates, bad = sort_answers({names[node]: answer for node, answer in answers.items()})
    return [replace(update, adapter=file.get(update.adapter)) for update in updates], bad


def read_update(
    strategy: FederatedStrategy,
    server: ServerState,
    sent: dict[str, AdapterState],
    client: str,
    reply: Message | None,
    rules: Rules,
    codec: Codec,
) -> Update:
    """The update in a client's reply.

    Raises:
        BadReply: it may not be aggregated.
    """
    adapter, metrics = codec.read(reply, sent[client], strategy.uploads(server), server.round + 1)
    limit = rules.max_update_norm
    if limit is not None and (moved := adapter.distance(sent[client])) > limit:
        raise BadReply(f"update norm {moved:.3g} is over run.max_update_norm={limit:g}")
    count = metrics.pop("num-examples")
    return Update(client, count if strategy.context.weighting == "examples" else 1.0, adapter, metrics)


def sort_answers(answers: dict[str, Update | BadReply]) -> tuple[list[Update], dict[str, str]]:
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
