"""Zip and tar archives of pictures: unpacked for as long as they are looked through; pictures stay encoded in memory.

An archive comes from somewhere else, so that one with a member outside of its own folder, a link or a device is refused
as a whole, and so is one that is larger than pictures that fit memory. Members that cannot be unpacked are left out.
What is in it is then read as if it had been named: a folder of pictures, or one file of records and its pictures.
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
from typing import IO, Any, Self

from fedpeft.data.folders import PICTURES, is_hidden
from fedpeft.data.readers import ENDINGS as FILES
from fedpeft.data.readers import ending_of
from fedpeft.data.skipped import Skipped, note_skipped
from fedpeft.errors import InputError

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")
LARGEST = 2 * 2**30  # bytes of all members, unpacked
MOST = 200_000  # members, and the folders that they are in
HEADER, HEADERS = 2**20, 2**27  # bytes of a tar's longest header of names and attributes, and of all
DEEPEST, LONGEST = 16, 200  # folders of a member, and bytes of each name
EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError)

# Name, size and content of each file, where a content of None cannot be had; of a folder the size is None.
Members = Generator[tuple[str, int | None, IO[bytes] | None], None, None]


@contextmanager
def unpacked(path: Path) -> Iterator[tuple[Path, tuple[Skipped, ...]]]:
    """The folder of an archive's records, and what could not be unpacked; it is gone at the end.

    Raises:
        InputError: it is no such archive, or one that is refused; names the member.
    """
    with tempfile.TemporaryDirectory(prefix="fedpeft-") as scratch:
        # Resolved, as places inside are compared with it, and the folder for scratch may be a link.
        root = Path(scratch).resolve() / "archive"
        root.mkdir()
        damaged = _unpack_archive(path, root)
        if not any(root.iterdir()):
            raise InputError(f"{path}: not readable as {ending_of(path)[1:]}: no member of it can be unpacked.")
        skipped = note_skipped(str(path), "members of the archive are damaged and left out", damaged)
        try:
            yield _find_top(root), skipped
        except InputError as error:
            raise InputError(str(error).replace(str(_find_top(root)), str(path))) from error


def _unpack_archive(path: Path, root: Path) -> list[str]:
    """Write an archive's files; the names of those that are damaged."""
    total, damaged = 0, []
    names: set[PurePosixPath] = set()
    with closing(_unpack_zip(path) if ending_of(path) == ".zip" else _unpack_tar(path)) as members:
        for number, (name, size, file) in enumerate(members):
            member, total = PurePosixPath(name), total + (size or 0)
            # A single name can make thousands of folders.
            names |= {member, *member.parents}
            if total > LARGEST or max(number + 1, len(names) - 1) > MOST:  # the folder of all is among the names
                raise InputError(
                    f"{path}: more than {LARGEST / 2**30:.0f} GB or {MOST} members unpacked. Unpack it, and name the "
                    "folder."
                )
            if size is None:
                continue
            target = root.joinpath(*member.parts)
            if target.exists() or any(folder.is_file() for folder in target.parents if folder != root):
                raise InputError(f"{path}: two members have the name {name}.")
            if file is None or not _write_member(file, size, target):
                damaged.append(name)
    return damaged


def table_of(root: Path) -> Path | None:
    """The one file of records (csv, parquet, ...) in an unpacked folder; None where there is none, or several.

    A json beside a picture of its name says something of the picture, and is none of them.
    """
    entries = [entry for entry in sorted(root.iterdir()) if entry.is_file() and not is_hidden(entry)]
    pictures = {entry.stem for entry in entries if entry.suffix.lower() in PICTURES}
    files = [
        entry
        for entry in entries
        if ending_of(entry) in FILES and not (ending_of(entry) == ".json" and entry.stem in pictures)
    ]
    return files[0] if len(files) == 1 else None


def hold(columns: dict[str, Sequence[Any]], root: Path, archive: str = "") -> dict[str, Sequence[Any]]:
    """The columns with the bytes of pictures in place of their paths below `root`; None where there is no such file.

    A picture that several records name is in memory once.

    Args:
        archive: its name, before that of each picture, where several are one table.
    """
    read: dict[Path, dict[str, Any]] = {}

    def held(value: Any) -> dict[str, Any] | None:
        place = _place_inside(value, root) if isinstance(value, str) else None
        if place is None:
            return None
        if place not in read:
            read[place] = {"bytes": place.read_bytes(), "path": str(Path(archive, place.relative_to(root)))}
        return read[place]

    return {
        name: list(map(held, values)) if _names_pictures(values, root) else values for name, values in columns.items()
    }


def _names_pictures(values: Sequence[Any], root: Path) -> bool:
    return any(
        isinstance(value, str) and value.lower().endswith(PICTURES) and _place_inside(value, root) is not None
        for value in values[:20]
    )


def _place_inside(value: str, root: Path) -> Path | None:
    try:
        place = (root / value).resolve()
        return place if place.is_relative_to(root) and place.is_file() else None
    except (OSError, ValueError):  # a name that no file can have: too long, or with a NUL
        return None


def _find_top(root: Path) -> Path:
    """Archives often have all in one folder, which is then the one that is meant."""
    while True:
        entries = [entry for entry in root.iterdir() if not is_hidden(entry)]
        if len(entries) != 1 or not entries[0].is_dir():
            return root
        if table_of(entries[0]) is None and not any(inner.is_dir() for inner in entries[0].iterdir()):
            return root  # pictures of one label
        root = entries[0]


def _write_member(file: IO[bytes], size: int, target: Path) -> bool:
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


def _unpack_zip(path: Path) -> Members:
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # zipfile raises errors of many kinds
        raise InputError(f"{path}: not readable as zip: {error}. Is it complete?") from error
    with archive:
        for member in archive.infolist():
            # The upper half is the mode that Unix had; archives made elsewhere have 0 there.
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise InputError(f"{path}: the member {member.filename} is a link or device. Pack it without these.")
            _require_below(path, member.filename)
            if member.flag_bits & 1:
                raise InputError(f"{path}: the member {member.filename} is encrypted. Unpack it, and name the folder.")
            if member.is_dir():
                yield member.filename, None, None
                continue
            try:
                file: IO[bytes] | None = archive.open(member)
            except Exception:  # a header that is none, a method that Python has not
                file = None
            yield member.filename, member.file_size, file


def _unpack_tar(path: Path) -> Members:
    """Behind a damage nothing can be found any more, which counts as one member."""
    last = ""
    try:
        with tarfile.open(path, tarinfo=_small_headers(path)) as archive:
            for member in archive:
                if not member.isfile() and not member.isdir():
                    raise InputError(f"{path}: the member {member.name} is a link or device. Pack it without these.")
                _require_below(path, member.name)
                if member.isfile():
                    yield member.name, member.size, archive.extractfile(member)
                else:
                    yield member.name, None, None
                last = member.name
    except InputError:
        raise
    except Exception as error:  # tarfile raises errors of many kinds
        if not last or (isinstance(error, OSError) and error.errno is not None):
            raise InputError(f"{path}: not readable as tar: {error}. Is it complete?") from error
        yield f"what follows {last}", 0, None


def _small_headers(path: Path) -> type[tarfile.TarInfo]:
    """Headers of an archive that is refused where they are large: tarfile has names and attributes, and the map of a
    sparse file, in memory as a whole.
    """
    total = 0

    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
            nonlocal total
            made = super().frombuf(buf, encoding, errors)
            if made.type == tarfile.GNUTYPE_SPARSE:
                raise InputError(f"{path}: the member {made.name} is a sparse file. Pack it without --sparse.")
            if made.type in EXTENDED:
                total += made.size
                if made.size > HEADER or total > HEADERS:
                    raise InputError(
                        f"{path}: headers of more than {HEADER / 2**20:.0f} MB, or {HEADERS / 2**20:.0f} MB in all. "
                        "Pack it without attributes (--no-xattrs --no-acls), or unpack it and name the folder."
                    )
            return made

    return Header


def _require_below(path: Path, name: str) -> None:
    """Refuse a name that leads out of the folder, or that a file system might take for another one."""
    parts = PurePosixPath(name).parts
    if ".." in parts or name.startswith("/") or "\\" in name or "\0" in name or (parts and ":" in parts[0]):
        raise InputError(f"{path}: the member {name!r} would lie outside of the archive's folder. Pack it without it.")
    if len(parts) > DEEPEST or any(len(part.encode(errors="replace")) > LONGEST for part in parts):
        raise InputError(f"{path}: the member {name[:80]!r}... has a name that is too long. Pack it under another one.")
    if any("\ud800" <= sign <= "\udfff" for sign in name):
        raise InputError(f"{path}: the member {name!r} has a name that is not UTF-8. Pack it under another one.")
