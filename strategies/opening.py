"""Messages that somebody else filled, opened: every part is looked at before it is parsed, and what is over is refused.

What a part may be follows from what was asked: the names of records and arrays, each array's dtype, shape and length in
bytes, the length of the manifest, the tensors that it lists. Only then is anything decoded, and never by pickle.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.lib import format as npy

from fedpeft.flower import SType
from fedpeft.foreign import BadMessage, read_json, shown
from fedpeft.packing import packed_form, read_form, unpack_state
from fedpeft.state import AdapterState, StateMismatch
from fedpeft.strategies.instructions import Instructions

T = TypeVar("T")
PARTS = ("arrays", "config")  # records of every message that has an adapter
HEADER_BYTES = 4096  # of an npy file; ours have 128
TASK_BYTES = 2**20
COUNT = "num-examples"
METRICS, METRIC_NAME = 64, re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@:/ -]{0,99}")
LARGEST, MOST_EXAMPLES = 1e30, 1e12  # beyond them a weighted mean could overflow


class _Named(Protocol):
    def __iter__(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...


@contextmanager
def blame_message(what: str, error: type[BadMessage] = BadMessage) -> Iterator[None]:
    """Turn whatever decoding a foreign message raises (MemoryError and RecursionError too) into one sentence."""
    try:
        yield
    except BadMessage as known:
        raise (known if isinstance(known, error) else error(known)) from known.__cause__
    except StateMismatch as known:
        raise error(known) from known
    except Exception as unknown:
        said = str(unknown) or "it cannot be decoded"
        raise error(f"unreadable {what}: {said if isinstance(unknown, ValueError) else repr(unknown)}") from unknown


def require_names(found: _Named, wanted: tuple[str, ...], what: str) -> None:
    """Raise BadMessage unless exactly these names are there."""
    given = list(found)
    if len(given) != len(wanted) or set(given) != set(wanted):
        unexpected = [shown(name, 60) for name in given if name not in wanted]
        missing = [name for name in wanted if name not in given]
        few = ", ".join(unexpected[:3]) + (f" and {len(unexpected) - 3} more" if len(unexpected) > 3 else "")
        raise BadMessage(f"{what}: missing {', '.join(missing) or 'nothing'}; unexpected {few or 'nothing'}")


def array(given: Array, dtype: str, shape: tuple[int, ...], what: str) -> np.ndarray:
    """The values of an array that must be of this dtype and shape; a view of its bytes, not to be written to.

    Raises:
        BadMessage: any of its fields, its header or its length says otherwise.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if given.stype != SType.NUMPY or given.dtype != dtype or tuple(given.shape) != shape:
        coded = "" if given.stype == SType.NUMPY else f" in {shown(given.stype, 60)}"
        raise BadMessage(
            f"{what}: {shown(given.dtype, 60)} {shown(list(given.shape[:9]), 200)}{coded}, expected "
            f"{dtype} {list(shape)}"
        )
    if not size < len(given.data) <= size + HEADER_BYTES:
        raise BadMessage(f"{what}: {len(given.data)} bytes, expected {size} and a header for {dtype} {list(shape)}")
    with blame_message(f"header of {what}"):
        # Of version 1, which ours have, the header alone: it is the same in all replies of a round.
        end = 10 + int.from_bytes(given.data[8:10], "little") if given.data[6:8] == b"\x01\x00" else HEADER_BYTES
        said, fortran, kind, start = _read_header(given.data[: min(end, HEADER_BYTES)])
    if said != shape or kind != np.dtype(dtype) or start + size != len(given.data):
        raise BadMessage(
            f"{what}: its header says {shown(kind, 60)} {shown(list(said), 200)}, expected {dtype} "
            f"{list(shape)} in {len(given.data)} bytes"
        )
    flat = np.frombuffer(given.data, np.dtype(dtype), offset=start)
    return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)


@lru_cache(maxsize=16)
def _read_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether in Fortran's order, dtype, and where the values begin, of the first bytes of an npy file."""
    file = io.BytesIO(data)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
    # numpy parses the header as a Python literal, which long ones make unsafe.
    return (*read(file, max_header_size=HEADER_BYTES), file.tell())


def packed(
    content: RecordDict,
    longest: int,
    check: Callable[[AdapterState], None],
    also: tuple[str, ...] = (),
    *,
    finite: bool = False,
) -> tuple[AdapterState, Instructions]:
    """Adapter and instructions of a message of ours.

    Args:
        longest: bytes of its manifest.
        check: raises for a form (a state without values) that was not to be sent; called before any value is read.
        also: records that may be there beside `arrays` and `config`.
        finite: no tensor may have a NaN or inf.

    Raises:
        BadMessage: anything in it is of another kind, name or size.
    """
    with blame_message("message"):
        require_names(content, (*PARTS, *(name for name in also if name in content)), "records")
        arrays, config = _record_of(content, "arrays", ArrayRecord), _record_of(content, "config", ConfigRecord)
        require_names(config, ("manifest", "task"), "config")
    with blame_message("arrays"):
        require_names(arrays, ("adapter",), "arrays")
        form = read_form(_read_text(config, "manifest"), longest)
        # Before the array is looked at: a form that was not to be sent must not cost its memory.
        check(form)
        dtype, count = packed_form(form)
        values = array(arrays["adapter"], dtype, (count,), "the adapter's array")
    with blame_message("task"):
        told = _read_task(_read_text(config, "task"))
    with blame_message("arrays"):
        state = unpack_state(values, form)
        # All values at once first: of small tensors the calls take longer than the values.
        if finite and not (values.dtype.kind == "f" and np.isfinite(values).all()):
            require_finite(state)
        return state, told


def require_finite(state: AdapterState) -> None:
    """Raise BadMessage for a tensor that has NaN or inf; it names the first."""
    for key, value in (*state.tensors.items(), *state.extra.items()):
        if not torch.isfinite(value).all():
            raise BadMessage(f"{key} has NaN or inf")


def metrics(content: RecordDict, strict: bool = True) -> dict[str, float]:
    """The scalars of the MetricRecord, `num-examples` among them.

    Args:
        strict: one record, and numbers only, as our client app sends; a stock app's may have lists, which are left out.

    Raises:
        BadMessage: too many, another kind of value or name, or not finite.
    """
    found = [
        record
        for name, record in content.items()
        if isinstance(record, MetricRecord) and (name == "metrics" or not strict)
    ]
    items = [(key, value) for record in found for key, value in record.items()]
    if len(items) > METRICS:
        raise BadMessage(f"{len(items)} metrics; at most {METRICS} are read")
    # First: the other metrics of no record are NaN.
    if any(key == COUNT and value == 0 for key, value in items):
        raise BadMessage(f"{COUNT} is 0: the client has no record that the model can take")
    values = {key: _read_metric(key, value) for key, value in items if strict or not isinstance(value, list)}
    count = values.get(COUNT)
    if count is None:
        raise BadMessage(f"no {COUNT} in the reply")
    # Written so that NaN fails too.
    if not 0 < count <= MOST_EXAMPLES:
        raise BadMessage(f"{COUNT} is {count:g}, not positive and at most {MOST_EXAMPLES:g}")
    return values


def _read_metric(key: str, value: Any) -> float:
    if not METRIC_NAME.fullmatch(key):
        raise BadMessage(f"metric {shown(key, 120)!r}: no name of a metric")
    # To Python True is an int.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadMessage(f"{key} is a {type(value).__name__}, not a number")
    if not abs(value) <= LARGEST:
        raise BadMessage(f"{key} is {shown(value, 60)}, not finite and at most {LARGEST:g}")
    return float(value)


def _record_of(content: RecordDict, name: str, kind: type[T]) -> T:
    record = content[name]  # not through Flower's views by kind, which are built anew each time
    if not isinstance(record, kind):
        raise BadMessage(f"record {name} is of another kind")
    return record


@lru_cache(maxsize=16)  # all clients of a round are told the same, and say the same
def _read_task(text: str) -> Instructions:
    return Instructions.from_json(read_json(text, "the task", TASK_BYTES))


def _read_text(record: Mapping[str, Any], key: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise BadMessage(f"{key} is a {type(value).__name__}, not a text")
    return value
