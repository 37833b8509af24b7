"""Records that were left out or cut are counted with a few examples, said once, and kept for the run's summary."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("fedpeft.data")
SHOWN = 5


@dataclass(frozen=True)
class Skipped:
    """One reason for which something is not learned from.

    Attributes:
        where: file, folder or key that it is about.
        what: the things and what happened to them, as "hidden files are left out".
        count, total: how many, of how many; a total of None is not known.
        examples: the first few, as a user finds them.
    """

    where: str
    what: str
    count: int
    total: int | None = None
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = f" of {self.total}" if self.total else ""
        more = ", ..." if self.count > len(self.examples) else ""
        shown = f": {', '.join(self.examples)}{more}" if self.examples else ""
        return f"{self.where}: {self.count}{share} {self.what}{shown}"

    def tree(self) -> dict[str, Any]:
        """As it stands in `metrics.jsonl` and `summary.json`."""
        return {
            "where": self.where,
            "what": self.what,
            "count": self.count,
            "total": self.total,
            "examples": list(self.examples),
        }

    @classmethod
    def of(cls, tree: dict[str, Any]) -> Skipped:
        """The inverse of `tree`."""
        return cls(**{**tree, "examples": tuple(tree["examples"])})


def note_skipped(where: str, what: str, found: Sequence[object], total: int | None = None) -> tuple[Skipped, ...]:
    """One entry for these things, none if there are none."""
    return (Skipped(where, what, len(found), total, tuple(map(str, found[:SHOWN]))),) if len(found) else ()


def say(found: Iterable[Skipped]) -> None:
    """Log a warning for each thing that was left out."""
    for entry in found:
        log.warning("%s", entry)


@contextmanager
def said_elsewhere() -> Iterator[None]:
    """While another process, which reads the same, has said it."""
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
