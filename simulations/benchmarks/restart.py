"""A coordinator is killed in mid-run, with all of its processes, and started again: seconds to the next round's start.

    python -m fedpeft.simulations.benchmarks.restart OUT [TIMES]

Two sites on loopback as in `deploy_overhead`, which stay. Of each restart, the seconds until the coordinator says that
it is ready, until the next round begins, and until it ends; and the CPU seconds that the coordinator's processes have
used when it begins, all together and the run's own, which other work on the machine changes less. Writes
OUT/restart.json.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedpeft.deploy import settings
from fedpeft.deploy.address import answers
from fedpeft.deploy.coordinator import server as commands
from fedpeft.errors import RunError
from fedpeft.simulations.benchmarks.deploy_overhead import CONFIG, SITES, prepared, running

PATIENCE_S, LOOK_S = 300.0, 0.02
BETWEEN = 3  # rounds from a restart to the next kill
CLI = [sys.executable, "-m", "fedpeft.cli.main"]
READY, GOES_ON = "coordinator ready", "goes on after round"


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
    ready, resumed = count(root / "coordinator.log", READY), count(folder / "log.txt", GOES_ON)
    process, begun = start(root, coordinator), time.time()
    until(lambda: count(folder / "log.txt", GOES_ON) > resumed, "the run")
    until(lambda: answers("127.0.0.1", settings.server(coordinator).settings.control_port), "the SuperLink")
    spent = cpu_seconds(process)
    until(lambda: count(root / "coordinator.log", READY) > ready, "the coordinator")
    ready_s = time.time() - begun
    # By time: what was recorded of a round after the last checkpoint comes again.
    until(lambda: any(event["time"] > begun for event in rounds(folder)), "the next round")
    event = next(event for event in rounds(folder) if event["time"] > begun)
    row = {
        "ready_s": ready_s,
        "next_round_s": event["time"] - begun - event["seconds"],
        "its_end_s": event["time"] - begun,
        "cpu_s": sum(spent.values()),
        "run_cpu_s": spent.get("run", 0.0),
        "load": os.getloadavg()[0],
    }
    return process, {key: round(value, 2) for key, value in row.items()}


def count(file: Path, words: str) -> int:
    """How often a log says this."""
    return file.read_text(errors="replace").count(words)


def cpu_seconds(process: subprocess.Popen[bytes]) -> dict[str, float]:
    """CPU seconds that a coordinator's processes have used, by their roles; its own as coordinator."""
    spent = {}
    for number in (process.pid, *children_of(process)):
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        words = Path(f"/proc/{number}/cmdline").read_text().split("\0")
        role = words[words.index("fedpeft.deploy.launch") + 1] if "fedpeft.deploy.launch" in words else "coordinator"
        spent[role] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime
    return spent


def rounds(folder: Path) -> list[dict[str, Any]]:
    """The rounds that a run has recorded."""
    return [event for event in commands.events_of(folder) if event["event"] == "round"]


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and its children, the parent first."""
    for number in (process.pid, *children_of(process)):
        os.kill(number, signal.SIGKILL)
    process.wait()


def children_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Its children's process ids."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [list(map(int, line.split())) for line in listed.splitlines()]
    return [number for number, parent in pairs if parent == process.pid]


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
