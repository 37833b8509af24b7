"""Worker processes that take a share of a round's messages each, and can be ended when a client dies or hangs in them.

A worker sees its whole share before it handles the first message, so that it can train the clients together. Answers
come one by one; what a worker that ended had not answered goes to others, but for the message it was busy with.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedpeft.clients.app import CohortApp
from fedpeft.errors import RunError
from fedpeft.files import explain_error
from fedpeft.flower import ErrorCode

log = logging.getLogger("fedpeft")
POLL_S = 0.05
SHM = Path("/dev/shm")
LOSSES = 3  # machines that may be lost with a client before it is given up: it may be what ends them
LITTLE = 16e6  # bytes of it
Answer = tuple[Message, RecordDict | None]
Outcome = Answer | str
Job = tuple[str, Message, Context]  # a name of ours, and what the ClientApp is called with


@dataclass(frozen=True)
class Broken:
    """In place of an outcome: the machine, on which all clients are, cannot go on, and why."""

    reason: str


@dataclass(frozen=True)
class Lost:
    """In place of an outcome: the machine of a worker is gone, and no client is to blame."""

    reason: str


class Channel:
    """One end of a pipe. Objects go as plain bytes: what multiprocessing would send of torch may lie in /dev/shm."""

    def __init__(self, pipe: Connection[Any, Any]) -> None:
        self.pipe = pipe

    def send(self, value: Any) -> None:
        """Pickle an object into the pipe; it blocks while the pipe is full."""
        self.pipe.send_bytes(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))

    def recv(self) -> Any:
        """The next object, waited for.

        Raises:
            EOFError, ConnectionError: the other end is closed.
        """
        return pickle.loads(self.pipe.recv_bytes())

    def fileno(self) -> int:
        """The pipe's file descriptor, for waiting on several."""
        return self.pipe.fileno()

    def close(self) -> None:
        """Close this end; the other end reads to the end of what was sent."""
        self.pipe.close()


class Worker:
    """One process and the pipe to it. The process says once that it is ready, then answers its jobs in order.

    Attributes:
        share: the jobs that it was given together; `jobs` are those of them that it has not answered.
    """

    def __init__(self, make_app: Callable[[], ClientApp], threads: int) -> None:
        # A fork would take torch's threads and locks in whatever state they are.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self.pipe = Channel(ours)
        self.process = context.Process(target=serve, args=(theirs, make_app, threads), daemon=True)
        # Ctrl-C reaches every process of the terminal. It is the parent's to handle: it ends its workers.
        old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        # Else this process would hold the other end open, and never see the worker's end.
        theirs.close()
        self.ready = False
        self.share: list[Job] = []
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

    def death(self) -> Broken | str:
        """Why the pipe has closed: what a client did to its process, or the machine."""
        self.process.join()
        code = self.process.exitcode or 0
        if code == -signal.SIGBUS:
            return Broken(f"a worker process ended with SIGBUS: its shared memory could not be had. {shared_memory()}")
        return f"the client's process ended ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"

    def end(self) -> None:
        """Kill the process, wait until it is gone, and close the pipe; its jobs are lost."""
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
        self.workers: list[Worker] = []
        self.losses = Counter[str]()  # by the name of a job, machines that were lost with it
        try:
            for _ in range(workers):
                self.workers.append(start())
            # Started first, waited for afterwards: they load their models at the same time.
            for worker in self.workers:
                worker.get_ready()
        except BaseException:
            self.close()
            raise

    def submit(self, name: str, message: Message, context: Context) -> None:
        """Queue a job; it is handed out when outcomes are asked for, with all that are queued by then."""
        self.jobs.append((name, message, context))

    def finished(self, names: list[str]) -> list[tuple[str, Outcome]]:
        """Outcomes that have come in, after a short wait; a str is why there is none."""
        self._hand_out()
        done: list[tuple[str, Outcome]] = []
        awaited = [worker for worker in self.workers if worker.jobs or not worker.ready]
        spoke = wait([worker.pipe.pipe for worker in awaited], timeout=POLL_S)
        for worker in (worker for worker in awaited if worker.pipe.pipe in spoke):
            if not worker.ready:
                worker.get_ready()
            elif worker.jobs:
                name, outcome = worker.jobs[0][0], self._wait_outcome(worker)
                if outcome is not None:
                    done.append((name, outcome))
        wanted = set(names)
        return [(name, outcome) for name, outcome in done if name in wanted]

    def cancel(self, names: list[str]) -> None:
        """Give these jobs up: those that wait are dropped, a worker at one of them is replaced."""
        gone = set(names)  # each job is looked up in it: with 20,000 of both a list would take a second
        self.jobs = deque(job for job in self.jobs if job[0] not in gone)
        left = [[job for job in share if job[0] not in gone] for share in self.shares]
        self.shares = deque(share for share in left if share)
        for worker in list(self.workers):
            if any(job[0] in gone for job in worker.jobs):
                self._replace_worker(worker, [job for job in worker.jobs if job[0] not in gone])

    def close(self) -> None:
        """End all workers; jobs without an outcome are lost."""
        for worker in self.workers:
            worker.end()

    def _wait_outcome(self, worker: Worker) -> Outcome | None:
        """Of the worker's first job; None where it will be done again by another."""
        try:
            outcome: Outcome | Broken | Lost | None = worker.pipe.recv()
        except (EOFError, ConnectionError):
            outcome = worker.death()
            if not isinstance(outcome, Broken):
                # Without the first: it was being worked on, and would end the next process too.
                self._replace_worker(worker, list(worker.jobs)[1:])
        else:
            if isinstance(outcome, Lost):
                outcome = self._begin_again(worker, outcome)
            else:
                worker.jobs.popleft()
        if isinstance(outcome, Broken):
            raise RunError(outcome.reason)
        return outcome

    def _begin_again(self, worker: Worker, lost: Lost) -> Outcome | None:
        """Have another worker train the share of one whose machine is gone; None, or why its first job is given up.

        The whole share, those that were answered among them: who trains together decides how sums are rounded. Nobody
        waits for what was answered, so that the second answer is dropped.
        """
        first = worker.jobs[0][0]
        self.losses[first] += 1
        if self.losses[first] < LOSSES:
            log.warning("%s Its %d clients are trained again elsewhere.", lost.reason, len(worker.jobs))
            self._replace_worker(worker, worker.share)
            return None
        self._replace_worker(worker, list(worker.jobs)[1:])
        return f"{LOSSES} machines were lost while it was trained, one after another: {lost.reason}"

    def _hand_out(self) -> None:
        # So that every worker has a share.
        size = min(self.share, -(-len(self.jobs) // len(self.workers)))
        while self.jobs:
            self.shares.append([self.jobs.popleft() for _ in range(min(size, len(self.jobs)))])
        idle = [worker for worker in self.workers if worker.ready and not worker.jobs]
        while idle and self.shares:
            worker = idle.pop(0)
            worker.share = self.shares.popleft()
            worker.jobs = deque(worker.share)
            worker.pipe.send([(message, context) for _, message, context in worker.jobs])

    def _replace_worker(self, worker: Worker, left: list[Job]) -> None:
        """End a worker and start another; jobs that it left come first."""
        worker.end()
        if left:
            self.shares.appendleft(left)
        self.workers[self.workers.index(worker)] = self.start()


def serve(pipe: Connection[Any, Any], make_app: Callable[[], ClientApp], threads: int) -> None:
    """The worker's loop: a share of messages in, their outcomes out one by one, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel(pipe)
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    try:
        app = make_app()
    except Exception as error:  # reported to the parent, which raises it
        channel.send(f"{type(error).__name__}: {error}")
        return
    channel.send(None)
    while True:
        try:
            jobs = channel.recv()
        except EOFError:
            return
        for outcome in run_jobs(app, jobs):
            channel.send(outcome)


def run_jobs(app: ClientApp, jobs: list[tuple[Message, Context]]) -> Iterator[Answer | Broken]:
    """Of each job in order; the machine's failure ends them."""
    try:
        if isinstance(app, CohortApp):
            app.prepare(jobs)
        for message, context in jobs:
            yield handle_message(app, message, context)
    except OSError as error:
        yield Broken(f"{explain_error(error)} {shared_memory()}".strip())


def end_with_parent() -> None:
    """End this process when its parent has: a worker that trained on would write beside the run that is resumed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        # `sys.exit` would end this thread alone.
        os._exit(1)


def shared_memory() -> str:
    """What is wrong with /dev/shm; empty if nothing is."""
    if not SHM.is_dir():
        return f"There is no {SHM}; in a container give it one (--shm-size)."
    free = shutil.disk_usage(SHM).free
    if not os.access(SHM, os.W_OK):
        return f"{SHM} cannot be written."
    return f"{SHM} has {free / 1e6:.1f} MB left; in a container give it more (--shm-size)." if free < LITTLE else ""


def of_machine(error: BaseException) -> bool:
    """Whether an error is of this machine (its disk, its rights, its limits) and not of a client."""
    return (
        isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError | TimeoutError)
    )


def handle_message(app: ClientApp, message: Message, context: Context) -> Answer:
    """Reply and new client state; an exception becomes Flower's error reply.

    Raises:
        OSError: it is the machine's, on which all simulated clients are, and so not for one client to answer for.
    """
    try:
        return app(message, context), context.state
    except Exception as error:  # what a ClientApp may raise is not known here
        if of_machine(error):
            raise
        reason = f"{type(error)}:<'{error}'>"
        frames = traceback.extract_tb(error.__traceback__)
        where = f" at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason + where), reply_to=message), None
