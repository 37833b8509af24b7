"""Tables of records as they lie in files, folders and on the hub.

Files: .csv and .tsv, .jsonl (an object a line), .json (a list of objects), .parquet (`fedpeft.data.readers`). Folders:
saved by `datasets.save_to_disk`, or images in one sub-folder per label, which may lie under train/ and test/ or val/
(`fedpeft.data.folders`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.data import folders, readers
from fedpeft.data.ragged import BLOCK
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
    """A source as read; `test` is None where it has no test set of its own."""

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


def local(source: str, folder: Path | None = None) -> Tables:
    """The tables of a file or folder.

    Args:
        folder: where a file's texts are written, for a cache; None keeps them in memory.
    """
    path = Path(source)
    if path.is_file():
        columns, skipped = readers.read(path, folder)
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
    return Tables(
        _split(train, f"{where} (train)", some(where, "other splits are not used", unused)),
        _split(found[name], f"{where} ({name})") if name else None,
    )


def _split(found: datasets.Dataset, where: str, skipped: tuple[Skipped, ...] = ()) -> Table:
    import datasets

    names = {
        name: list(inner.names)
        for name, feature in found.features.items()
        if isinstance(inner := getattr(feature, "feature", feature), datasets.ClassLabel)
    }
    for name, feature in found.features.items():  # our loader decodes pictures, and names the record that it cannot
        if isinstance(feature, datasets.Image):
            found = found.cast_column(name, datasets.Image(decode=False))
    found = found.with_format(None)  # one saved with torch's would give tensors
    spool = readers.Spool()
    spool.extend({name: [] for name in found.column_names}, 0)
    for batch in found.iter(BLOCK):
        spool.extend(batch, len(next(iter(batch.values()))))
    return Table(spool.finish(), where, names, skipped=skipped)


def _image_folder(folder: Path, beside: tuple[Skipped, ...] = ()) -> Table:
    paths, skipped = folders.pictures(folder)
    columns: dict[str, Sequence[Any]] = {
        "image": [str(path) for path in paths],
        "label": [path.parent.name for path in paths],
    }
    return Table(columns, str(folder), skipped=beside + skipped)
