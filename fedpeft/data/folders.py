"""Folders of pictures, LABEL/NAME: which are the records, and what else lies there and is left out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from fedpeft.data.readers import ENDINGS, ending_of
from fedpeft.data.skipped import Skipped, note_skipped
from fedpeft.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
HIDDEN = {"__macosx", "@eadir", "__pycache__", "thumbs.db", "desktop.ini", "$recycle.bin"}
TEST = ("test", "validation", "val", "valid", "dev")  # the first one there is the test set, where there is train/


def splits(
    root: Path, train_name: str | None = None, test_name: str | None = None, train_key: str = "train_split"
) -> tuple[Path, Path | None, tuple[Skipped, ...]]:
    """The folder of training pictures, of test pictures, and what lies beside them.

    A folder `train` without sub-folders of its own is the class of pictures of trains.

    Args:
        train_name, test_name: of folders that are to be these; None is by their names.
        train_key: what the first is called in messages.

    Raises:
        InputError: there is none of such a name.
    """
    beside = {path.name: Path(path) for path in _list_entries(root) if path.is_dir() and not is_hidden(path)}
    for key, name in ((train_key, train_name), ("test_split", test_name)):
        if name is not None and name not in beside:
            raise InputError(f"data.{key}={name}: {root} has no such folder. It has: {', '.join(beside) or 'none'}.")
    train = beside.pop(train_name or "train", None)
    if train is None or not any(path.is_dir() and not is_hidden(path) for path in _list_entries(train)):
        if train_name is None and test_name is None:
            return root, None, ()
        raise InputError(
            f"{root}: the folder {train_name or 'train'} has no folder for each label in it"
            f"{'.' if train_name else ', or is not there; name the one to learn from with data.train_split.'}"
        )
    test = next((beside.pop(name) for name in ((test_name,) if test_name else TEST) if name in beside), None)
    files = [path.name for path in _list_entries(root) if not path.is_dir() and not is_hidden(path)]
    what = f"folders or files beside train{f' and {test.name}' if test else ''} are left out"
    skipped = note_skipped(str(root), what, sorted([f"{name}/" for name in beside] + files))
    if test is not None and test.name not in (TEST[0], test_name):
        skipped += note_skipped(
            str(root), "other folder is the test set, as there is none named test", [f"{test.name}/"]
        )
    return train, test, skipped


def pictures(root: Path) -> tuple[list[tuple[str, str]], tuple[Skipped, ...]]:
    """Path and label of each picture LABEL/NAME of a folder in the order of their paths, and what is there besides.

    Raises:
        InputError: there are none; says what there is.
    """
    found: list[tuple[str, str]] = []
    out: dict[str, list[str]] = {}

    def leave(path: os.DirEntry[str], why: str) -> None:
        out.setdefault(why, []).append(os.path.relpath(path.path, root) + "/" * path.is_dir())

    for path in _list_entries(root):
        if is_hidden(path):
            leave(path, "hidden files or folders are left out")
        elif not path.is_dir():
            leave(path, "files in no folder of a label are left out")
        else:
            mine = len(found)
            for inner in _list_entries(path):
                if is_hidden(inner):
                    leave(inner, "hidden files or folders are left out")
                elif inner.is_dir():
                    leave(inner, "folders deeper than LABEL/NAME are left out")
                elif not inner.name.lower().endswith(PICTURES):
                    leave(inner, f"files of other endings than {', '.join(PICTURES)} are left out")
                else:
                    found.append((inner.path, path.name))
            if len(found) == mine:
                leave(path, "folders have no picture in them, so they are no labels")
    skipped = tuple(entry for why, names in out.items() for entry in note_skipped(str(root), why, names))
    if not found:
        raise InputError(_describe_nothing(root, skipped))
    return found, skipped


def unlabelled(root: Path) -> tuple[list[Path], tuple[Skipped, ...]] | None:
    """Pictures of a folder that has them at its top and nowhere below, and what is there besides; None of another."""
    found: list[Path] = []
    other: list[str] = []
    for folder, names in walk_folder(root):
        pictures = [name for name in names if name.lower().endswith(PICTURES)]
        if folder != root and pictures:
            return None
        found += [folder / name for name in pictures]
        other += [str((folder / name).relative_to(root)) for name in names if name not in pictures]
    said = note_skipped(str(root), f"files of other endings than {', '.join(PICTURES)} are left out", other)
    return (found, said) if found else None


def walk_folder(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and those below it, with the names of the files in each, sorted; hidden ones are left out.

    Raises:
        InputError: a folder cannot be read; names it.
    """

    def refuse(error: OSError) -> NoReturn:
        raise InputError(f"{error.filename}: the folder cannot be read: {error.strerror}.") from error

    for folder, below, names in os.walk(root, onerror=refuse):
        below[:] = sorted(name for name in below if not is_hidden(Path(name)))
        yield Path(folder), sorted(name for name in names if not is_hidden(Path(name)))


def is_hidden(path: Path | os.DirEntry[str]) -> bool:
    """What file managers, archives and notebooks leave behind."""
    return path.name.startswith(".") or path.name.lower() in HIDDEN


def _list_entries(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    """What is in a folder, in the order of names; its kind is known without another look at each."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{os.fspath(folder)}: the folder cannot be read: {error.strerror}.") from error


def _describe_nothing(root: Path, skipped: tuple[Skipped, ...]) -> str:
    readable = [path.name for path in _list_entries(root) if ending_of(Path(path)) in ENDINGS]
    hint = f" It holds {', '.join(readable[:5])}: give a file by its own path." if readable else ""
    there = "".join(f" {entry}." for entry in skipped) if not hint else ""
    return (
        f"{root}: neither a folder saved by datasets.save_to_disk nor one with images in a sub-folder per label "
        f"(LABEL/NAME, endings {', '.join(PICTURES)}).{hint}{there}"
    )
