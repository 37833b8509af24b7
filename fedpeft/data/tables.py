"""Tables of records as they lie in files, folders and on the hub, and what their columns hold.

Files: .csv, .jsonl (an object a line), .json (a list of objects), .parquet. Folders: saved by
`datasets.save_to_disk`, or images in one sub-folder per label (which may lie under train/ and test/). A csv has text
only: numbers stay as written, and an empty field is missing.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft import registry
from fedpeft.errors import InputError

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
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
        "question",
        "prompt",
    ),
    "label": ("label", "labels", "class", "target", "category", "y"),
    "image": ("image", "images", "img", "pixel_values"),
}


@dataclass(frozen=True)
class Table:
    """Columns of equal length, `where` they come from (for messages), names of class indices, folder of image paths."""

    columns: dict[str, Sequence[Any]]
    where: str
    names: dict[str, list[str]] = field(default_factory=dict)
    folder: Path = Path()


@dataclass(frozen=True)
class Tables:
    train: Table
    test: Table | None = None


class NotOnHub(Exception):
    """The hub has no such data set, or cannot be reached."""


# Reading ----------------------------------------------------------------------------------------------------


def is_local(source: str, key: str) -> bool:
    """Whether a source is a file or folder here; a path that does not exist is an InputError, a bare name is not."""
    path = Path(source)
    if path.exists():
        return True
    if path.suffix in SUFFIXES or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise InputError(f"{key}: no file or folder {source}.")
    return False


def local(source: str) -> Tables:
    """The tables of a file or folder."""
    path = Path(source)
    if path.is_file():
        return Tables(_file(path))
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        import datasets

        try:
            return _dataset(datasets.load_from_disk(str(path)), source)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path}: not readable as a saved data set: {error}") from error
    if (path / "train").is_dir():
        return Tables(_image_folder(path / "train"), _image_folder(path / "test") if (path / "test").is_dir() else None)
    return Tables(_image_folder(path))


def hub(source: str) -> Tables:
    """A data set of the hub; `name:subset` picks one of several configurations."""
    import datasets

    name, _, subset = source.partition(":")
    try:
        found = datasets.load_dataset(name, subset or None)
    except Exception as error:  # the hub client raises errors of many unrelated libraries
        raise NotOnHub(str(error).strip().splitlines()[0] if str(error).strip() else repr(error)) from error
    return _dataset(found, source)


def _file(path: Path) -> Table:
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: files are read by their ending; allowed: {', '.join(SUFFIXES)}.")
    try:
        if path.suffix == ".csv":
            columns = _csv(path)
        elif path.suffix == ".parquet":
            import pandas

            frame = pandas.read_parquet(path)
            columns = {str(name): frame[name].tolist() for name in frame.columns}
        else:
            columns = _json(path)
    except (OSError, ValueError) as error:  # pandas' and pyarrow's errors are ValueErrors
        raise (
            error
            if isinstance(error, InputError)
            else InputError(f"{path}: not readable as {path.suffix[1:]}: {error}")
        ) from error
    if not columns or not len(next(iter(columns.values()))):
        raise InputError(f"{path}: no records.")
    return Table(columns, str(path), folder=path.parent)


def _csv(path: Path) -> dict[str, Sequence[Any]]:
    import pandas

    frame = pandas.read_csv(path, dtype=str, keep_default_na=False)
    if not isinstance(frame.index, pandas.RangeIndex):
        raise InputError(f"{path}: the rows have more fields than the header. Name every column.")
    frame = frame.fillna("")  # fields that a short row lacks
    return {str(name): frame[name].tolist() for name in frame.columns}


def _json(path: Path) -> dict[str, Sequence[Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        rows = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise InputError(f"{path}: line {number} is no JSON: {error}.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: expected objects, one per record.")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _dataset(found: Any, where: str) -> Tables:
    import datasets

    if not isinstance(found, datasets.DatasetDict):
        return Tables(_split(found, where))
    if "train" not in found and len(found) > 1:
        raise InputError(f"{where}: no split named train; it has {', '.join(found)}. Save the wanted split by itself.")
    train = found["train"] if "train" in found else next(iter(found.values()))
    name = next((name for name in ("test", "validation") if name in found and found[name] is not train), None)
    return Tables(_split(train, f"{where} (train)"), _split(found[name], f"{where} ({name})") if name else None)


def _split(found: datasets.Dataset, where: str) -> Table:
    import datasets

    names = {
        name: list(feature.names)
        for name, feature in found.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    return Table({name: list(found[name]) for name in found.column_names}, where, names)


def _image_folder(folder: Path) -> Table:
    paths = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in IMAGES)
    if not paths:
        raise InputError(
            f"{folder}: neither a folder saved by datasets.save_to_disk nor one with images in a sub-folder per label "
            f"(LABEL/NAME, endings {', '.join(IMAGES)})."
        )
    return Table({"image": [str(path) for path in paths], "label": [path.parent.name for path in paths]}, str(folder))


# Columns ----------------------------------------------------------------------------------------------------


def find_column(table: Table, what: str, given: str | None) -> str | None:
    """The column for `what` (text, label, image): the one given, else the first usual name that there is."""
    if given is not None:
        if given not in table.columns:
            raise InputError(registry.unknown(f"data.{what}", given, table.columns) + f" (columns of {table.where})")
        return given
    lower = {name.lower(): name for name in reversed(list(table.columns))}
    return next((lower[name] for name in COLUMNS[what] if name in lower), None)


def column(table: Table, what: str, given: str | None) -> str:
    """Like `find_column`, but there must be one."""
    name = find_column(table, what, given)
    if name is None:
        raise InputError(
            f"{table.where}: no {what} column (looked for {', '.join(COLUMNS[what])}). Its columns: "
            f"{', '.join(table.columns)}. Name one with data.{what}."
        )
    return name


def texts(table: Table, name: str) -> list[str]:
    for number, value in enumerate(table.columns[name], 1):
        if not isinstance(value, str) or not value.strip():
            raise InputError(
                f"{table.where}: column {name}: record {number} has no text, but {value!r}. Remove or fill it."
            )
    return list(table.columns[name])


def labels(table: Table, name: str) -> tuple[np.ndarray, list[str]]:
    """int64 [N] class indices and class names; strings and whole numbers become classes in sorted order."""
    values = table.columns[name]
    for number, value in enumerate(values, 1):
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            raise InputError(f"{table.where}: column {name}: record {number} has no label. Remove or fill it.")
    if name in table.names:
        indices, names = np.array(values, dtype=np.int64), table.names[name]
        outside = np.flatnonzero((indices < 0) | (indices >= len(names)))
        if len(outside):
            raise InputError(
                f"{table.where}: column {name}: record {outside[0] + 1} has the label {indices[outside[0]]}; the "
                f"classes are 0 to {len(names) - 1} (a negative one often marks a hidden label)."
            )
        return indices, names
    if all(isinstance(value, str) for value in values):
        whole = all(re.fullmatch(r"0|-?[1-9]\d*", value) for value in values)
        return _classes([int(value) for value in values] if whole else values)
    for number, value in enumerate(values, 1):
        if not isinstance(value, int | float | np.number) or value != int(value):
            raise InputError(
                f"{table.where}: column {name}: record {number} has {value!r}; labels must be all strings or all whole "
                "numbers."
            )
    return _classes([int(value) for value in values])


def _classes(values: Sequence[Any]) -> tuple[np.ndarray, list[str]]:
    names = sorted(set(values))
    index = {name: position for position, name in enumerate(names)}
    return np.array([index[value] for value in values], dtype=np.int64), [str(name) for name in names]


def natural(values: Sequence[Any]) -> np.ndarray | None:
    """A column of strings or numbers as an array, a missing string as ""; None for nested columns."""
    if all(isinstance(value, str) or value is None for value in values):
        return np.array([value or "" for value in values], dtype=str)
    if all(isinstance(value, int | float | np.number) or value is None for value in values):
        return np.array([math.nan if value is None else value for value in values])
    return None


def images(table: Table, name: str) -> np.ndarray:
    """uint8 [N, H, W, C], float32 for arrays of fractions; grey images become RGB where others have colour."""
    values = table.columns[name]
    if isinstance(values, np.ndarray):
        return values
    arrays = []
    for number, value in enumerate(values, 1):
        try:
            arrays.append(_image(value, table.folder))
        except (OSError, ValueError, TypeError, SyntaxError) as error:  # SyntaxError: Pillow on a broken PNG
            raise InputError(f"{table.where}: column {name}: record {number} is no readable image: {error}") from error
    channels = max(array.shape[2] for array in arrays)
    for number, array in enumerate(arrays, 1):
        if array.shape[:2] != arrays[0].shape[:2]:
            raise InputError(
                f"{table.where}: images differ in size: record 1 is {_size(arrays[0])}, record {number} is "
                f"{_size(array)}. Resize them to one size."
            )
    return np.stack([np.repeat(array, channels, axis=2) if array.shape[2] == 1 else array for array in arrays])


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"


def _image(value: Any, folder: Path) -> np.ndarray:
    from PIL import Image

    if isinstance(value, dict):  # how datasets stores an image in parquet
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        value = Image.open(folder / value)
    elif isinstance(value, bytes):
        value = Image.open(io.BytesIO(value))
    if isinstance(value, Image.Image):
        array = np.asarray(value.convert("L" if value.mode in ("1", "L") else "RGB"))
    else:
        array = np.array([[np.asarray(cell) for cell in row] for row in value])
        whole = array.dtype.kind in "iu"
        if array.size and not (array.min() >= 0 and array.max() <= (255 if whole else 1)):
            raise ValueError(
                f"values from {array.min()} to {array.max()}; allowed are whole numbers 0 to 255 or fractions 0 to 1"
            )
        array = array.astype(np.uint8 if whole else np.float32)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3):
        raise ValueError(f"shape {list(array.shape)}, expected [H, W], [H, W, 1] or [H, W, 3]")
    return array
