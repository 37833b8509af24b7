"""One child process of a deployment: `python -m fedpeft.deploy.launch ROLE FOLDER PARENT_PID ...`.

fleet    what sites reach of the coordinator, and Flower's own server behind it
run      the server's side of one run
worker   what has model and data at a site
"""

from __future__ import annotations

import importlib
import logging
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

from fedpeft.uncollected import uncollected

ROLES = {
    "fleet": "fedpeft.deploy.coordinator.face:main",
    "run": "fedpeft.deploy.coordinator.run:main",
    "worker": "fedpeft.deploy.site.worker:main",
}
POLL_S = 0.5
DEBUG = "FEDPEFT_DEBUG"
FILES = 65_536  # that a process may have open at once: each site is a connection, and its answer a file
LARGEST_CALL = 32 * 2**20  # bytes; what a site sends comes in objects of at most 5 MiB


def main(arguments: list[str]) -> None:
    """Run one role of a deployment: fleet, run or worker.

    Args:
        arguments: role, folder, process id of the parent (with which this process ends), and the role's own.
    """
    role, folder, parent, *rest = arguments
    follow(int(parent))
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now != resource.RLIM_INFINITY and now < FILES:
        wanted = FILES if most == resource.RLIM_INFINITY else min(most, FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    log_lines("" if role == "run" else f"{role}: ")
    module, act = ROLES[role].split(":")
    with uncollected(for_good=True):
        begin = getattr(importlib.import_module(module), act)
    begin(Path(folder), *rest)


def log_lines(who: str) -> None:
    """Our own lines on standard error, dated; Flower sets up its own."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(message)s"))
    logger = logging.getLogger("fedpeft")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if DEBUG in os.environ else logging.INFO)
    logger.propagate = False


def follow(parent: int) -> None:
    """End this process when its parent has ended, however that was."""

    def watch() -> None:
        # A parent that is killed can tell nobody, but its children get another one.
        while os.getppid() == parent:
            time.sleep(POLL_S)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1:])
