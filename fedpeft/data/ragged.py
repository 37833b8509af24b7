"""Rows of unequal length, one after another in a flat array: token ids and texts, in memory or mapped from a file.

>>> made = RaggedWriter(np.uint16)
>>> made.extend([[5, 6, 7], [], [8]])
>>> rows = made.finish()
>>> rows.padded(np.array([2, 0]), 2, -1).tolist(), rows.lengths.tolist()
([[8, -1], [5, 6]], [3, 0, 1])
>>> words = Texts.of(["ab", None, ""])
>>> list(words), words.take(np.array([2, 0]))[1]
(['ab', None, ''], 'ab')
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.errors import InputError
from fedpeft.files import blame_file

BLOCK = 4096  # rows that are looked at together
NONE = b"\xff"  # in place of a text that is missing: no UTF-8 has this byte


class Ragged:
    """N rows in one flat array.

    Args:
        values: all rows, one after another.
        ends: int64 [N + 1], where each row begins, and where the last one ends.
    """

    def __init__(self, values: np.ndarray, ends: np.ndarray) -> None:
        self.values, self.ends = values, ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """Entries of each row, int64 [N]."""
        return np.diff(self.ends)

    @property
    def longest(self) -> int:
        """Entries of the longest row."""
        return int(self.lengths.max(initial=0))

    def joined(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The entries of these rows one after another, and where each begins and the last ends [n + 1]."""
        sizes = self.lengths[rows]
        ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
        return self.values[np.arange(ends[-1]) + np.repeat(self.ends[rows] - ends[:-1], sizes)], ends

    def padded(self, rows: np.ndarray, width: int, filler: int) -> np.ndarray:
        """These rows as int64 [n, width], cut or filled on the right."""
        sizes = np.minimum(self.lengths[rows], width)
        there = np.arange(width) < sizes[:, None]
        table = np.full((len(rows), width), filler, dtype=np.int64)
        places = self.ends[rows][:, None] + np.arange(width)
        table[there] = self.values[places[there]]
        return table


def cut_runs(lengths: np.ndarray, most: int, tokens: int) -> Iterator[np.ndarray]:
    """Places 0 to N - 1 in runs of at most `most` that have at most so many tokens when they are padded to one length,
    or are one record.

    >>> [run.tolist() for run in cut_runs(np.array([2, 2, 5, 1, 1, 9]), 3, 8)]
    [[0, 1], [2], [3, 4], [5]]
    """
    start = width = 0
    for place, length in enumerate(lengths.tolist()):
        wider = max(width, length)
        if place > start and (place - start == most or (place - start + 1) * wider > tokens):
            yield np.arange(start, place)
            start, wider = place, length
        width = wider
    if len(lengths):
        yield np.arange(start, len(lengths))


class RaggedWriter:
    """Makes a `Ragged`, in memory or, with `path`, in the files PATH.values and PATH.ends."""

    def __init__(self, dtype: Any, path: Path | None = None) -> None:
        self.dtype, self.path = np.dtype(dtype), path
        self.blocks: list[np.ndarray] = []
        self.sizes: list[np.ndarray] = [np.zeros(1, dtype=np.int64)]
        self.file = None if path is None else _values_path(path).open("wb")

    def extend(self, rows: Sequence[Sequence[int]]) -> None:
        """Put rows of whole numbers at the end.

        Raises:
            InputError: a number does not fit the type.
        """
        flat = np.fromiter(chain.from_iterable(rows), dtype=np.int64)
        limits = np.iinfo(self.dtype)
        if len(flat) and not limits.min <= flat.min() <= flat.max() <= limits.max:
            raise InputError(
                f"a number of {flat.max()} is beyond {limits.max}: has the tokenizer numbers past its own?"
            )
        self._put(flat.astype(self.dtype), [len(row) for row in rows])

    def extend_bytes(self, rows: Sequence[bytes]) -> None:
        """Put rows of bytes at the end."""
        self._put(np.frombuffer(b"".join(rows), dtype=np.uint8), list(map(len, rows)))

    def finish(self) -> Ragged:
        """What was written; it is in the files when this returns."""
        ends = np.cumsum(np.concatenate(self.sizes))
        if self.file is None or self.path is None:
            return Ragged(np.concatenate([np.empty(0, dtype=self.dtype), *self.blocks]), ends)
        with blame_file(self.path):
            self.file.close()
            _ends_path(self.path).write_bytes(ends.tobytes())
        return map_ragged(self.path, self.dtype)

    def _put(self, flat: np.ndarray, sizes: list[int]) -> None:
        self.sizes.append(np.array(sizes, dtype=np.int64))
        if self.file is None or self.path is None:
            self.blocks.append(flat)
            return
        with blame_file(self.path):
            self.file.write(flat.data)


def map_ragged(path: Path, dtype: Any) -> Ragged:
    """What a `RaggedWriter` has written, mapped: pages are read when they are needed, and shared by all processes."""
    return Ragged(_map_file(_values_path(path), dtype), _map_file(_ends_path(path), np.int64))


def _map_file(path: Path, dtype: Any) -> np.ndarray:
    if not path.stat().st_size:  # which cannot be mapped
        return np.empty(0, dtype=dtype)
    # A plain array over the mapping: a `memmap` costs more at every slice.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _values_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.values")


def _ends_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.ends")


class Texts(Sequence[Any]):
    """Texts, None where one is missing, as UTF-8 one after another; Python has them as strings only when asked.

    Args:
        stored: the bytes.
        rows: numbers of the texts that these are, in their order; None is all.
        path: of the files that they are in, if they are.
    """

    def __init__(self, stored: Ragged, rows: np.ndarray | None = None, path: Path | None = None) -> None:
        self.stored, self.rows, self.path = stored, rows, path

    @classmethod
    def of(cls, values: Iterable[str | None]) -> Texts:
        """The same in memory."""
        writer = TextWriter()
        block: list[str | None] = []
        for value in values:
            block.append(value)
            if len(block) == BLOCK:
                writer.extend(block)
                block = []
        writer.extend(block)
        return writer.finish()

    def __len__(self) -> int:
        return len(self.stored) if self.rows is None else len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return list(self.take(np.arange(len(self))[place]))
        place = range(len(self))[place]  # an index from the end, and an IndexError
        row = place if self.rows is None else int(self.rows[place])
        return _decode_text(self.stored.values[self.stored.ends[row] : self.stored.ends[row + 1]].tobytes())

    def __iter__(self) -> Iterator[str | None]:
        for block in self.blocks():
            yield from block

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]  # as a list has none

    @property
    def nbytes(self) -> int:
        """Bytes of all texts of the storage."""
        return int(self.stored.ends[-1])

    def blocks(self, size: int = BLOCK) -> Iterator[list[str | None]]:
        """All texts in order, some at a time."""
        for block in self.raw(size):
            yield list(map(_decode_text, block))

    def raw(self, size: int = BLOCK) -> Iterator[list[bytes]]:
        """The same as UTF-8."""
        for start in range(0, len(self), size):
            end = min(start + size, len(self))
            if self.rows is None:
                ends = self.stored.ends[start : end + 1]
                flat, ends = self.stored.values[ends[0] : ends[-1]], ends - ends[0]
            else:
                flat, ends = self.stored.joined(self.rows[start:end])
            data, places = flat.tobytes(), ends.tolist()
            yield [data[a:b] for a, b in pairwise(places)]

    def take(self, rows: np.ndarray) -> Texts:
        """The texts with these numbers, in this order; nothing is copied."""
        rows = np.asarray(rows, dtype=np.int64)
        return Texts(self.stored, rows if self.rows is None else self.rows[rows], self.path)


class TextWriter:
    """Makes `Texts` out of blocks of strings, in memory or in files."""

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.writer = path, RaggedWriter(np.uint8, path)

    def extend(self, values: Sequence[str | None]) -> None:
        """Put texts at the end."""
        # Halves of characters, which a json may have, are refused later and with their record.
        self.writer.extend_bytes(
            [NONE if value is None else value.encode("utf-8", "surrogatepass") for value in values]
        )

    def finish(self) -> Texts:
        """All of them."""
        return Texts(self.writer.finish(), path=self.path)


def mapped_texts(path: Path) -> Texts:
    """Texts that a `TextWriter` has written."""
    return Texts(map_ragged(path, np.uint8), path=path)


def _decode_text(data: bytes) -> str | None:
    return None if data == NONE else data.decode("utf-8", "surrogatepass")
