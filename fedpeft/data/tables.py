"""Tables of records as they lie in files, folders and on the hub.

Files: .csv and .tsv, .jsonl (an object a line), .json (a list of objects), .parquet (`fedpeft.data.readers`). Folders:
saved by `datasets.save_to_disk`, or images in one sub-folder per label, which may lie under train/ and test/ or val/
(`fedpeft.data.folders`). Archives: .zip, .tar, .tar.gz of such images, or of a file and the images that it names; and
shards of webdataset (`fedpeft.data.shards`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft import registry
from fedpeft.data import archives, folders, readers, shards
from fedpeft.data.ragged import BLOCK
from fedpeft.data.reading import Reading
from fedpeft.data.skipped import Skipped, note_skipped
from fedpeft.errors import InputError

if TYPE_CHECKING:
    import datasets


PLAIN = Reading()


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
    file = readers.ending_of(path) in (*readers.ENDINGS, *archives.ENDINGS)
    if file or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise InputError(f"{key}: no file or folder {source}.")
    return False


def local(source: str, folder: Path | None = None, reading: Reading = PLAIN) -> Tables:
    """The tables of a file or folder.

    Args:
        folder: where a file's texts are written, for a cache; None keeps them in memory.
        reading: what the config says of the source besides.
    """
    path = Path(source)
    if path.is_file() and readers.ending_of(path) in archives.ENDINGS:
        return _read_archive(path, reading)
    if path.is_file():
        reading.require_file(source)
        columns, skipped = readers.read(path, folder, **reading.format)
        return Tables(Table(columns, str(path), folder=path.parent, skipped=skipped))
    if not path.is_dir():
        raise InputError(f"{path}: neither a file nor a folder.")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        import datasets

        try:
            saved = datasets.load_from_disk(str(path))
            several = " of several splits" if isinstance(saved, datasets.DatasetDict) else ""
            reading.require(f"a saved data set{several}", source)
            return _read_dataset(saved, source, reading)
        except InputError:
            raise
        except Exception as error:  # of datasets, pyarrow, json and the file system
            raise InputError(f"{path}: not readable as a saved data set: {error}") from error
    if files := shards.tar_files(path):
        return _read_shards(path, files, reading)
    if shards.are_in(path):
        reading.require("a shard", source)
        columns, skipped = shards.columns(path)
        return Tables(Table(columns, str(path), skipped=skipped))
    reading.require("a folder of pictures", source)
    if reading.asked and reading.train_split is None and (plain := folders.unlabelled(path)) is not None:
        return Tables(Table({"image": [str(each) for each in plain[0]]}, str(path), skipped=plain[1]))
    train, test, beside = folders.splits(path, reading.train_split, reading.test_split, reading.train_key)
    test = None if reading.alone else test
    return Tables(_image_folder(train, beside), None if test is None else _image_folder(test))


def _read_archive(path: Path, reading: Reading, name: str = "") -> Tables:
    """As what is in it: pictures in folders of labels, or one file of records and the pictures that it names."""
    with archives.unpacked(path) as (root, damaged):
        if reading.asked and damaged:
            raise InputError(f"{damaged[0]}. They would have no answer. Pack it anew, or without them.")
        file = None if shards.are_in(root) else archives.table_of(root)
        parts = local(str(file or root), reading=reading.inside(file))

        def keep(table: Table, more: tuple[Skipped, ...] = ()) -> Table:
            where, skipped = (table.where.replace(str(root), str(path)), more + table.skipped)
            said = tuple(replace(entry, where=entry.where.replace(str(root), str(path))) for entry in skipped)
            columns = archives.hold(table.columns, root, name)
            return replace(table, columns=columns, where=where, folder=Path(), skipped=said)

        return Tables(keep(parts.train, damaged), None if parts.test is None else keep(parts.test))


def _read_shards(path: Path, files: list[Path], reading: Reading) -> Tables:
    """As one table."""
    parts = [_read_archive(file, reading, file.name) for file in files]
    if more := next((file for file, part in zip(files, parts, strict=True) if part.test is not None), None):
        raise InputError(f"{path}: {more.name} has a test set in it, so it is no shard. Give it by its own path.")
    tables = [part.train for part in parts]
    skipped = tuple(entry for table in tables for entry in table.skipped)
    joined = shards.joined([table.columns for table in tables])
    return Tables(Table(joined, str(path), _names_of_all(path, files, tables), skipped=skipped))


def _names_of_all(path: Path, files: list[Path], tables: list[Table]) -> dict[str, list[str]]:
    """The names of class indices, which must be the same in all tables that have the column."""
    names = {column: listed for table in tables for column, listed in table.names.items()}
    for column in names:
        having = [(file, table) for file, table in zip(files, tables, strict=True) if column in table.columns]
        (first, one), *others = having
        for file, table in others:
            if table.names.get(column) != one.names.get(column):
                raise InputError(
                    f"{path}: the numbers in column {column} are of {_describe_classes(one, column)} in {first.name}, "
                    f"and of {_describe_classes(table, column)} in {file.name}. Save both with the same ClassLabel."
                )
    return names


def _describe_classes(table: Table, column: str) -> str:
    names = table.names.get(column)
    return "no named classes" if names is None else f"the classes {', '.join(names[:5])}{', ...' * (len(names) > 5)}"


def hub(source: str, reading: Reading = PLAIN) -> Tables:
    """A data set of the hub; `name:subset` picks one of several configurations."""
    import datasets

    reading.require("a data set of the hub", source)
    name, _, subset = source.partition(":")
    try:
        found = datasets.load_dataset(name, subset or None, revision=reading.revision)
    except Exception as error:  # the hub client raises errors of many unrelated libraries
        raise NotOnHub(str(error).strip().splitlines()[0] if str(error).strip() else repr(error)) from error
    return _read_dataset(found, source, reading)


def made(loader: Callable[[], Any], source: str, key: str, reading: Reading = PLAIN) -> Tables:
    """What another package's function returns, which is registered as a data set of that name.

    Raises:
        InputError: it fails, or returns something else than a DataFrame, Dataset or DatasetDict; names it.
    """
    import datasets
    import pandas

    try:
        found = loader()
        if isinstance(found, pandas.DataFrame):
            found = datasets.Dataset.from_pandas(found, preserve_index=False)
    except Exception as error:  # another package's
        said = str(error).strip() or "without a word"
        raise InputError(f"{key}={source}: its function failed with {type(error).__name__}: {said}") from error
    several = isinstance(found, datasets.DatasetDict)
    other = [part for part in (found.values() if several else [found]) if not isinstance(part, datasets.Dataset)]
    if other:
        raise InputError(
            f"{key}={source}: its function returns a {'DatasetDict of ' * several}{type(other[0]).__name__}; expected "
            "a pandas.DataFrame, a datasets.Dataset, or a DatasetDict with train and test."
        )
    if not found or not all(len(part) for part in (found.values() if several else [found])):
        raise InputError(f"{key}={source}: its function returns no records.")
    reading.require("a saved data set of several splits" if several else "a saved data set", source)
    return _read_dataset(found, source, reading)


def _read_dataset(found: Any, where: str, reading: Reading) -> Tables:
    import datasets

    if not isinstance(found, datasets.DatasetDict):
        return Tables(_read_split(found, where))
    for key, wanted in ((reading.train_key, reading.train_split), ("test_split", reading.test_split)):
        if wanted is not None and wanted not in found:
            raise InputError(registry.unknown(f"data.{key}", wanted, found) + f" (splits of {where})")
    if reading.train_split is None and "train" not in found and len(found) > 1:
        raise InputError(f"{where}: no split named train; it has {', '.join(found)}. Name one with data.train_split.")
    first = reading.train_split or ("train" if "train" in found else next(iter(found)))
    tests = ("test", "validation") if reading.test_split is None else (reading.test_split,)
    name = None if reading.alone else next((name for name in tests if name in found and name != first), None)
    unused = [f"{other} ({len(part)})" for other, part in found.items() if other not in (first, name)]
    return Tables(
        _read_split(found[first], f"{where} ({first})", note_skipped(where, "other splits are not used", unused)),
        _read_split(found[name], f"{where} ({name})") if name else None,
    )


def _read_split(found: datasets.Dataset, where: str, skipped: tuple[Skipped, ...] = ()) -> Table:
    import datasets

    if not found.column_names:
        raise InputError(f"{where}: a data set without columns, so without records.")
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
    # So that a set without records has its columns.
    spool.extend({name: [] for name in found.column_names}, 0)
    for batch in found.iter(BLOCK):
        spool.extend(batch, len(next(iter(batch.values()))))
    return Table(spool.finish(), where, names, skipped=skipped)


def _image_folder(folder: Path, beside: tuple[Skipped, ...] = ()) -> Table:
    found, skipped = folders.pictures(folder)
    columns: dict[str, Sequence[Any]] = {"image": [path for path, _ in found], "label": [label for _, label in found]}
    return Table(columns, str(folder), skipped=beside + skipped)
