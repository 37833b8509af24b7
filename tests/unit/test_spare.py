"""A site's node and worker give back what was freed while they wait, and once each time."""

from __future__ import annotations

import ctypes
import gc
import os
import time
import weakref
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from fedpeft.deploy.site import node, spare, worker
from fedpeft.simulations.benchmarks import site_memory
from fedpeft.simulations.benchmarks.data_memory import memory
from support.fleet import State
from support.nodes import at_work, exchange, fast, site, until

__all__ = ["fast", "site"]  # fixtures
BLOCKS, BYTES = 2_000, 60_000  # of less than glibc gives a mapping of its own


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc's")
def test_what_was_freed_below_something_that_stays_goes_back_to_the_kernel():
    blocks = [bytearray(b"x" * BYTES) for _ in range(BLOCKS)]
    stays = blocks[-1]
    full = memory()["anonymous"]
    blocks.clear()
    kept = memory()["anonymous"]
    spare.release_freed()
    now, size = memory()["anonymous"], BLOCKS * BYTES / 1e6
    assert len(stays) and full - kept < 0.5 * size, "glibc gave it back by itself, so that this shows nothing"
    assert full - now > 0.8 * size


def test_cycles_go_too():
    class Thing:
        own: Thing

    thing = Thing()
    thing.own, seen = thing, weakref.ref(thing)
    del thing
    spare.release_freed()
    assert seen() is None


def test_a_worker_gives_back_once_when_no_message_follows_and_not_between_those_that_do(monkeypatch):
    calls: list[float] = []
    monkeypatch.setattr(worker, "release_freed", lambda: calls.append(time.monotonic()))
    monkeypatch.setattr(worker, "IDLE_S", 0.3)
    monkeypatch.setattr(worker, "load_model", lambda site: None)
    monkeypatch.setattr(worker, "Owed", lambda path: path)
    monkeypatch.setattr(worker, "answer", lambda resident, owed: worker.ANSWERED)
    monkeypatch.setattr(worker.settings, "site", lambda folder: SimpleNamespace(settings=SimpleNamespace(name="one")))
    ours, theirs = Pipe()
    working = Thread(target=worker.main, args=(Path("one"), str(os.dup(theirs.fileno()))), daemon=True)
    try:
        working.start()
        assert ours.recv_bytes() == worker.READY and len(calls) == 1  # the model that was loaded first
        for _ in range(5):
            ours.send_bytes(b"message")
            assert ours.recv_bytes() == worker.ANSWERED
        assert len(calls) == 1
        until(lambda: len(calls) == 2)
        time.sleep(2 * worker.IDLE_S)
        assert len(calls) == 2
        ours.send_bytes(b"message")
        assert ours.recv_bytes() == worker.ANSWERED
        until(lambda: len(calls) == 3)
    finally:
        ours.close()
        working.join(10)
        gc.unfreeze()  # what the worker froze is this process's
    assert not working.is_alive()


def test_a_node_gives_back_after_the_first_empty_pull_that_follows_an_answer(site, monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(node, "release_freed", lambda: calls.append(1))
    state = State()
    with at_work(site, state):
        until(lambda: state.calls.count("PullMessages") > 2)
        assert not calls
        for count in (1, 2):
            exchange(site, state, f"message {count}")
            until(lambda count=count: len(calls) == count)
        pulls = state.calls.count("PullMessages")
        until(lambda: state.calls.count("PullMessages") > pulls + 2)
        assert len(calls) == 2


def test_the_benchmark_tells_one_import_from_another():
    bare, numpy = site_memory.imported(["pass"]), site_memory.imported([site_memory.LINES["NumPy"]])
    assert 1 < bare < 20 and bare + 3 < numpy < bare + 60
