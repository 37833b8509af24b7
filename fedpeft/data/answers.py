"""Labels that are more than one class: numbers, several names, or a tag for each word.

`Records.targets` [N, K] has them beside the records, a column for each output of the head; `Records.labels`, by which
records are dealt and held out, are then all 0.

    >>> table = Table({"topics": [["b", "a"], [], ["b"]]}, "a table")
    >>> targets, names, _ = read("several", table, "topics", None)
    >>> names, targets.tolist()
    (['a', 'b'], [[True, True], [False, False], [False, True]])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.data.columns import as_text, in_order, is_missing, show_value
from fedpeft.data.skipped import Skipped, note_skipped
from fedpeft.data.tables import Table
from fedpeft.errors import InputError

if TYPE_CHECKING:
    from fedpeft.data.records import Records

KINDS = ("numbers", "several")
WORDS = {
    "none": "no labels",
    "class": "one class each",
    "numbers": "numbers",
    "several": "several labels each",
    "tags": "a tag for each word",
    "pairs": "two answers each, one of them preferred",
}
MOST_NAMES = 10_000  # of labels that a record can have several of: more are free text, taken for labels
LARGEST = 1e18  # of a number: its square is a float32 still
Read = tuple[np.ndarray, list[str], tuple[Skipped, ...]]


def read(kind: str, table: Table, name: str, separator: str | None) -> Read:
    """Targets [N, K] of a column, the names of its K outputs, and what is to be said of them.

    Args:
        kind: "numbers" (float32), or "several" names (bool).
        separator: what stands between them in a text; None where the column has lists, or one number a record.

    Raises:
        InputError: a record with something else; names it.
    """
    return {"numbers": _read_numbers, "several": _read_several}[kind](table, name, separator)


def _read_numbers(table: Table, name: str, separator: str | None) -> Read:
    """float32 [N, K]: one number a record, or lists of K numbers. Whole numbers stay numbers."""
    rows = [
        [_read_number(table, name, number, part) for part in _split_cell(value, separator)]
        for number, value in enumerate(table.columns[name], 1)
    ]
    width = len(rows[0]) if rows else 1
    other = next((number for number, row in enumerate(rows, 1) if len(row) != width or not row), None)
    if other is not None:
        raise InputError(
            f"{table.where}: column {name}: record {other} has {len(rows[other - 1])} numbers, and the first has "
            f"{width}. Every record needs as many, at least one."
        )
    targets = np.array(rows, dtype=np.float64).reshape(len(rows), width)
    constant = [
        f"{name}-{k}" if width > 1 else name for k in range(width) if len(targets) and np.ptp(targets[:, k]) == 0
    ]
    notes = note_skipped(
        f"{table.where}: column {name}", "targets have the same number in every record", constant, width
    )
    return targets.astype(np.float32), [name] if width == 1 else [f"{name}-{k}" for k in range(width)], notes


def _read_number(table: Table, name: str, number: int, value: Any) -> float:
    try:
        made = math.nan if isinstance(value, bool | np.bool_) else float(value)
    except (TypeError, ValueError, OverflowError):
        made = math.nan
    if not abs(made) < LARGEST:
        hint = " A decimal comma is no number here: write a point." if isinstance(value, str) and "," in value else ""
        raise InputError(
            f"{table.where}: column {name}: record {number} has no number, but "
            f"{show_value(value)}. Remove or fill it.{hint}"
        )
    return made


def _read_several(table: Table, name: str, separator: str | None) -> Read:
    """bool [N, K]: which of K names each record has; none is allowed."""
    known, rows = table.names.get(name), []
    for number, value in enumerate(table.columns[name], 1):
        if isinstance(value, str) and separator is None:
            raise InputError(
                f"{table.where}: column {name}: record {number} has the text {show_value(value)}, and labels are to be "
                "a list. Say what stands between them with data.label_separator, for example data.label_separator=';'."
            )
        rows.append([name_of(table, name, number, part, known) for part in _split_cell(value, separator)])
    names = known or in_order({part for row in rows for part in row})
    if len(names) > MOST_NAMES or not names:
        raise InputError(
            f"{table.where}: column {name} has {len(names)} different labels; from 1 to {MOST_NAMES} are taken. Is "
            "data.label the right column, and data.label_separator what stands between them?"
        )
    without = [f"record {number}" for number, row in enumerate(rows, 1) if not row]
    notes = note_skipped(
        f"{table.where}: column {name}", "records have no label, and are learned as such", without, len(rows)
    )
    return table_of(rows, names), names, notes


def name_of(table: Table, name: str, number: int, value: Any, known: list[str] | None) -> str:
    """A label of a record as text; a number is that of a known name.

    Raises:
        InputError: it is none, or not a known one.
    """
    # Data sets of the hub store numbers, whose names are in their features.
    if known and isinstance(value, int | np.integer) and 0 <= value < len(known):
        return known[int(value)]
    try:
        text = "" if is_missing(value) else as_text(value).strip()
    except TypeError:
        text = ""
    if not text or (known and text not in known):
        raise InputError(
            f"{table.where}: column {name}: record {number} has {show_value(value)} among its labels; each must be "
            f"a name or a whole number{f', of {len(known)} known ones' if known else ''}."
        )
    return text


def _split_cell(value: Any, separator: str | None) -> list[Any]:
    """What a cell holds: the members of a list, the parts of a text, or itself; nothing of an empty cell."""
    if isinstance(value, np.ndarray | list | tuple):
        return list(value)
    if isinstance(value, str) and separator is not None:
        return [part.strip() for part in value.split(separator)] if value.strip() else []
    return [] if separator is not None and is_missing(value) else [value]


def table_of(rows: Sequence[Sequence[str]], names: Sequence[str]) -> np.ndarray:
    """bool [N, K]: which of the names stand in each row."""
    place = {name: index for index, name in enumerate(names)}
    made = np.zeros((len(rows), len(names)), dtype=bool)
    for number, row in enumerate(rows):
        made[number, [place[name] for name in row]] = True
    return made


def align(records: Records, names: list[str], what: str, where: str) -> Records:
    """The same records with these outputs: names are matched; numbers, which have only a place, take them.

    Raises:
        InputError: a record has a label that is not among the names, or another number of numbers.
    """
    targets = records.targets
    assert targets is not None
    if targets.dtype != bool:
        if targets.shape[1] != len(names):
            raise InputError(
                f"{what}: its records have {targets.shape[1]} numbers each, and {where} has {len(names)}: "
                f"{', '.join(names[:20])}."
            )
        return replace(records, label_names=names)
    used = [records.label_names[index] for index in np.flatnonzero(targets.any(axis=0))]
    unknown = [name for name in used if name not in names]
    if unknown:
        raise InputError(
            f"{what}: the labels {', '.join(map(repr, unknown[:5]))} are not in {where}, which has "
            f"{', '.join(names[:20])}."
        )
    place = {name: index for index, name in enumerate(records.label_names)}
    made = np.zeros((len(targets), len(names)), dtype=bool)
    for index, name in enumerate(names):
        if name in place:
            made[:, index] = targets[:, place[name]]
    return replace(records, targets=made, label_names=names)


def counts(targets: np.ndarray) -> np.ndarray:
    """How many records have each label; all have each number. int64 [K]."""
    there = targets if targets.dtype == bool else np.ones_like(targets, dtype=bool)
    found: np.ndarray = np.count_nonzero(there, axis=0)
    return found
