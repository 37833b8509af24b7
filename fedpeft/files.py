"""Files that are written whole or not at all, and are on the disk when the call returns."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

FULL = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room within the quota",
    errno.EFBIG: "raise the largest size of a file (ulimit -f)",
    errno.EROFS: "make that disk writable",
    errno.EACCES: "give yourself the right to it",
    errno.EPERM: "give yourself the right to it",
    errno.EMFILE: "raise the number of open files (ulimit -n)",
    errno.EIO: "see to that disk",
}


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and sync it and its folder.

    Raises:
        OSError: it cannot be written; names the file.
    """
    # In the same folder, since a rename does not cross file systems; by process, since two may write at once.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with blame_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                # Before the rename: the name could reach the disk ahead of the bytes.
                os.fsync(file.fileno())
            os.replace(temporary, path)
        # Also on Ctrl-C: half a file must not be left lying about.
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all."""
    from safetensors.torch import save

    # safetensors refuses what is a view with gaps.
    write_bytes(path, save({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, metadata))


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, it holds {type(found).__name__}.")
    return found


def read_text(path: Path) -> str:
    """The text of a file that people write, without its byte order mark.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}. Save it as UTF-8; a file "
            "that Windows' PowerShell has written: Get-Content FILE | Set-Content -Encoding utf8 NEW."
        ) from error


def sync_folder(path: Path) -> None:
    """Have the disk keep a folder's entries: a file renamed into it then outlives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def blame_file(path: Path) -> Iterator[None]:
    """Let an OSError of writing name the file: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def scratch_folder(folder: Path, name: str) -> Iterator[Path]:
    """A folder inside another one that is gone at the end; those that killed processes of this machine have left go."""
    start = f".{name}-{socket.gethostname()}-"
    ours = re.compile(
        re.escape(start) + r"([0-9]{1,9})-[^-]+"
    )  # whole: another machine's name may begin with this one's
    # Of this machine only: whether a process of another one lives cannot be seen.
    for left in folder.glob(f".{name}-*"):
        if (found := ours.fullmatch(left.name)) and not _is_alive(int(found[1])):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{start}{os.getpid()}-", dir=folder, ignore_cleanup_errors=True) as made:
        yield Path(made)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def explain_error(error: OSError) -> str:
    """An OSError as a sentence: the file, what is wrong, and what to do where that is known."""
    reason = error.strerror or str(error)
    remedy = FULL.get(error.errno or 0)
    # Of a copy the second file is the one that was to be written.
    file = (remedy and error.filename2) or error.filename
    where = f"{file}: " if file else ""
    return f"{where}{reason[:1].lower()}{reason[1:]}{f'; {remedy}' if remedy else ''}."
