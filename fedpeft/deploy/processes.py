"""Child processes that are started, started again when they end, and never outlive the process that started them.

Each is `python -m fedpeft.deploy.launch ROLE FOLDER ...` in a session of its own: Ctrl-C reaches the parent, which ends
them; a parent that was killed is missed by each child itself (`launch.follow`).
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

log = logging.getLogger("fedpeft")
GRACE_S = 4.0
LONGEST_PAUSE_S = 30.0
STEADY_S = 60.0  # a process that ran so long is started again without a pause
NO_ROOM = os.EX_IOERR  # the code of a process whose disk is full, on which its own log lies
WHY = {NO_ROOM: ", for its disk is full: make room there"}


@dataclass
class Child:
    """One process and when it may be started again. One that is `piped` is given its end of a pipe as last argument."""

    role: str
    command: list[str]
    env: dict[str, str]
    output: Path | None = None
    piped: bool = False
    pipe: Connection | None = None
    process: subprocess.Popen[bytes] | None = None
    pause_s: float = 0.0
    begun: float = field(default=0.0)

    def start(self) -> None:
        """Start the process in a session of its own, so that Ctrl-C does not reach it; it appends to `output`."""
        stream = self.output.open("ab") if self.output else None
        ours, theirs = Pipe() if self.piped else (None, None)
        ends = [str(theirs.fileno())] if theirs else []
        try:
            self.process = subprocess.Popen(
                [*self.command, *ends],
                pass_fds=list(map(int, ends)),
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        finally:
            if theirs:
                theirs.close()  # so that the end of the process is the end of the pipe
            if stream:
                stream.close()
        self.pipe = ours
        self.begun = time.monotonic()

    def keep(self) -> None:
        """Start it again if it has ended and its pause is over."""
        if self.process is None or self.process.poll() is None:
            return
        lasted = time.monotonic() - self.begun
        if lasted > STEADY_S:
            self.pause_s = 0.0
        if lasted < self.pause_s:
            return
        code = self.process.returncode
        log.warning("%s ended with code %s%s; it is started again.", self.role, code, WHY.get(code, ""))
        # Longer each time, or what ends at once would be started again without a pause.
        self.pause_s = min(LONGEST_PAUSE_S, 2 * self.pause_s or 1.0)
        self.start()


def launch_command(role: str, folder: Path, *arguments: str) -> list[str]:
    """The command of a role."""
    return [sys.executable, "-m", "fedpeft.deploy.launch", role, str(folder), str(os.getpid()), *arguments]


def end_children(children: list[Child]) -> None:
    """Ask each to end, last one first; kill what has not done so in time."""
    # The last one first: those behind it would take the end of what they need for a fault.
    running = [child.process for child in reversed(children) if child.process and child.process.poll() is None]
    for process in running:
        process.terminate()
    until = time.monotonic() + GRACE_S
    for process in running:
        try:
            process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
