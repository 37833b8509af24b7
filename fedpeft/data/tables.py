"""Tables of records as they lie in files, folders and on the hub.

Files: .csv and .tsv, .jsonl (an object a line), .json (a list of objects), .parquet (`fedpeft.data.readers`). Folders:
saved by `datasets.save_to_disk`, or images in one sub-folder per label, which may lie under train/ and test/ or val/
(`fedpeft.data.folders`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.data import folders, readers
from fedpeft.data.skipped import Skipped, some
from fedpeft.errors import InputError

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Table:
    """Columns of equal length, `where` they come from (for messages), names of class indices, folder of image paths,
    and what was left out.
    """

    columns: dict[str, Sequence[Any]]
    where: str
    names: dict[str, list[str]] = field(default_factory=dict)
    folder: Path = Path()
    skipped: tuple[Skipped, ...] = ()


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
    file = readers.ending(path) in readers.ENDINGS
    if file or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise InputError(f"{key}: no file or folder {source}.")
    return False


def local(source: str) -> Tables:
    """The tables of a file or folder."""
    path = Path(source)
    if path.is_file():
        columns, skipped = readers.read(path)
        return Tables(Table(columns, str(path), folder=path.parent, skipped=skipped))
    if not path.is_dir():
        raise InputError(f"{path}: neither a file nor a folder.")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        import datasets

        try:
            return _dataset(datasets.load_from_disk(str(path)), source)
        except InputError:
            raise
        except Exception as error:  # of datasets, pyarrow, json and the file system
            raise InputError(f"{path}: not readable as a saved data set: {error}") from error
    train, test, beside = folders.splits(path)
    return Tables(_image_folder(train, beside), None if test is None else _image_folder(test))


def hub(source: str) -> Tables:
    """A data set of the hub; `name:subset` picks one of several configurations."""
    import datasets

    name, _, subset = source.partition(":")
    try:
        found = datasets.load_dataset(name, subset or None)
    except Exception as error:  # the hub client raises errors of many unrelated libraries
        raise NotOnHub(str(error).strip().splitlines()[0] if str(error).strip() else repr(error)) from error
    return _dataset(found, source)


def _dataset(found: Any, where: str) -> Tables:
    import datasets

    if not isinstance(found, datasets.DatasetDict):
        return Tables(_split(found, where))
    if "train" not in found and len(found) > 1:
        raise InputError(f"{where}: no split named train; it has {', '.join(found)}. Save the wanted split by itself.")
    train = found["train"] if "train" in found else next(iter(found.values()))
    name = next((name for name in ("test", "validation") if name in found and found[name] is not train), None)
    unused = [f"{other} ({len(part)})" for other, part in found.items() if part is not train and other != name]
    return Tables(_split(train, f"{where} (train)", some(where, "other splits are not used", unused)),
                  _split(found[name], f"{where} ({name})") if name else None)


def _split(found: datasets.Dataset, where: str, skipped: tuple[Skipped, ...] = ()) -> Table:
    import datasets

    names = {
        name: list(feature.names)
        for name, feature in found.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    return Table({name: list(found[name]) for name in found.column_names}, where, names, skipped=skipped)


def _image_folder(folder: Path, beside: tuple[Skipped, ...] = ()) -> Table:
    paths, skipped = folders.pictures(folder)
    columns: dict[str, Sequence[Any]] = {"image": [str(path) for path in paths],
                                         "label": [path.parent.name for path in paths]}
    return Table(columns, str(folder), skipped=beside + skipped)


# Images -----------------------------------------------------------------------------------------------------


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
