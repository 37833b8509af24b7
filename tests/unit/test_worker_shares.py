"""Which clients train together in a worker hangs on their number alone; a worker ends with the run that started it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import deque
from functools import partial

import pytest

from fedpeft import config as configs
from fedpeft.simulations.run import load_app
from fedpeft.simulations.workers import LOSSES, Channel, Lost, Pool, end_with_parent


class Fake:
    """A worker that only takes down which shares it was given."""

    def __init__(self):
        ours, self.theirs = multiprocessing.Pipe()
        self.pipe = Channel(ours)
        self.ready, self.jobs, self.share = True, deque(), []

    def get_ready(self):
        self.ready = True

    def end(self):
        self.pipe.close()

    def given(self):
        return [message for message, _ in self.theirs.recv()]


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [
        (5, 256, [[0, 1, 2], [3, 4]]),
        (5, 2, [[0, 1], [2, 3], [4]]),
        (1, 256, [[0]]),
        (7, 3, [[0, 1, 2], [3, 4, 5], [6]]),
    ],
)
@pytest.mark.parametrize("slow", [0, 1])
def test_shares_are_the_same_whichever_worker_is_idle_first(slow, count, share, expected):
    pool = Pool(Fake, 2, share)
    busy = pool.workers[slow]
    busy.ready = False  # as one that was started anew
    for number in range(count):
        pool.submit(str(number), number, None)
    pool.finished([])
    found = []
    while any(worker.jobs for worker in pool.workers):
        worker = next(worker for worker in pool.workers if worker.jobs)
        found.append(worker.given())
        worker.jobs.clear()
        busy.ready = True
        pool.finished([])
    assert found == expected
    pool.close()


def test_cancelled_jobs_are_in_no_share():
    pool = Pool(Fake, 1, 2)
    for number in range(5):
        pool.submit(str(number), number, None)
    pool.finished([])
    pool.cancel(["2", "3", "4"])
    assert pool.workers[0].given() == [0, 1] and not pool.shares
    pool.close()


def test_a_worker_ends_when_the_process_that_started_it_is_killed():
    """One that went on would write ledgers and replies beside the run that is resumed."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def worker():
        threading.Thread(target=end_with_parent, daemon=True).start()
        theirs.send(os.getpid())
        time.sleep(60)

    def run():
        child = context.Process(target=worker)
        child.start()
        time.sleep(60)

    parent = context.Process(target=run)
    parent.start()
    number = ours.recv()
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    until = time.monotonic() + 20
    while time.monotonic() < until and alive(number):
        time.sleep(0.02)
    assert not alive(number)


def alive(number):
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def answer(worker, *outcomes):
    for outcome in outcomes:
        Channel(worker.theirs).send(outcome)


def test_the_whole_share_of_a_lost_machine_is_trained_elsewhere():
    pool = Pool(Fake, 2)
    for number in range(4):
        pool.submit(str(number), number, None)
    names = ["0", "1", "2", "3"]
    pool.finished(names)
    lost, other = pool.workers
    assert (lost.given(), other.given()) == ([0, 1], [2, 3])
    answer(lost, ("a", None), Lost("A node is gone."))
    answer(other, ("c", None), ("d", None))
    done = {}
    while len(done) < 3:
        done |= dict(pool.finished([name for name in names if name not in done]))
    assert done == {"0": ("a", None), "2": ("c", None), "3": ("d", None)}
    pool.finished(["1"])  # hands out what was left
    again = next(worker for worker in pool.workers if worker.jobs)
    assert lost not in pool.workers and again.given() == [0, 1]  # 0 too: who trains together decides how sums round
    answer(again, ("a", None), ("b", None))
    found = []
    while not found:
        found = pool.finished(["1"])
    assert found == [("1", ("b", None))]  # the second answer of 0 is nobody's
    pool.close()


def test_a_client_that_is_lost_with_machine_after_machine_is_given_up():
    pool = Pool(Fake, 1)
    for number in range(2):
        pool.submit(str(number), number, None)
    found = []
    for _ in range(LOSSES):
        while not pool.workers[0].jobs:
            pool.finished(["0", "1"])
        answer(pool.workers[0], Lost("A node is gone."))
        while pool.workers[0].jobs and not found:
            found += pool.finished(["0", "1"])
    assert [name for name, _ in found] == ["0"] and "3 machines were lost" in found[0][1]
    pool.finished(["1"])
    assert [name for name, *_ in pool.workers[0].jobs] == ["1"]
    pool.close()


def test_a_worker_is_told_where_records_are_and_not_given_them(tmp_path):
    (tmp_path / "many.csv").write_text("text,label\n" + "some words,one\nother words,two\n" * 10_000)
    config = configs.load("text", {"data.source": str(tmp_path / "many.csv"), "data.clients": 2})
    told = pickle.dumps(partial(load_app, config, tmp_path / "run"))  # all that goes to an actor before its messages
    assert str(tmp_path / "many.csv").encode() in told and len(told) < 10_000
