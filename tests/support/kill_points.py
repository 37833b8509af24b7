"""A kill leaves something behind at every point: each write, half-written file, fsync, rename, removal and message.

A run is watched once. Before each of its operations, in all of its processes, its folder is copied as it then is: that
is what would be left if the process ended there. Copies that are equal are one. Beside each copy stands what had left
by then, so that a ledger can be held against it.
"""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import multiprocessing
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fedpeft.privacy.ledger import Ledger
from fedpeft.simulations.grid import LocalGrid
from fedpeft.strategies.wire import PACKED

VOLATILE = ("time", "seconds", "out")


@dataclass(frozen=True)
class Left:
    """The files of a run folder, and the accounts and rounds of which something had been sent."""

    files: dict[str, bytes]
    sent: frozenset[tuple[str, int]]

    def restore(self, run: Path) -> None:
        run.mkdir(parents=True)
        for name, data in self.files.items():
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_bytes(data)


class Watch:
    """Copies a run's folder before each of its operations.

    Attributes:
        points: operations so far, over all processes.
    """

    def __init__(self, run: Path, copies: Path) -> None:
        self.run, self.copies = run, copies
        copies.mkdir()
        self.lock = multiprocessing.get_context("fork").RLock()
        self.points = multiprocessing.get_context("fork").Value("i", 0)
        self.sent: set[tuple[str, int]] = set()
        self.open, self.replace = io.open, os.replace

    def copy(self) -> None:
        """Keep the folder as it is."""
        with self.lock:
            self.points.value += 1
            files = {}
            for path in sorted(self.run.rglob("*")) if self.run.exists() else ():
                if path.is_file():
                    with self.open(path, "rb") as file:
                        files[str(path.relative_to(self.run))] = file.read()
            data = pickle.dumps((files, sorted(self.sent)))
            target = self.copies / hashlib.sha256(data).hexdigest()
            if not target.exists():
                with self.open(target, "wb") as file:
                    file.write(data)
                order = len(list(self.copies.iterdir()))
                self.replace(target, target)
                os.utime(target, (order, order))

    def inside(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and Path(os.fspath(path)).is_relative_to(self.run)

    def before(self, act: Callable[..., Any], always: bool = False) -> Callable[..., Any]:
        """The operation, with a copy taken before it; no other process works meanwhile."""

        def watched(*arguments: Any, **options: Any) -> Any:
            if not (always or "dir_fd" in options or self.inside(arguments[0])):
                return act(*arguments, **options)
            with self.lock:
                self.copy()
                return act(*arguments, **options)

        return watched

    def opened(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        made = self.open(file, mode, *arguments, **options)
        return Halves(made, self) if set(mode) & set("wax+") and self.inside(file) else made

    def children(self) -> list[Left]:
        """All copies, oldest first."""
        found = sorted(self.copies.iterdir(), key=lambda path: path.stat().st_mtime)
        return [Left(files, frozenset(sent)) for files, sent in (pickle.loads(path.read_bytes()) for path in found)]


class Halves:
    """A file that is written in two halves, with a copy taken before each."""

    def __init__(self, file: Any, watch: Watch) -> None:
        self.file, self.watch = file, watch

    def write(self, data: Any) -> int:
        with self.watch.lock:
            for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                self.watch.copy()
                self.file.write(part)
                self.file.flush()
        return len(data)

    def truncate(self, *size: int) -> int:
        with self.watch.lock:
            self.file.flush()
            self.watch.copy()
            return int(self.file.truncate(*size))

    def __enter__(self) -> Halves:
        return self

    def __exit__(self, *what: Any) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def watched(run: Path, copies: Path, play: Callable[[], Any]) -> tuple[int, list[Left]]:
    """Play a run in a process of its own, and give the number of its points and what a kill at each would leave."""
    watch = Watch(run, copies)

    def child() -> None:
        builtins.open = io.open = watch.opened  # type: ignore[assignment]
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
            setattr(os, name, watch.before(getattr(os, name)))
        os.fsync = watch.before(os.fsync, always=True)
        Connection.send = watch.before(Connection.send, always=True)  # type: ignore[method-assign]
        push, finish = LocalGrid.push_messages, LocalGrid.finish

        def pushed(grid: LocalGrid, messages: Any) -> Any:
            messages = list(messages)
            for message in messages:  # a model of round n goes to clients when they evaluate it or train the next
                kind = message.metadata.message_type
                if kind in ("train", "evaluate"):
                    number = PACKED.open(message.content)[1].round
                    watch.sent |= {("server", done) for done in range(1, number + (kind == "evaluate"))}
            watch.copy()
            return push(grid, messages)

        def finished(grid: LocalGrid, name: str, outcome: Any) -> Any:
            request = grid.queue[name]
            reply = finish(grid, name, outcome)
            if request.metadata.message_type == "train" and not reply.has_error():
                client = f"client-{int(request.metadata.dst_node_id) - 2:03d}"
                watch.sent.add((client, PACKED.open(request.content)[1].round))
            watch.copy()
            return reply

        LocalGrid.push_messages, LocalGrid.finish = pushed, finished  # type: ignore[method-assign]
        play()
        watch.copy()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
    return watch.points.value, watch.children()


def ledgers(run: Path) -> dict[str, list[Any]]:
    return {
        path.stem: sorted(Ledger(path).entries(), key=str)
        for path in sorted((run / "ledger").glob("*.jsonl"))
        if Ledger(path).entries()
    }


def facts(run: Path) -> dict[str, Any]:
    """All that a run ends with, but for times: adapters, summary, events, ledgers, what clients keep."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if key not in VOLATILE}
        return [plain(item) for item in value] if isinstance(value, list) else value

    kept = [*run.glob("adapter/**/*.safetensors"), *run.glob("clients/*/*.safetensors")]
    return {
        "summary": plain(json.loads((run / "summary.json").read_text())),
        "events": [plain(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()],
        "ledgers": ledgers(run),
        "files": {str(path.relative_to(run)): tensors(path) for path in sorted(kept)},
    }


def tensors(path: Path) -> dict[str, Any]:
    """Bits and metadata of a safetensors file, whose header has no order."""
    with safe_open(path, framework="np") as file:
        return {**(file.metadata() or {}), **{key: file.get_tensor(key).tobytes() for key in file.keys()}}  # noqa: SIM118
