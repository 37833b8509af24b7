"""A message's content in one record, as it goes between a coordinator and its sites.

Flower sends each record, each array and each piece of one as an object of its own, and every object costs either side a
call. A parcel has one object for each few megabytes. What is no parcel, as a stock Flower app sends, stays as it is.
"""

from __future__ import annotations

from flwr.app import ConfigRecord, RecordDict

from fedpeft.deploy.flower import content_from_bytes, content_to_bytes

PIECE = 4 * 2**20  # bytes
NAME = "fedpeft.parcel"  # and the number of the piece


def pack_content(content: RecordDict) -> RecordDict:
    """The content in as few records as there are pieces of it."""
    whole = memoryview(content_to_bytes(content))
    pieces = [bytes(whole[start : start + PIECE]) for start in range(0, len(whole), PIECE)] or [b""]
    return RecordDict({f"{NAME}.{number}": ConfigRecord({"piece": piece}) for number, piece in enumerate(pieces)})


def is_packed(content: RecordDict) -> bool:
    """Whether this is a parcel, perhaps with other records beside it."""
    return f"{NAME}.0" in content


def unpack_content(content: RecordDict) -> RecordDict:
    """What was packed, with the records that lie beside it; content that is no parcel as it is.

    Raises:
        ValueError: a piece is missing or none, or the whole is no content.
    """
    if not is_packed(content):
        return content
    pieces: list[bytes] = []
    while (record := content.config_records.get(f"{NAME}.{len(pieces)}")) is not None:
        piece = record.get("piece")
        if not isinstance(piece, bytes):
            raise ValueError("a parcel's piece is no bytes")
        pieces.append(piece)
    unpacked = content_from_bytes(b"".join(pieces))
    for name, lying in content.items():
        if name in unpacked:
            raise ValueError(f"{name} is both in the parcel and beside it")
        if not name.startswith(NAME):
            unpacked[name] = lying
    return unpacked
