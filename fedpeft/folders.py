"""Folders that results go into: found free or refused, held by one process at a time, and left as they were found where
nothing came of it. Only what this process made is ever removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shlex
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fedpeft.errors import InputError
from fedpeft.files import blame_file

log = logging.getLogger("fedpeft")
LOCK = ".lock"
POLL_S = 0.05
# Round, and which of its states. Other names are copies that file managers and synchronisation leave: round-000007 (1).
CHECKPOINT = re.compile(r"round-([0-9]{6,9})(?:\.([0-9]{1,9}))?")


@dataclass(frozen=True)
class Made:
    """A folder for results, and which folders were made for it, outermost first.

    `link` is what shall point to it: `runs/NAME` to `runs/NAME-3`.
    """

    path: Path
    created: list[Path] = field(default_factory=list)
    link: Path | None = None

    def undo(self, *names: str) -> None:
        """Remove these files and the folders that were made, as far as they hold nothing else."""
        with contextlib.suppress(OSError):  # the first that is not empty, and so the ones around it, stay
            for name in names:
                (self.path / name).unlink(missing_ok=True)
            for folder in reversed(self.created):
                folder.rmdir()

    def point(self) -> None:
        """Let the link point here, unless there is something of the user's under its name, which is said."""
        if self.link is None:
            return
        number = _number_in(self.link, self.path.name) or 0
        old = os.readlink(self.link) if self.link.is_symlink() else None
        if (old is None and os.path.lexists(self.link)) or (old is not None and _number_in(self.link, old) is None):
            log.warning("%s is not a link that fedpeft made, and stays; the newest run is %s.", self.link, self.path)
        elif old is None or (_number_in(self.link, old) or 0) < number:
            draft = self.link.with_name(f".{self.path.name}.link")
            with contextlib.suppress(OSError):  # a file system without links
                draft.symlink_to(self.path.name)
                # By a rename, so that there is a link at any moment.
                draft.replace(self.link)


def real(path: Path | str, flag: str) -> Path:
    """The absolute path with all links followed.

    Raises:
        InputError: no file can be there; says why.
    """
    try:
        place = Path(path).expanduser()
        found = place.resolve()
        if place.is_symlink() and not found.exists():
            raise InputError(
                f"{flag}: {path} is a link to {found}, which is not there. Make that folder, or remove the link."
            )
        found.stat()
    except FileNotFoundError:
        return found
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError is a loop of links
        if isinstance(error, InputError):
            raise
        raise InputError(_refuse_path(flag, path, error)) from error
    return found


def run_folder(path: Path | str) -> Path:
    """An existing run folder, by itself or by a link to it.

    Raises:
        InputError: there is no run.
    """
    run = real(path, "DIR")
    if not run.is_dir():
        raise InputError(f"{path}: {'not a folder' if run.exists() else 'no such folder'}.")
    if not (run / "resolved.yaml").is_file():
        raise InputError(f"{path}: no resolved.yaml, so this is not a run folder.")
    return run


def list_complete_rounds(run: Path) -> list[int]:
    """Rounds of which the run has a checkpoint, in their order; whether it can be read is not looked at."""
    found = (CHECKPOINT.fullmatch(path.name) for path in (run / "checkpoints").glob("round-*") if path.is_dir())
    return sorted({int(name[1]) for name in found if name})


def advice(run: Path) -> str:
    """How a run that was broken off goes on."""
    rounds = list_complete_rounds(run)
    if not rounds:
        if not (run / "resolved.yaml").is_file():
            return f"Nothing has begun. What there is lies in {run}."
        return f"No round was complete. Begin again with: fedpeft resume {shlex.quote(_shorten_path(run))}"
    return f"The last complete round is {rounds[-1]}. Go on with: fedpeft resume {shlex.quote(_shorten_path(run))}"


def _shorten_path(path: Path) -> str:
    """As seen from the current folder, where it is below that."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) and path != here else str(path)


@contextmanager
def new(
    path: Path | str | None, default: Path, flag: str = "--out", hint: str = "", own: Sequence[str] = ()
) -> Iterator[Made]:
    """A new or empty folder, held by this process; it is for the caller to undo it where nothing comes of it.

    Args:
        default: NAME, where no path is given: the folder is NAME-1, NAME-2, ..., the one after the highest there is.
        flag: what to blame.
        hint: what else could be done with a folder that is not empty; {} is the folder.
        own: patterns of names that may be in it: results that the caller goes on with.

    Raises:
        InputError: it is not empty, in use, or it cannot be made or written in.
    """
    made = _make_numbered(default) if path is None else empty(path, flag, hint, own)
    try:
        with alone(made.path):
            _require_empty(made.path, flag, hint, own)  # another process may have come and gone before it was locked
            yield made
    except InputError:
        made.undo()
        raise


def empty(path: Path | str, flag: str, hint: str, own: Sequence[str] = ()) -> Made:
    """An empty folder, made if it is not there; InputError where that cannot be."""
    made = Made(real(path, flag))
    try:
        _require_empty(made.path, flag, hint, own)
        _make_folders(made.path, made.created)
        if not os.access(made.path, os.W_OK | os.X_OK):
            raise PermissionError(None, "nothing can be written in it")
    except OSError as error:
        made.undo()
        raise InputError(_refuse_path(flag, path, error)) from error
    return made


def require_new(path: Path | str, flag: str) -> None:
    """Raise InputError where a result would go among other files; makes nothing."""
    _require_empty(real(path, flag), flag, "")


def _require_empty(folder: Path, flag: str, hint: str, own: Sequence[str] = ()) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{flag}: {folder} is a file. Give a new folder.")
    other = [
        entry.name
        for entry in folder.iterdir()
        if entry.name != LOCK and not any(fnmatchcase(entry.name, pattern) for pattern in own)
    ]
    if other:
        hint = hint if (folder / "resolved.yaml").is_file() else ""
        what = "not empty" if hint else "not an empty folder"
        if own:
            what = f"not a folder of this benchmark's results: {min(other)} is in it"
        raise InputError(f"{flag}: {folder} is {what}. Give a new folder{hint.format(folder)}.")


def _make_numbered(name: Path) -> Made:
    parent = real(name.parent, "--out")
    made = Made(parent)
    try:
        _make_folders(parent, made.created)
        while True:
            numbers = [_number_in(name, entry) or 0 for entry in os.listdir(parent)]
            folder = parent / f"{name.name}-{max(numbers, default=0) + 1}"
            try:
                folder.mkdir()
            except FileExistsError:  # another process was faster
                continue
            return Made(folder, [*made.created, folder], parent / name.name)
    except OSError as error:
        made.undo()
        raise InputError(_refuse_path("--out", name, error) + " Give another place with --out.") from error


@contextmanager
def filled(path: Path | str, flag: str) -> Iterator[Path]:
    """A new or empty folder that gets its content at the end or not at all: a draft inside it to write to.

    Raises:
        InputError: the folder is not empty, or cannot be made.
    """
    with new(path, Path(), flag) as made:
        # Inside it, so on one file system: each entry then comes by a rename.
        draft = made.path / f".draft.{os.getpid()}"
        try:
            draft.mkdir()
            yield draft
            for entry in sorted(draft.iterdir()):
                entry.replace(made.path / entry.name)
            draft.rmdir()
            (made.path / LOCK).unlink(missing_ok=True)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            made.undo(LOCK)
            raise


@contextmanager
def alone(folder: Path, name: str = LOCK, patience_s: float = 0.0) -> Iterator[None]:
    """Be the only process at work in a folder. The lock ends with the process, however it ends.

    Args:
        name: of the lock's file.
        patience_s: how long to wait for another process to end.

    Raises:
        InputError: another process holds it; says which.
    """
    path = folder / name
    handle = _lock_file(path, time.monotonic() + patience_s)
    try:
        with blame_file(path):
            os.ftruncate(handle, 0)
            os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield
    finally:
        os.close(handle)


def at_work(folder: Path) -> bool | None:
    """Whether the process that last locked a folder lives; None where that cannot be known, as on another machine.

    The lock itself is not tried: whoever begins in that moment would find it taken.
    """
    try:
        holder: Any = json.loads((folder / LOCK).read_bytes()[:4096])
        if holder["host"] != socket.gethostname():
            return None
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process
        return True
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return True


def _lock_file(path: Path, until: float) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _name_holder(handle)
            os.close(handle)
            if time.monotonic() < until:
                time.sleep(POLL_S)
                continue
            raise InputError(
                f"{path.parent}: already running: {holder} works in this folder. One at a time may; wait "
                "until that one has ended, or end it."
            ) from None
        except OSError as error:
            log.warning(
                "%s cannot be locked (%s): see to it that no second process works in %s.",
                path,
                error.strerror,
                path.parent,
            )
            return handle
        with contextlib.suppress(FileNotFoundError):  # a process that has just ended may have removed it
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                return handle
        os.close(handle)


def _name_holder(handle: int) -> str:
    try:
        found: Any = json.loads(os.pread(handle, 4096, 0))
        return f"process {int(found['pid'])} on {found.get('host', 'this machine')}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "another process"


def _make_folders(folder: Path, created: list[Path]) -> None:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(None, f"{folder} is a file")
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):  # made by another process meanwhile: not ours to remove
            path.mkdir()
            created.append(path)


def _number_in(name: Path, entry: str) -> int | None:
    found = re.fullmatch(re.escape(name.name) + r"-([0-9]{1,9})", entry)
    return int(found[1]) if found else None


def _refuse_path(flag: str, path: Path | str, error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{flag}: {path} cannot be used: {reason[:1].lower()}{reason[1:]}."
