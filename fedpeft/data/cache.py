"""A cache of what was made of records, in folders that are there whole or not at all, named by all that they depend on.

    NAME-<hash>/facts.json   what was made, and size and checksum of every file beside it
    NAME-<hash>/...

A folder is made under another name and moved into place, so that of two processes that make one at once the first
wins and both are right. A folder whose files are not those that its facts tell is made again, which is said. Nothing
that is sound is deleted, but where somebody else can ask for ever more (`Cache.most`): a user may delete a cache
whenever no run uses it. One that nobody has named is a help and no need, so that a run goes on where there can be none.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fedpeft.errors import InputError
from fedpeft.files import blame_file, explain_error, scratch_folder

log = logging.getLogger("fedpeft.data")
FOLDER = ".fedpeft-cache"  # beside the folders of runs
FACTS = "facts.json"
SMALL = 8_000_000  # bytes of a source below which reading it anew takes less than a second or two
PIECE = 2**20
TRIES = 3
READERS = ("numpy", "pillow", "pyarrow")


@dataclass(frozen=True)
class Cache:
    """A folder for caches.

    Attributes:
        root: the folder.
        least: bytes below which nothing is kept.
        named: a user has asked for it, so that it is an error where it cannot be written.
        most: caches of one name that are kept, the newest; None is all. What a process has mapped stays its own.
    """

    root: Path
    least: int = SMALL
    named: bool = False
    most: int | None = None

    def get(self, name: str, facts: dict[str, Any], make: Callable[[Path], dict[str, Any]]) -> tuple[Path, Any] | None:
        """The folder for these facts, made if it is not there, and what `make` has returned when it was.

        None, which is said, where it cannot be read or written and nobody has named it.

        Args:
            facts: all that the content depends on, as JSON has it.
            make: writes files into an empty folder.

        Raises:
            OSError: it cannot be read or written; names the place.
            InputError: it is damaged each time that it was made.
        """
        folder = self.root / f"{name}-{hash_facts(facts)[:32]}"
        try:
            return folder, self._read_found(folder, make)
        except OSError as error:
            if self.named:
                raise
            log.warning("nothing is kept for later processes and runs: %s", explain_error(error))
            return None

    def _read_found(self, folder: Path, make: Callable[[Path], dict[str, Any]]) -> Any:
        for _ in range(TRIES):
            found = sound(folder)
            if found is not None:
                return found
            if folder.exists():
                found = sound(folder)  # another process may just have made it again
                if found is not None:
                    return found
                log.warning("%s is damaged or was not finished; it is made again.", folder)
                _discard_folder(folder)
            self._make(folder, make)
            self._trim_old(folder)
        # No RunError: the name of a place at a site is not for its coordinator.
        raise InputError(f"{folder}: what was written is not what is read. See to that disk, or set data.cache.")

    def _trim_old(self, folder: Path) -> None:
        """Discard all but the newest caches of this folder's name, which counts as the newest."""
        if self.most is None:
            return
        name = folder.name.rpartition("-")[0]
        others = [path for path in self.root.glob(f"{name}-*") if path != folder]
        others.sort(key=lambda path: path.stat().st_mtime_ns)
        for path in others[: max(0, len(others) + 1 - self.most)]:
            _discard_folder(path)

    def _make(self, folder: Path, make: Callable[[Path], dict[str, Any]]) -> None:
        with blame_file(self.root):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds what the records hold
        with scratch_folder(self.root, "making") as place:
            made = place / "made"
            made.mkdir(mode=0o700)
            returned = make(made)
            files = {path.name: [path.stat().st_size, checksum(path)] for path in sorted(made.iterdir())}
            with blame_file(folder):
                (made / FACTS).write_text(json.dumps({"files": files, "made": returned}))
                try:
                    made.rename(folder)
                except OSError:
                    if not folder.exists():
                        raise
        size = sum(entry[0] for entry in files.values())
        log.info("%s: %.1f MB for later runs; it can be deleted when no run uses it.", folder, size / 1e6)


def sound(folder: Path) -> Any | None:
    """What `make` has returned for this folder; None where it is not there, or not what it was.

    Raises:
        OSError: it cannot be looked at, which is no damage.
    """
    try:
        tree = json.loads((folder / FACTS).read_text())
        for name, (size, check) in tree["files"].items():
            path = folder / name
            if path.stat().st_size != size or checksum(path) != check:
                return None
        return tree["made"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:  # read, not mapped: mapped pages count as this process's memory
        while piece := file.read(PIECE):
            # Against what a disk loses; who may write here could change the facts as well.
            value = zlib.crc32(piece, value)
    return value


def hash_facts(facts: Any) -> str:
    """sha256 of facts as JSON has them."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def hash_code(*more: type) -> list[str]:
    """The code that records are read and encoded by, and that of these classes, and the libraries' versions: another
    one may do it otherwise.
    """
    files = {str(path) for path in Path(__file__).parent.glob("*.py")}
    for cls in more:
        files |= {str(inspect.getsourcefile(base)) for base in cls.__mro__ if base.__module__ != "builtins"}
    whole = hash_facts([hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in sorted(files)])
    return [whole, *(f"{name} {metadata.version(name)}" for name in READERS), *(cls.__qualname__ for cls in more)]


def hash_content(path: Path) -> tuple[str, int]:
    """sha256 of a file, or of all names and files of a folder, and their bytes."""
    if path.is_file():
        return _hash_file(path)
    hashes, total = [], 0
    for inner in sorted(entry for entry in path.rglob("*") if entry.is_file()):
        name, size = _hash_file(inner)
        hashes.append([str(inner.relative_to(path)), name])
        total += size
    return hash_facts(hashes), total


def _hash_file(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size


def _discard_folder(folder: Path) -> None:
    """Take a folder out of the way first: another process may look at it."""
    with scratch_folder(folder.parent, "making") as place, suppress(FileNotFoundError):  # another process was faster
        folder.rename(place / folder.name)
