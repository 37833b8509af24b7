"""The columns of a table hold texts, labels, and natural columns such as who owns a record.

Values keep the type that the file gives them. Class names are as typed: 007 and 7 are two in a csv, whole numbers of a
json or parquet file are one class each, true and false are classes by these names.
"""

from __future__ import annotations

import datetime
import math
import re
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from fedpeft import registry
from fedpeft.data.ragged import Texts
from fedpeft.data.skipped import Skipped, note_skipped
from fedpeft.data.tables import Table
from fedpeft.errors import InputError

PROMPTS = ("question", "prompt")
COLUMNS = {
    "text": (
        "text",
        "sentence",
        "content",
        "description",
        "document",
        "review",
        "comment",
        "message",
        "body",
        *PROMPTS,
    ),
    "label": ("label", "labels", "class", "target", "category", "y"),
    "image": ("image", "images", "img", "pixel_values"),
}
PARTNERS = {  # columns that hold what a model is to say, where another one holds what it is asked
    "answer",
    "answers",
    "chosen",
    "completion",
    "completions",
    "output",
    "outputs",
    "rejected",
    "reply",
    "response",
    "responses",
    "solution",
}
ASKED = {
    *PROMPTS,
    "context",
    "conversation",
    "conversations",
    "input",
    "inputs",
    "instruction",
    "instructions",
    "messages",
    "query",
}
WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]*")
LIKE_MISSING = re.compile(r"n/?a|<na>|nan|nat|none|null", re.IGNORECASE)
EXACT = 2**53  # whole numbers from here on are not told apart as floats


def find_column(table: Table, what: str, given: str | None) -> str | None:
    """The column for `what` (text, label, image): the one given, else the first usual name that there is.

    Raises:
        InputError: there is none of the given name, or two differ in case only.
    """
    if given is not None:
        if given not in table.columns:
            raise InputError(registry.unknown(f"data.{what}", given, table.columns) + f" (columns of {table.where})")
        return given
    for usual in COLUMNS[what]:
        found = [name for name in table.columns if name.strip().lower() == usual]
        if len(found) > 1:
            raise InputError(
                f"{table.where}: the {what} could be in {' or '.join(map(repr, found))}. Name one with data.{what}."
            )
        if found:
            return found[0]
    return None


def require_named(table: Table, given: Mapping[str, str | None]) -> None:
    """Refuse columns that are named and not there, all of them at once.

    Raises:
        InputError: two or more are missing; of a single one `find_column` says more.
    """
    wrong = [f"data.{what}={name}" for what, name in given.items() if name is not None and name not in table.columns]
    if len(wrong) > 1:
        raise InputError(
            f"{' and '.join(wrong)}: no such columns in {table.where}. There are: {', '.join(table.columns)}."
        )


def column(table: Table, what: str, given: str | None) -> str:
    """Like `find_column`, but there must be one."""
    name = find_column(table, what, given)
    if name is None:
        raise InputError(
            f"{table.where}: no {what} column (looked for {', '.join(COLUMNS[what])}). Its columns: "
            f"{', '.join(table.columns)}. Name one with data.{what}."
        )
    return name


def require_whole_texts(table: Table, name: str, known: Sequence[str | None]) -> None:
    """Refuse to train a language model on one half of a record because its column has a usual name.

    Args:
        name: the column that was found.
        known: columns that hold something else for certain.

    Raises:
        InputError: the other half is probably in another column.
    """
    others = {other: other.strip().lower() for other in table.columns if other not in (name, *known)}
    if name.strip().lower() in PROMPTS:
        beside = [other for other in others if not _of_numbers(table.columns[other])]
    else:
        asked = any(lower in ASKED for lower in others.values())
        beside = [] if asked else [other for other, lower in others.items() if lower in PARTNERS]
    if beside:
        raise InputError(
            f"{table.where}: a language model would be trained on the column {name} alone, beside "
            f"{', '.join(beside[:5])}. Say which is what, as data.columns={{prompt: {name}, completion: "
            f"{beside[0]}}}; or set data.text={name} if that column alone is meant."
        )


def _of_numbers(values: Sequence[Any]) -> bool:
    return all(is_missing(value) or isinstance(value, int | float | np.number) for value in values)


def is_missing(value: Any) -> bool:
    """None, NaN, NaT, pandas' NA, and strings of blanks. A word such as NA is a word."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Decimal):
        return value.is_nan()
    return (
        value is None
        # By name, as pandas need not be loaded to know that nothing of it is there.
        or type(value).__name__ in ("NAType", "NaTType")
        or (isinstance(value, float | np.floating) and math.isnan(value))
    )


def texts(table: Table, name: str) -> Texts:
    """The texts of a column.

    Raises:
        InputError: a record without one; names it.
    """
    values = table.columns[name]
    for number, value in enumerate(values, 1):
        if not isinstance(value, str) or is_missing(value):
            raise InputError(
                f"{table.where}: column {name}: record {number} has no text, but "
                f"{show_value(value)}. Remove or fill it."
            )
        require_unicode(table, name, number, value)
    return values if isinstance(values, Texts) else Texts.of(values)


def require_unicode(table: Table, name: str, number: int, value: str) -> None:
    """Refuse half of a character, which no file can hold and no tokenizer reads; names the record."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{table.where}: column {name}: record {number} has half of a character "
            f"(\\u{ord(value[error.start]):04x}), so it is no text. Remove it."
        ) from error


def labels(table: Table, name: str) -> tuple[np.ndarray, list[str], tuple[Skipped, ...]]:
    """int64 [N] class indices, class names, and what may be wrong with them.

    Strings, whole numbers, or true and false become classes in sorted order; strings that are all whole numbers are
    sorted as numbers.

    Raises:
        InputError: a record without a label, with several, or with one of another type; names it.
    """
    values = table.columns[name]
    kinds: dict[str, int] = {}
    for number, value in enumerate(values, 1):
        if is_missing(value):
            raise InputError(f"{table.where}: column {name}: record {number} has no label. Remove or fill it.")
        if isinstance(value, str):
            require_unicode(table, name, number, value)
        kinds.setdefault(_refuse_kind(table, name, number, value), number)
    if len(kinds) > 1:
        (first, one), (second, two) = list(kinds.items())[:2]
        raise InputError(
            f"{table.where}: column {name}: record {one} has {first} and record {two} has {second}; labels must be all "
            "strings or all whole numbers."
        )
    if name in table.names:
        return (*_read_named(table, name), ())
    if "true or false" in kinds:
        return (*_index_classes([bool(value) for value in values], lambda value: str(value).lower()), ())
    if "a string" not in kinds:
        return (*_index_classes([int(value) for value in values]), ())
    names = in_order(set(values))
    index = {value: position for position, value in enumerate(names)}
    return np.array([index[value] for value in values], dtype=np.int64), names, _find_doubtful(table, name, values)


def in_order(names: set[str]) -> list[str]:
    """Names of labels, sorted; as numbers where all are whole numbers as one writes them (not 007 or +1)."""
    return sorted(names, key=int) if all(map(WHOLE_NUMBER.fullmatch, names)) else sorted(names)


def _refuse_kind(table: Table, name: str, number: int, value: Any) -> str:
    if isinstance(value, str):
        return "a string"
    if isinstance(value, bool | np.bool_):
        return "true or false"
    if isinstance(value, int | float | Decimal | np.number) and math.isfinite(value) and value == int(value):
        return "a whole number"
    if isinstance(value, list | tuple | set | dict | np.ndarray):
        why = "; a record has one label. For several labels, or one-hot rows, make a column with one name or number"
    else:
        why = "; labels must be all strings or all whole numbers"
    raise InputError(f"{table.where}: column {name}: record {number} has {show_value(value)}{why}.")


def show_value(value: Any) -> str:
    """A value of a table for a message, with its type where that is no plain one."""
    kind = type(value).__name__
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:60]}..."
    return text if isinstance(value, str | int | float) or value is None else f"{text} ({kind})"


def _read_named(table: Table, name: str) -> tuple[np.ndarray, list[str]]:
    indices, names = np.array(table.columns[name], dtype=np.int64), table.names[name]
    outside = np.flatnonzero((indices < 0) | (indices >= len(names)))
    if len(outside):
        raise InputError(
            f"{table.where}: column {name}: record {outside[0] + 1} has the label {indices[outside[0]]}; the "
            f"classes are 0 to {len(names) - 1} (a negative one often marks a hidden label)."
        )
    return indices, names


def _index_classes(values: Sequence[Any], shown: Any = str) -> tuple[np.ndarray, list[str]]:
    names = sorted(set(values))
    index = {name: position for position, name in enumerate(names)}
    return np.array([index[value] for value in values], dtype=np.int64), [shown(name) for name in names]


def _find_doubtful(table: Table, name: str, values: Sequence[str]) -> tuple[Skipped, ...]:
    """Classes that were perhaps meant otherwise: words for a missing value, and names that differ in case or blanks."""
    words = [value for value in values if LIKE_MISSING.fullmatch(value.strip())]
    alike: dict[str, set[str]] = defaultdict(set)
    for value in set(values):
        alike[value.strip().casefold()].add(value)
    where = f"{table.where}: column {name}"
    twins = [" and ".join(map(repr, sorted(group))) for group in alike.values() if len(group) > 1]
    return note_skipped(
        where, "labels read like a missing value, and are taken as a class as they stand", words, len(values)
    ) + note_skipped(where, "groups of classes differ in case or blanks only, and stay several classes", sorted(twins))


class Natural(Mapping[str, np.ndarray]):
    """The natural columns of some records, each [N]; one of texts is made of its bytes when it is asked for.

    Args:
        stored: arrays, or texts, of all records.
    """

    def __init__(self, stored: Mapping[str, np.ndarray | Texts]) -> None:
        self.stored = dict(stored)

    @classmethod
    def of(cls, columns: Mapping[str, Sequence[Any]]) -> Natural:
        """Those of a table's columns that are natural ones."""
        found = {name: values if isinstance(values, Texts) else natural(values) for name, values in columns.items()}
        return cls({name: values for name, values in found.items() if values is not None})

    def __getitem__(self, name: str) -> np.ndarray:
        values = self.stored[name]
        if isinstance(values, np.ndarray):
            return values
        return _to_objects(["" if is_missing(value) else value for value in values])

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def take(self, rows: np.ndarray) -> Natural:
        """The columns of the records with these numbers."""
        return Natural(
            {
                name: values.take(rows) if isinstance(values, Texts) else values[rows]
                for name, values in self.stored.items()
            }
        )


def natural(values: Sequence[Any]) -> np.ndarray | None:
    """A column of strings or numbers as an array; None for columns of lists, objects or bytes.

    Numbers are int64 or float64 [N] (a missing one is NaN) where these are exact, else Python's own beside None. What
    else there is, and mixed columns, are strings [N], a missing one "".
    """
    there = [value for value in values if not is_missing(value)]
    kinds = {type(value) for value in there}
    if kinds and all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds):
        return _to_whole_numbers(values, len(there) == len(values))
    # To Python True is a number; as owners, true and 1 are two.
    numbers = bool(kinds) and all(issubclass(kind, int | float | np.number) and kind is not bool for kind in kinds)
    if numbers and all(isinstance(value, float | np.floating) or abs(value) < EXACT for value in there):
        return np.array([math.nan if is_missing(value) else value for value in values], dtype=np.float64)
    try:
        return _to_objects(["" if is_missing(value) else as_text(value) for value in values])
    except TypeError:
        return None


def _to_whole_numbers(values: Sequence[Any], complete: bool) -> np.ndarray:
    found = [None if is_missing(value) else int(value) for value in values]
    if complete and all(abs(value or 0) < 2**63 for value in found):
        return np.array(found, dtype=np.int64)
    return _to_objects(found)


def _to_objects(values: Sequence[Any]) -> np.ndarray:
    """One cell a value: an array of fixed-width strings is as wide as the longest, and cuts null characters."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def as_text(value: Any) -> str:
    """A single value as its owner reads it: whole numbers without a fraction, true and false as json has them.

    Raises:
        TypeError: a list, an object or bytes.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, int | float | np.number | Decimal | uuid.UUID | datetime.timedelta):
        return str(value)
    raise TypeError(type(value).__name__)


def has_values(values: np.ndarray) -> np.ndarray:
    """Which records have a value in a natural column, bool [N]."""
    return np.array([not is_missing(value) for value in values.tolist()], dtype=bool)
