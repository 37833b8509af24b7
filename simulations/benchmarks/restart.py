"""A coordinator is killed in mid-run, with all of its processes, and started again: seconds to the next round's start.

    python -m fedpeft.simulations.benchmarks.restart OUT [TIMES]

Two sites on loopback as in `deploy_overhead`, which stay. Of each restart, the seconds until the coordinator says that
it is ready, until the run's process has its model, and until the next round begins. Writes OUT/restart.json.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from fedpeft.deploy import settings
from fedpeft.deploy.coordinator import server as commands
from fedpeft.errors import RunError
from fedpeft.simulations.benchmarks.deploy_overhead import CONFIG, SITES, prepared, running

PATIENCE_S, LOOK_S = 300.0, 0.02
BETWEEN = 3  # rounds from a restart to the next kill
CLI = [sys.executable, "-m", "fedpeft.cli.main"]
LINE = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) .*goes on after round", re.M)


def main(root: Path, times: int) -> dict[str, Any]:
    """Measure, write OUT/restart.json."""
    root.mkdir(parents=True, exist_ok=True)
    coordinator = prepared(root)
    config = root / "restart.yaml"
    config.write_text(json.dumps({**CONFIG, "run": {"rounds": 100_000}}))
    sites = {name: [*CLI, "site", "start", str(root / name)] for name in SITES}
    with running(root, sites):
        process = start(root, coordinator)
        try:
            commands.await_sites(coordinator, len(SITES), PATIENCE_S)
            folder = coordinator / "runs" / commands.run(coordinator, str(config), [])["run"]
            rows = []
            for _ in range(times):
                reached = len(rounds(folder)) + BETWEEN
                while len(rounds(folder)) < reached:
                    time.sleep(LOOK_S)
                kill_tree(process)
                process, row = restarted(root, coordinator, folder)
                rows.append(row)
        finally:
            process.terminate()
            process.wait()
    medians = {key: round(statistics.median(row[key] for row in rows), 2) for key in rows[0]}
    result = {"times": times, "median": medians, "rows": rows}
    (root / "restart.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def start(root: Path, coordinator: Path) -> subprocess.Popen[bytes]:
    """The coordinator, whose log goes on."""
    with (root / "coordinator.log").open("ab") as log:
        command = [*CLI, "server", "start", str(coordinator)]
        return subprocess.Popen(command, stdout=log, stderr=log, env=settings.environment(root), start_new_session=True)


def restarted(root: Path, coordinator: Path, folder: Path) -> tuple[subprocess.Popen[bytes], dict[str, float]]:
    """Start it again: the process, and the seconds to each step."""
    log, before = root / "coordinator.log", len(rounds(folder))
    ready = log.read_text(errors="replace").count("coordinator ready")
    process, begun = start(root, coordinator), time.time()
    until(lambda: log.read_text(errors="replace").count("coordinator ready") > ready, "the coordinator")
    ready_s = time.time() - begun
    until(lambda: len(rounds(folder)) > before, "the next round")
    next_s = time.time() - begun - rounds(folder)[before]["seconds"]
    said = LINE.findall((folder / "log.txt").read_text(errors="replace"))[-1]
    loaded_s = datetime.strptime(said, "%Y-%m-%d %H:%M:%S,%f").timestamp() - begun
    row = {"ready_s": ready_s, "model_s": loaded_s, "next_round_s": next_s, "load": os.getloadavg()[0]}
    return process, {key: round(value, 2) for key, value in row.items()}


def rounds(folder: Path) -> list[dict[str, Any]]:
    """The rounds that a run has recorded."""
    return [event for event in commands.events_of(folder) if event["event"] == "round"]


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and its children, the parent first."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [list(map(int, line.split())) for line in listed.splitlines()]
    children = [number for number, parent in pairs if parent == process.pid]
    for number in (process.pid, *children):
        os.kill(number, signal.SIGKILL)
    process.wait()


def until(done: Callable[[], bool], what: str) -> None:
    """Wait for something.

    Raises:
        RunError: it does not come about.
    """
    end = time.monotonic() + PATIENCE_S
    while not done():
        if time.monotonic() > end:
            raise RunError(f"{what}: not within {PATIENCE_S:g} s.")
        time.sleep(LOOK_S)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]).absolute(), int(sys.argv[2]) if len(sys.argv) > 2 else 5), indent=1))
