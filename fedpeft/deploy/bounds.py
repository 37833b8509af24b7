"""What somebody else sent is counted before it is built: a few bytes of a protobuf message can become gigabytes.

An empty entry is two bytes on the way and some hundred in memory; of an array, a list of pieces may name one of them a
million times. An honest message has some dozen parts, and its bulk is in a few of them.

>>> from flwr.proto.recorddict_pb2 import ConfigRecord
>>> require_few(ConfigRecord().SerializeToString(), ConfigRecord.DESCRIPTOR)
>>> require_few(bytes([10, 0]) * (PARTS + 1), ConfigRecord.DESCRIPTOR)
Traceback (most recent call last):
ValueError: it has more than 200000 parts
"""

from __future__ import annotations

import json
from typing import Any

PARTS = 200_000  # fields and numbers of one message
INDEX_BYTES = 2**20  # of what says of which objects an object is made
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # kinds of fields as protobuf writes them
LONGEST_VARINT = 10


def require_few(data: bytes, kind: Any) -> None:
    """Raise ValueError unless the message has at most `PARTS` parts.

    Args:
        data: as it came.
        kind: the descriptor of the message that it is read as.
    """
    count, open_parts = 0, [(0, len(data), kind)]
    while open_parts:
        at, end, kind = open_parts.pop()
        while at < end:
            count += 1
            tag, at = _read_varint(data, at, end)
            field, written = kind.fields_by_number.get(tag >> 3), tag & 7
            if written == VARINT:
                _, at = _read_varint(data, at, end)
            elif written == BYTES:
                size, at = _read_varint(data, at, end)
                if field is not None and field.message_type is not None:
                    open_parts.append((at, at + size, field.message_type))
                elif field is not None and field.type not in (field.TYPE_STRING, field.TYPE_BYTES):
                    count += size if field.type != field.TYPE_DOUBLE else size // 8  # numbers side by side
                at += size
            elif written in (FIXED64, FIXED32):
                at += 8 if written == FIXED64 else 4
            else:
                raise ValueError("it is no message")
            if count > PARTS:
                raise ValueError(f"it has more than {PARTS} parts")
            if at > end:
                raise ValueError("it is no whole message")


def _read_varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A number, and where what follows it begins."""
    value = 0
    for place in range(LONGEST_VARINT):
        if at >= end:
            raise ValueError("it is no whole message")
        byte = data[at]
        value, at = value | (byte & 127) << 7 * place, at + 1
        if byte < 128:
            return value, at
    raise ValueError("a number in it has more than 64 bits")


def require_pieces_once(body: bytes) -> None:
    """Raise ValueError if the JSON of an array of Flower's is long, or names a piece twice."""
    require_short(body)
    pieces = json.loads(body)["arraychunk_ids"]
    if len(set(pieces)) < len(pieces):
        raise ValueError("an array has a piece twice")


def require_short(body: bytes) -> None:
    """Raise ValueError if what says of which objects an object is made is long."""
    if len(body) > INDEX_BYTES:
        raise ValueError(f"an object has more than {INDEX_BYTES} bytes of names")
