"""Instructions tell a client of a round beside tensors. They travel as JSON; only what is declared here is read.

>>> told = Instructions(3, trains=("B", "head"), uploads=("B", "head"))
>>> told.to_json()
{'round': 3, 'trains': ['B', 'head'], 'uploads': ['B', 'head']}
>>> Instructions.from_json(told.to_json()) == told
True
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from fedpeft import registry
from fedpeft.foreign import BadMessage, shown

ROUNDS = 10**6
ROLES = ("trains", "uploads", "keeps")
SUMS = re.compile(r"[a-z0-9_-]{1,40}")
VIEW = re.compile(r"[A-Za-z0-9_-]{1,40}")
DIGEST = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")


@dataclass(frozen=True)
class Drawn:
    """Roles that a client draws from the run's seed, and the sha256 of what it must then have."""

    roles: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class Lesson:
    """The task of a sequence that a round is about.

    Attributes:
        task: its number, from 0.
        classes: that it brings.
        seen: classes of all tasks so far.
        compete: classes that compete in the loss.
        replay: whether a client mixes in its records of earlier tasks.
        groups: classes of each task so far.
    """

    task: int
    classes: tuple[int, ...]
    seen: tuple[int, ...]
    compete: tuple[int, ...]
    replay: bool
    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Instructions:
    """What a client does in a round, or which sums it is asked for.

    Attributes:
        trains, uploads, keeps: roles.
        static: what it draws itself in place of being sent.
        learn: in a sequence of tasks, the one that the round is about.
        sums: what to sum over records: "head", or the name of a sketch; None in a round.
        view: the adapter's name among the views of a sequence's body.
    """

    round: int
    trains: tuple[str, ...] = ()
    uploads: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    static: Drawn | None = None
    learn: Lesson | None = None
    sums: str | None = None
    view: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What differs from the defaults, of lists, texts and numbers."""
        return {key: _to_plain(value) for key, value in asdict(self).items() if value is not None and value != ()}

    @classmethod
    def from_json(cls, tree: Any) -> Instructions:
        """The inverse of `to_json`, for a mapping that somebody else may have written.

        Raises:
            BadMessage: names the key, what was seen and what is allowed.
        """
        told = _require_mapping(tree, cls, "task")
        roles = {key: _read_tuple(told.get(key, []), str, f"task.{key}", "roles") for key in ROLES}
        return cls(
            _read_round(told.get("round")),
            **roles,
            static=_read_optional(_read_drawn, told.get("static")),
            learn=_read_optional(_read_lesson, told.get("learn")),
            sums=_read_name(told.get("sums"), SUMS, "task.sums"),
            view=_read_name(told.get("view"), VIEW, "task.view"),
        )


def _to_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_plain(item) for key, item in value.items()}
    return [_to_plain(item) for item in value] if isinstance(value, tuple) else value


def _require_mapping(tree: Any, kind: type, key: str) -> dict[str, Any]:
    known = [item.name for item in fields(kind)]
    if not isinstance(tree, dict):
        raise _refuse_value(key, tree, f"a mapping of {', '.join(known)}")
    strange = next((name for name in tree if name not in known), None)
    if strange is not None:
        raise BadMessage(registry.unknown(key, shown(strange, 100), known))
    return tree


def _read_optional(read: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else read(value)


def _read_round(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= ROUNDS:
        raise _refuse_value("task.round", value, f"a number of a round, 0 to {ROUNDS}")
    return value


def _read_tuple(value: Any, kind: type[T], key: str, what: str) -> tuple[T, ...]:
    if not isinstance(value, list) or any(type(item) is not kind for item in value):
        raise _refuse_value(key, value, f"a list of {what}")
    return tuple(value)


def _read_name(value: Any, pattern: re.Pattern[str], key: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise _refuse_value(key, value, "a name of at most 40 letters and digits")
    return value


def _read_drawn(value: Any) -> Drawn:
    told = _require_mapping(value, Drawn, "task.static")
    digest = told.get("sha256")
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        raise _refuse_value("task.static.sha256", digest, "a sha256")
    return Drawn(_read_tuple(told.get("roles"), str, "task.static.roles", "roles"), digest)


def _read_lesson(value: Any) -> Lesson:
    told = _require_mapping(value, Lesson, "task.learn")
    task, replay, groups = told.get("task"), told.get("replay"), told.get("groups")
    if type(task) is not int or type(replay) is not bool or not isinstance(groups, list):
        raise _refuse_value(
            "task.learn", value, "a task's number, its classes, and whether earlier records are shown again"
        )
    classes, seen, compete = (
        _read_tuple(told.get(key), int, f"task.learn.{key}", "classes") for key in ("classes", "seen", "compete")
    )
    return Lesson(
        task,
        classes,
        seen,
        compete,
        replay,
        tuple(_read_tuple(group, int, "task.learn.groups", "classes") for group in groups),
    )


def _refuse_value(key: str, value: Any, wanted: str) -> BadMessage:
    return BadMessage(f"{key}={shown(repr(value), 200)}: it must be {wanted}.")
