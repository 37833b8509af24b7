"""Zip and tar archives of pictures: unpacked for as long as they are looked through; pictures stay encoded in memory.

An archive comes from somewhere else, so that one with a member outside of its own folder, a link or a device is refused
as a whole, and so is one that is larger than pictures that fit memory. Members that cannot be unpacked are left out.
"""

from __future__ import annotations

import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from fedpeft.data.folders import PICTURES, hidden
from fedpeft.data.readers import ENDINGS as FILES
from fedpeft.data.readers import ending
from fedpeft.data.skipped import Skipped, some
from fedpeft.errors import InputError

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")
LARGEST = 2 * 2**30  # bytes of all members, unpacked
MOST = 200_000  # members
DEEPEST, LONGEST = 16, 200  # folders of a member, and bytes of each name
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError)

Members = Generator[tuple[str, int, IO[bytes] | None], None, None]


@contextmanager
def unpacked(path: Path) -> Iterator[tuple[Path, tuple[Skipped, ...]]]:
    """The folder of an archive's records, and what could not be unpacked; it is gone at the end.

    Raises:
        InputError: it is no such archive, or one that is refused; names the member.
    """
    with tempfile.TemporaryDirectory(prefix="fedpeft-") as scratch:
        root, total = Path(scratch).resolve() / "archive", 0
        root.mkdir()
        damaged: list[str] = []
        with closing(_zip(path) if ending(path) == ".zip" else _tar(path)) as members:
            for number, (name, size, file) in enumerate(members):
                total += size
                if total > LARGEST or number >= MOST:
                    raise InputError(
                        f"{path}: more than {LARGEST / 2**30:.0f} GB or {MOST} members unpacked. Unpack it, and name "
                        "the folder."
                    )
                target = root.joinpath(*PurePosixPath(name).parts)
                if target.exists() or any(folder.is_file() for folder in target.parents if folder != root):
                    raise InputError(f"{path}: two members have the name {name}.")
                if file is None or not _write(file, size, target):
                    damaged.append(name)
        if not any(root.iterdir()):
            raise InputError(f"{path}: not readable as {ending(path)[1:]}: no member of it can be unpacked.")
        skipped = some(str(path), "members of the archive are damaged and left out", damaged)
        try:
            yield _top(root), skipped
        except InputError as error:
            raise InputError(str(error).replace(str(_top(root)), str(path))) from error


def table_of(root: Path) -> Path | None:
    """The one file of records (csv, parquet, ...) in an unpacked folder; None where there is none, or several."""
    files = [
        entry for entry in sorted(root.iterdir()) if entry.is_file() and not hidden(entry) and ending(entry) in FILES
    ]
    return files[0] if len(files) == 1 else None


def hold(columns: dict[str, Sequence[Any]], root: Path) -> dict[str, Sequence[Any]]:
    """The columns with the bytes of pictures in place of their paths below `root`; None where there is no such file."""
    return {name: _held(values, root) if _names_pictures(values, root) else values for name, values in columns.items()}


def _names_pictures(values: Sequence[Any], root: Path) -> bool:
    return any(
        isinstance(value, str) and value.lower().endswith(PICTURES) and _inside(value, root) is not None
        for value in values[:20]
    )


def _held(values: Sequence[Any], root: Path) -> list[Any]:
    places = [_inside(value, root) if isinstance(value, str) else None for value in values]
    return [
        None if place is None else {"bytes": place.read_bytes(), "path": str(place.relative_to(root))}
        for place in places
    ]


def _inside(value: str, root: Path) -> Path | None:
    place = (root / value).resolve()
    return place if "\0" not in value and place.is_relative_to(root) and place.is_file() else None


def _top(root: Path) -> Path:
    """Archives often have all in one folder, which is then the one that is meant."""
    while True:
        entries = [entry for entry in root.iterdir() if not hidden(entry)]
        if len(entries) != 1 or not entries[0].is_dir() or not any(inner.is_dir() for inner in entries[0].iterdir()):
            return root
        root = entries[0]


def _write(file: IO[bytes], size: int, target: Path) -> bool:
    """Whether a member was written whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with file, target.open("wb") as out:
            shutil.copyfileobj(file, out)
        if target.stat().st_size == size:
            return True
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk that it is unpacked to
            raise
    target.unlink()
    return False


def _zip(path: Path) -> Members:
    """Name, size and content of each file; a content of None cannot be had."""
    try:
        archive = zipfile.ZipFile(path)
    except DAMAGED as error:
        raise InputError(f"{path}: not readable as zip: {error}. Is it complete?") from error
    with archive:
        for member in archive.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise InputError(f"{path}: the member {member.filename} is a link or device. Pack it without these.")
            _require_below(path, member.filename)
            if member.flag_bits & 1:
                raise InputError(f"{path}: the member {member.filename} is encrypted. Unpack it, and name the folder.")
            if not member.is_dir():
                try:
                    file: IO[bytes] | None = archive.open(member)
                except (*DAMAGED, NotImplementedError):  # a header that is none, a method that Python has not
                    file = None
                yield member.filename, member.file_size, file


def _tar(path: Path) -> Members:
    """As `_zip`; behind a damage nothing can be found any more, which counts as one member."""
    last = ""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.isfile() and not member.isdir():
                    raise InputError(f"{path}: the member {member.name} is a link or device. Pack it without these.")
                _require_below(path, member.name)
                if member.isfile():
                    yield member.name, member.size, archive.extractfile(member)
                last = member.name
    except DAMAGED as error:
        if not last or (isinstance(error, OSError) and error.errno is not None):
            raise InputError(f"{path}: not readable as tar: {error}. Is it complete?") from error
        yield f"what follows {last}", 0, None


def _require_below(path: Path, name: str) -> None:
    """Refuse a name that leads out of the folder, or that a file system might take for another one."""
    parts = PurePosixPath(name).parts
    if ".." in parts or name.startswith("/") or "\\" in name or "\0" in name or (parts and ":" in parts[0]):
        raise InputError(f"{path}: the member {name!r} would lie outside of the archive's folder. Pack it without it.")
    if len(parts) > DEEPEST or any(len(part.encode(errors="replace")) > LONGEST for part in parts):
        raise InputError(f"{path}: the member {name[:80]!r}... has a name that is too long. Pack it under another one.")
    if any("\ud800" <= sign <= "\udfff" for sign in name):
        raise InputError(f"{path}: the member {name!r} has a name that is not UTF-8. Pack it under another one.")
