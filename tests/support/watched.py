"""Records of runs in every state, and their page over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPMessage
from pathlib import Path
from typing import Any

from fedpeft.cli.watch import Server, Watched
from support.run_folders import CONFIG, Event, a_round, start

NAMES = ["client-0", "client-1", "client-2"]
BEGUN = 1_700_000_000.0
PRIVATE = {"privacy": {"unit": "sample", "release_metrics": False}}


def rounds(count: int, names: list[str] = NAMES, step: float = 10.0, **more: Any) -> list[Event]:
    """The start of a run of 20 rounds, and `count` rounds that are `step` seconds apart."""
    events = [
        {**start(names, rounds=20), "time": BEGUN},
        {"event": "evaluate", "round": 0, "accuracy": 0.2, "loss": 2.0},
    ]
    for number in range(1, count + 1):
        scores = {"accuracy": 0.2 + number / 100, "loss": 2.0}
        events.append(a_round(number, names, time=BEGUN + step * number, **scores, **more))
    return [{"time": BEGUN, **event} for event in events]


def lines(events: list[Event]) -> str:
    """As a record has them."""
    return "".join(json.dumps(event) + "\n" for event in events)


def folder(
    path: Path, events: list[Event] | None = None, config: dict[str, Any] | None = None, pid: int | None = None
) -> Path:
    """A run folder as a process leaves it that is at work (this one, or `pid`); no record where `events` is None."""
    path.mkdir()
    text = CONFIG.format(strategy="fedit", clients=3, seed=0) if config is None else json.dumps(config)
    (path / "resolved.yaml").write_text(text)
    (path / ".lock").write_text(json.dumps({"pid": pid or os.getpid(), "host": socket.gethostname()}))
    if events is not None:
        (path / "metrics.jsonl").write_text(lines(events))
    return path


def dead_process() -> int:
    """The number of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def state(watched: Watched) -> dict[str, Any]:
    """Of the only run."""
    (only,) = watched.states()["runs"]
    return only


@contextmanager
def served(*runs: Path) -> Iterator[Server]:
    """A server of these runs, in a thread."""
    with Server(Watched(runs)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(
    server: Server, name: str = "", method: str = "GET", **headers: str | list[str]
) -> tuple[int, HTTPMessage, str]:
    """Status, headers and text of an answer; `name` follows the token, or is a whole path."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    path = name if name.startswith("/") else f"/{server.token}/{name}"
    connection.putrequest(method, path, skip_host="Host" in headers)
    for key, value in headers.items():
        for each in value if isinstance(value, list) else [value]:
            connection.putheader(key.replace("_", "-"), each)
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, text
