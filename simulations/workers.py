"""Worker processes that handle one message at a time and can be ended when a client dies or hangs in them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedpeft.errors import RunError

POLL_S = 0.05
Outcome = tuple[Message, RecordDict | None] | str


class Worker:
    """One process and the pipe to it. The process says once that it is ready, then answers a message at a time."""

    def __init__(self, make_app: Callable[[], ClientApp], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, make_app, threads), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False
        self.job: str | None = None

    def get_ready(self) -> None:
        """Take the word that it is ready, waiting for it if need be.

        Raises:
            RunError: it could not start.
        """
        try:
            failure = self.pipe.recv()
        except (EOFError, ConnectionError):
            failure = "it ended"
        if failure is not None:
            raise RunError(f"a worker process could not start: {failure}")
        self.ready = True

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Pool:
    """`workers` processes; jobs are handed out in order of submission. A process that ended is replaced meanwhile."""

    def __init__(self, make_app: Callable[[], ClientApp], workers: int, threads: int) -> None:
        self.make_app, self.threads = make_app, threads
        self.jobs: deque[tuple[str, Message, Context]] = deque()
        self.workers = [Worker(make_app, threads) for _ in range(workers)]
        for worker in self.workers:
            worker.get_ready()

    def submit(self, name: str, message: Message, context: Context) -> None:
        self.jobs.append((name, message, context))
        self._hand_out()

    def finished(self, names: list[str]) -> list[tuple[str, Outcome]]:
        """Outcomes that have come in, after a short wait; a str is why there is none."""
        done: list[tuple[str, Outcome]] = []
        awaited = [worker for worker in self.workers if worker.job or not worker.ready]
        spoke = wait([worker.pipe for worker in awaited], timeout=POLL_S)
        for worker in (worker for worker in awaited if worker.pipe in spoke):
            if not worker.ready:
                worker.get_ready()
            elif worker.job:
                done.append((worker.job, self._outcome(worker)))
        self._hand_out()
        return [(name, outcome) for name, outcome in done if name in names]

    def cancel(self, names: list[str]) -> None:
        self.jobs = deque(job for job in self.jobs if job[0] not in names)
        for worker in list(self.workers):
            if worker.job in names:
                self._replace(worker)

    def close(self) -> None:
        for worker in self.workers:
            worker.end()

    def _outcome(self, worker: Worker) -> Outcome:
        try:
            outcome: Outcome = worker.pipe.recv()
            worker.job = None
            return outcome
        except (EOFError, ConnectionError):
            self._replace(worker)
            return "the client's process ended"

    def _hand_out(self) -> None:
        for worker in self.workers:
            if worker.ready and worker.job is None and self.jobs:
                name, message, context = self.jobs.popleft()
                worker.job = name
                worker.pipe.send((message, context))

    def _replace(self, worker: Worker) -> None:
        worker.end()
        self.workers[self.workers.index(worker)] = Worker(self.make_app, self.threads)


def serve(pipe: Connection[Any, Any], make_app: Callable[[], ClientApp], threads: int) -> None:
    """The worker's loop: one message in, one outcome out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it ends its workers
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    try:
        app = make_app()
    except Exception as error:  # reported to the parent, which raises it
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send(None)
    while True:
        try:
            message, context = pipe.recv()
        except EOFError:
            return
        pipe.send(handle(app, message, context))


def handle(app: ClientApp, message: Message, context: Context) -> tuple[Message, RecordDict | None]:
    """Reply and new client state; an exception becomes Flower's error reply."""
    try:
        return app(message, context), context.state
    except Exception as error:  # what a ClientApp may raise is not known here
        reason = f"{type(error)}:<'{error}'>"
        frames = traceback.extract_tb(error.__traceback__)
        where = f" at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason + where), reply_to=message), None
