"""Worker processes that take a share of a round's messages each, and can be ended when a client dies or hangs in them.

A worker sees its whole share before it handles the first message, so that it can train the clients together. Answers
come one by one; what a worker that ended had not answered goes to others, but for the message it was busy with.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedpeft.clients.app import CohortApp
from fedpeft.errors import RunError

POLL_S = 0.05
Outcome = tuple[Message, RecordDict | None] | str
Job = tuple[str, Message, Context]  # a name of ours, and what the ClientApp is called with


class Worker:
    """One process and the pipe to it. The process says once that it is ready, then answers its jobs in order."""

    def __init__(self, make_app: Callable[[], ClientApp], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, make_app, threads), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False
        self.jobs: deque[Job] = deque()

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
    """`workers` processes; jobs are handed out in order of submission. A process that ended is replaced meanwhile.

    What waits is cut into shares by its number alone, never by who is idle: clients of a share train together, and how
    sums are rounded must not hang on which worker was the faster.

    Args:
        start: makes a worker.
        share: most jobs that one worker gets at a time.
    """

    def __init__(self, start: Callable[[], Worker], workers: int, share: int = 256) -> None:
        self.start, self.share = start, share
        self.jobs: deque[Job] = deque()
        self.shares: deque[list[Job]] = deque()
        self.workers = [start() for _ in range(workers)]
        for worker in self.workers:
            worker.get_ready()

    def submit(self, name: str, message: Message, context: Context) -> None:
        """Queue a job; it is handed out when outcomes are asked for, with all that are queued by then."""
        self.jobs.append((name, message, context))

    def finished(self, names: list[str]) -> list[tuple[str, Outcome]]:
        """Outcomes that have come in, after a short wait; a str is why there is none."""
        self._hand_out()
        done: list[tuple[str, Outcome]] = []
        awaited = [worker for worker in self.workers if worker.jobs or not worker.ready]
        spoke = wait([worker.pipe for worker in awaited], timeout=POLL_S)
        for worker in (worker for worker in awaited if worker.pipe in spoke):
            if not worker.ready:
                worker.get_ready()
            elif worker.jobs:
                done.append((worker.jobs[0][0], self._outcome(worker)))
        return [(name, outcome) for name, outcome in done if name in names]

    def cancel(self, names: list[str]) -> None:
        self.jobs = deque(job for job in self.jobs if job[0] not in names)
        left = [[job for job in share if job[0] not in names] for share in self.shares]
        self.shares = deque(share for share in left if share)
        for worker in list(self.workers):
            if any(job[0] in names for job in worker.jobs):
                self._replace(worker, [job for job in worker.jobs if job[0] not in names])

    def close(self) -> None:
        for worker in self.workers:
            worker.end()

    def _outcome(self, worker: Worker) -> Outcome:
        try:
            outcome: Outcome = worker.pipe.recv()
            worker.jobs.popleft()
            return outcome
        except (EOFError, ConnectionError):
            self._replace(worker, list(worker.jobs)[1:])
            return "the client's process ended"

    def _hand_out(self) -> None:
        size = min(self.share, -(-len(self.jobs) // len(self.workers)))
        while self.jobs:
            self.shares.append([self.jobs.popleft() for _ in range(min(size, len(self.jobs)))])
        idle = [worker for worker in self.workers if worker.ready and not worker.jobs]
        while idle and self.shares:
            worker = idle.pop(0)
            worker.jobs = deque(self.shares.popleft())
            worker.pipe.send([(message, context) for _, message, context in worker.jobs])

    def _replace(self, worker: Worker, left: list[Job]) -> None:
        """End a worker and start another; jobs that it left come first."""
        worker.end()
        if left:
            self.shares.appendleft(left)
        self.workers[self.workers.index(worker)] = self.start()


def serve(pipe: Connection[Any, Any], make_app: Callable[[], ClientApp], threads: int) -> None:
    """The worker's loop: a share of messages in, their outcomes out one by one, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it ends its workers
    threading.Thread(target=end_with_parent, daemon=True).start()
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
            jobs = pipe.recv()
        except EOFError:
            return
        if isinstance(app, CohortApp):
            app.prepare(jobs)
        for message, context in jobs:
            pipe.send(handle(app, message, context))


def end_with_parent() -> None:
    """End this process when its parent has: a worker that trained on would write beside the run that is resumed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def handle(app: ClientApp, message: Message, context: Context) -> tuple[Message, RecordDict | None]:
    """Reply and new client state; an exception becomes Flower's error reply."""
    try:
        return app(message, context), context.state
    except Exception as error:  # what a ClientApp may raise is not known here
        reason = f"{type(error)}:<'{error}'>"
        frames = traceback.extract_tb(error.__traceback__)
        where = f" at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason + where), reply_to=message), None
