"""How far a piece of work has come, told by what works to whoever shows it: nobody, unless a command line listens.

LEVELS go from the outside in: the parts of a benchmark, a run's rounds, a round's clients, a file's records. A level
begins anew where it is told 0, or another total.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

LEVELS = ("parts", "rounds", "clients", "records")
T = TypeVar("T")
Listener = Callable[[str, int, int], None]
_listeners: list[Listener] = []
_shares: dict[str, tuple[int, int]] = {}


def step(level: str, done: int, total: int) -> None:
    """Tell all listeners that `done` of `total` are done at one of LEVELS."""
    if level in _shares:
        before, total = _shares[level]
        done += before
    for listener in _listeners:
        listener(level, done, total)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Let this listener hear every step meanwhile."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def each(level: str, items: Sequence[T]) -> Iterator[T]:
    """The items one after another, each told as done when the next one is asked for."""
    for number, item in enumerate(items):
        step(level, number, len(items))
        yield item
    step(level, len(items), len(items))


@contextmanager
def share_of(level: str, before: int, total: int) -> Iterator[None]:
    """What is told of a level meanwhile is of a share: `before` of `total` were done ahead of it."""
    _shares[level] = (before, total)
    try:
        yield
    finally:
        _shares.pop(level, None)
