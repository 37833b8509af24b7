"""Shards of webdataset: tar files in which the files of one record share their name up to its first dot.

    000017.jpg, 000017.cls        a picture and the number of its class
    000018.png, 000018.json       a picture and its columns, an object
    000019.txt, 000019.cls        a text and the number of its class

A picture becomes the column `image`, `cls` `label`, `txt` `text`, and what stands in `json` a column each. A folder of
tar files is read as all of its shards, in the order of their names, records in the order of theirs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedpeft.data import readers
from fedpeft.data.folders import PICTURES, is_hidden, walk_folder
from fedpeft.data.skipped import Skipped, note_skipped
from fedpeft.errors import InputError

TAR, CLASS = ".tar", ".cls"
TEXTS = (".json", ".txt")
TABLES = {ending for ending in readers.ENDINGS if ending != ".json"}


def are_in(root: Path) -> bool:
    """Whether a folder is that of a shard, by the names in it: somewhere a class beside its record, or at the top a
    picture beside its text, and none in a folder of a label. A csv, or another table, at the top is meant instead.
    """
    described = False
    for folder, names in walk_folder(root):
        if folder == root and any(readers.ending_of(Path(name)) in TABLES for name in names):
            return False
        pictures, texts = _keys_with(names, PICTURES), _keys_with(names, TEXTS)
        if (pictures | texts) & _keys_with(names, (CLASS,)):
            return True
        if folder == root:
            described = bool(pictures & texts)
        described = described and (folder == root or not pictures)
    return described


def _keys_with(names: list[str], endings: tuple[str, ...]) -> set[str]:
    return {name.partition(".")[0] for name in names if name.lower().endswith(endings)}


def tar_files(folder: Path) -> list[Path]:
    """The tar files of a folder that holds nothing else; none where it does."""
    files = [path for path in sorted(folder.iterdir()) if not is_hidden(path)]
    return files if all(path.is_file() and readers.ending_of(path) == TAR for path in files) else []


def columns(root: Path) -> tuple[dict[str, Sequence[Any]], tuple[Skipped, ...]]:
    """Columns of a shard's records, None where a record has no such file, and what was left out.

    Raises:
        InputError: there is no record; two files of a record are one column, or a file is not what its ending says;
            names it.
    """
    records: dict[str, dict[str, Any]] = {}
    other: list[str] = []
    paths = sorted(folder / name for folder, names in walk_folder(root) for name in names)
    for path in (path for path in paths if path.is_file()):
        name = path.relative_to(root)
        key, _, kind = path.name.partition(".")
        read = KINDS.get(f".{kind.lower()}")
        if read is None:
            other.append(str(name))
            continue
        record = records.setdefault(str(name.with_name(key)), {})
        for column, value in _read_member(path, read).items():
            # A picture may be there as jpg and as png, or its class in cls and in json.
            if column in record:
                raise InputError(f"{root}: {name} is the column {column!r} of its record a second time. Rename one.")
            record[column] = value
    if not records:
        raise InputError(
            f"{root}: no record in {', '.join(other[:5])}. A record's files share their name up to its first dot, and "
            f"the rest says what each is, as in 000017.jpg and 000017.cls; allowed are {', '.join(KINDS)}."
        )
    skipped = note_skipped(str(root), f"files of other endings than {', '.join(KINDS)} are left out", other)
    return readers.by_column(root, list(records.values())), skipped


def joined(shards: list[dict[str, Sequence[Any]]]) -> dict[str, Sequence[Any]]:
    """The columns of shards, one after the other; None where one has no such column."""
    names = dict.fromkeys(name for shard in shards for name in shard)
    lengths = [len(next(iter(shard.values()))) for shard in shards]
    return {
        name: [
            value for shard, length in zip(shards, lengths, strict=True) for value in shard.get(name, [None] * length)
        ]
        for name in names
    }


def _read_member(path: Path, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    try:
        return read(path)
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 are a ValueError
        raise InputError(f"{path}: not readable as {path.suffix[1:]}: {error}") from error


def _read_class(path: Path) -> dict[str, Any]:
    text = path.read_text("utf-8-sig").strip()
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"expected the number of a class, found {text[:40]!r}. A name goes into a json, as a column.")
    return {"label": int(text)}


def _read_object(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=readers.require_distinct_keys)
    if not isinstance(found, dict):
        raise ValueError("expected an object, whose keys are columns.")
    return found


KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    **dict.fromkeys(PICTURES, lambda path: {"image": str(path)}),
    CLASS: _read_class,
    ".txt": lambda path: {"text": path.read_text("utf-8-sig")},
    ".json": _read_object,
}
