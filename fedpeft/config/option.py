"""How a key of a config is declared: its default, its meaning and its bounds."""

from __future__ import annotations

from dataclasses import field
from typing import Any

INFINITY = float("inf")
LEARNER, FEDERATION = "for one learner", "in a federation"  # where a continual body runs


def option(
    default: Any,
    help: str,
    *,
    low: float = -INFINITY,
    high: float = INFINITY,
    above: float = -INFINITY,
    choices: tuple[Any, ...] = (),
    table: str = "",
    path: bool = False,
    options_of: tuple[str, str] | None = None,
    only: str = "",
) -> Any:
    """A dataclass field with its meaning and its bounds: `low` <= value <= `high`, value > `above`, or `choices`.

    Args:
        table: the choices are the names of this registry table.
        path: it may be a place in the file system, so a `~` in front is somebody's home folder.
        options_of: it holds options of an entry of this registry table ("" is none of ours), whose name stands in this
            field beside it; or a list of entries, whose names stand in this key of each.
        only: of a body's options, LEARNER or FEDERATION: where alone it means something; empty is both.
    """
    if only:
        help += f" ({only} only)"
    meta = {
        "help": help,
        "low": low,
        "high": high,
        "above": above,
        "choices": choices,
        "table": table,
        "path": path,
        "options_of": options_of,
        "only": only,
    }
    # A dataclass refuses a list or mapping as a default, as all configs would share the one object.
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)
