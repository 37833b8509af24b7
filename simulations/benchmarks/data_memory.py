"""Memory of a tree of processes while it works, as Linux tells it in /proc/PID/smaps_rollup, twice a second.

anonymous   pages that are of no file: what a process has made for itself
resident    these and the pages of files that are in memory, as those of libraries and of a mapped cache; what several
            processes have counts for each
shared      as resident, but a page that several processes have counts in parts (proportional set size), so that the sum
            counts it once; processes of others that have mapped the same libraries take their part
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryFile

from fedpeft.errors import RunError

LOOK_S = 0.5
ADOPT_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER of Linux' prctl
KEYS = {"Rss": "resident", "Pss": "shared", "Anonymous": "anonymous"}
Sample = tuple[float, dict[str, float]]  # seconds of the clock that processes share, MB


def memory(process: int | str = "self") -> dict[str, float]:
    """MB of a process: resident, shared, anonymous.

    Raises:
        RunError: the kernel does not say.
    """
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except FileNotFoundError as error:
        if not Path("/proc/self/smaps_rollup").exists():
            raise RunError("bench data: memory is read from /proc/PID/smaps_rollup, which Linux has.") from error
        raise
    rows = (line.partition(":") for line in text.splitlines()[1:])
    return {KEYS[key]: float(value.split()[0]) * 1024 / 1e6 for key, _, value in rows if key in KEYS}


def watched(command: list[str], environment: dict[str, str]) -> tuple[float, list[Sample]]:
    """When a command was started, and the memory of it and all that descends from it until it ended.

    Raises:
        RunError: it failed.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_watch, command, environment).result()


def _watch(command: list[str], environment: dict[str, str]) -> tuple[float, list[Sample]]:
    """Called in a process that has had no other child: those of a run that outlive their parent become its own."""
    ctypes.CDLL(None).prctl(ADOPT_ORPHANS, 1, 0, 0, 0)
    samples: list[Sample] = []
    with TemporaryFile("w+") as said:
        began = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        while process.poll() is None:
            samples.append((time.monotonic(), _sum(list(descendants(os.getpid())))))
            time.sleep(LOOK_S)
        said.seek(0)
        if process.returncode:
            raise RunError(f"bench data: {' '.join(command[1:4])} failed: {said.read()[-2000:]}")
    return began, samples


def _sum(processes: list[int]) -> dict[str, float]:
    total = dict.fromkeys(KEYS.values(), 0.0)
    for number in processes:
        try:
            found = memory(number)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended
        for key, value in found.items():
            total[key] += value
    return total


def peak(samples: list[Sample], key: str, since: float = 0.0, until: float = float("inf")) -> float:
    """The largest value of a key between two moments; 0 where nothing was looked at."""
    return max((found[key] for moment, found in samples if since <= moment <= until), default=0.0)


def descendants(root: int) -> dict[int, tuple[float, float]]:
    """CPU seconds and resident bytes of every process below this one."""
    tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    parents, found = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()  # the name before may hold anything
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        number = int(path.parent.name)
        parents[number] = int(fields[1])
        found[number] = ((int(fields[11]) + int(fields[12])) / tick, float(fields[21]) * page)
    below = {root}
    while more := {number for number, parent in parents.items() if parent in below} - below:
        below |= more
    return {number: found[number] for number in below - {root}}
