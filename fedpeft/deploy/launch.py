"""One child process of a deployment: `python -m fedpeft.deploy.launch ROLE FOLDER PARENT_PID ...`.

superlink, supernode   Flower's own programs, with the options that a deployment needs
run                    the server's side of one run
proxy, worker          a site's client: the thin Flower side, and the process that has model and data
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

POLL_S = 0.5
LARGEST_CALL = 32 * 2**20  # bytes
OWN_POLL_S = 0.1  # of what is in the same process


def main(arguments: list[str]) -> None:
    """Run one role of a deployment: superlink, supernode, run, proxy or worker.

    Args:
        arguments: role, folder, process id of the parent (with which this process ends), and the role's own.
    """
    role, folder, parent, *rest = arguments
    follow(int(parent))
    log_lines("" if role == "run" else f"{role}: ")
    if role == "superlink":
        superlink(rest)
    elif role == "supernode":
        supernode(rest)
    elif role == "run":
        from fedpeft.deploy.coordinator.run import main as play

        play(Path(folder), *rest)
    elif role == "proxy":
        from fedpeft.deploy.site.proxy import main as proxy

        proxy(Path(folder), *rest)
    elif role == "worker":
        from fedpeft.deploy.site.worker import main as worker

        worker(Path(folder), *rest)
    else:
        raise SystemExit(f"unknown role {role}")


def log_lines(who: str) -> None:
    """Our own lines on standard error, dated; Flower sets up its own."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(message)s"))
    logger = logging.getLogger("fedpeft")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
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


def superlink(arguments: list[str]) -> None:
    """Flower's SuperLink; what a site sends comes in chunks of at most 5 MiB."""
    from fedpeft.deploy.coordinator.flower import run_superlink

    run_superlink(arguments, LARGEST_CALL)


def supernode(arguments: list[str]) -> None:
    """Flower's SuperNode asks for work every 3 s, and for its client's reply every 0.5 s; neither has an option."""
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli.flower_supernode import flower_supernode

    pace = SimpleNamespace(sleep=lambda seconds: time.sleep(POLL_S if seconds > 1 else OWN_POLL_S))
    # In that module alone: everything else in the process keeps its clock.
    vars(start_client_internal)["time"] = pace
    sys.argv = ["flower-supernode", *arguments]
    flower_supernode()


if __name__ == "__main__":
    main(sys.argv[1:])
