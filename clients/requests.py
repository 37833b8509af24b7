"""A server's message, opened at a client: its largest size follows from the client's own model, and is looked at first.

What its tensors and its instructions mean is checked after that, where they are used.
"""

from __future__ import annotations

from typing import Any

from flwr.app import Array, RecordDict

from fedpeft.clients.policy import Refused
from fedpeft.foreign import BadMessage, shown
from fedpeft.packing import manifest_of
from fedpeft.state import AdapterState
from fedpeft.strategies import opening
from fedpeft.strategies.instructions import Instructions

MANIFESTS, STATES = 8, 4  # times its own that a client takes: controls, cores and residuals come with the adapter
PREFIX = 40  # characters that a strategy puts before or after a tensor's name: control:, rates:, residual_B
SMALL = 2**20  # bytes that are taken whatever the model
BESIDE = ("secagg", "fedpeft.run")  # records that a message may have, which are read elsewhere


def opened(content: RecordDict, own: AdapterState) -> tuple[AdapterState, Instructions]:
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
