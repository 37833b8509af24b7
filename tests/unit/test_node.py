"""A site's node against a coordinator that fails in every way goes on, and answers each message exactly once."""

from __future__ import annotations

import json
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import pytest

from fedpeft.deploy import flower
from fedpeft.deploy.site import node, owed
from support.fleet import METHODS, NODE, Fault, GrpcStandIn, HttpStandIn, State, replied
from support.nodes import at_work, exchange, fast, key_of, site, until

__all__ = ["fast", "site"]  # fixtures
STATUSES = [status for status in grpc.StatusCode if status is not grpc.StatusCode.OK]
HTTP_STATUSES = [400, 401, 403, 404, 405, 408, 409, 412, 413, 429, 500, 501, 502, 503, 504, "cut"]
SERVED = [method for method in METHODS if method != "ActivateNode"]


def test_messages_are_answered_one_after_another_and_confirmed_when_the_answer_is_there(site):
    state = State()
    with at_work(site, state):
        for index in range(3):
            exchange(site, state, f"message {index} " * 100)
        assert len(state.replies) == 3
        status = json.loads((site.path / "status.json").read_text())
        assert status["state"] == "connected" and status["answered"] and not status["trouble"]
        calls = [name for name in state.calls if name not in ("PullMessages", "SendNodeHeartbeat")]
        assert calls.index("ConfirmMessageReceived") > calls.index("PushObject")
    assert json.loads((site.path / "status.json").read_text())["state"] == "stopped"


def test_small_objects_come_and_go_with_the_call_that_names_them(site):
    state = State()
    state.along = True
    with at_work(site, state):
        exchange(site, state, "small")
        assert not {"PullObject", "PushObject"} & set(state.calls)
        exchange(site, state, "large " * flower.ALONG_BYTES)
        assert {"PullObject", "PushObject"} <= set(state.calls)


@pytest.mark.parametrize("when", ["before", "after"])
def test_every_grpc_status_once_in_every_kind_of_call(site, when):
    state = State()
    state.before["ActivateNode"] = [Fault(status) for status in STATUSES]
    with at_work(site, state):
        for status in STATUSES:
            getattr(state, when).update({method: [Fault(status, "injected")] for method in SERVED})
            exchange(site, state, f"{status} " * 50)
            until(lambda: not any(getattr(state, when).values()))
        assert len(state.replies) == len(STATUSES)


@pytest.mark.parametrize("when", ["before", "after"])
def test_every_http_error_once_in_every_kind_of_call(site, when):
    state = State()
    state.before["ActivateNode"] = [Fault(status) for status in HTTP_STATUSES]
    with at_work(site, state, HttpStandIn):
        for status in HTTP_STATUSES:
            getattr(state, when).update({method: [Fault(status, "injected")] for method in SERVED})
            exchange(site, state, f"{status} " * 50)
            until(lambda: not any(getattr(state, when).values()))
        assert len(state.replies) == len(HTTP_STATUSES)


@pytest.mark.parametrize("kind", [GrpcStandIn, HttpStandIn])
def test_a_site_that_registers_itself_does_so_and_leaves_whatever_its_calls_are_answered_with(site, kind):
    state, statuses = State(), STATUSES if kind is GrpcStandIn else HTTP_STATUSES
    state.before = {method: [Fault(status) for status in statuses] for method in ("RegisterNode", "ActivateNode")}
    state.after = {method: [Fault(status) for status in statuses] for method in ("ActivateNode", "DeactivateNode")}
    state.RegisterNode = lambda request, key: flower.answer_type("RegisterNode")(node_id=NODE)
    with at_work(site, state, kind, registers=True):
        exchange(site, state, "registered")
        assert not any(state.before.values()) and state.calls.count("RegisterNode") == len(statuses) + 1
    assert json.loads((site.path / "status.json").read_text())["state"] == "stopped"


def test_a_pull_that_waits_at_the_coordinator_is_made_again_at_once_and_brings_a_message_without_delay(
    site, monkeypatch
):
    monkeypatch.setattr(node, "POLL_S", 5.0)
    monkeypatch.setattr(node, "WAITED_S", 0.1)
    state = State()
    state.wait_s = 0.2
    with at_work(site, state):
        until(lambda: state.calls.count("PullMessages") > 2)
        begun = time.monotonic()
        exchange(site, state, "now")
        assert time.monotonic() - begun < 2.0


def test_what_is_asked_for_and_is_not_in_the_answer_ends_the_message_and_not_the_node(site, caplog):
    state = State()
    caplog.set_level(logging.INFO, "fedpeft")
    pushed = state.PushMessages

    def ask_for_more(request, key):
        answer = pushed(request, key)
        answer.objects_to_push.append("../site.key")
        return answer

    with at_work(site, state):
        state.PushMessages = ask_for_more
        state.send("first")
        until(lambda: "not in the answer" in caplog.text)
        state.PushMessages = pushed
        exchange(site, state, "second")


def test_no_more_of_a_message_is_fetched_than_the_disk_has_room_for(site, monkeypatch):
    fetched = []
    message = SimpleNamespace(names=[str(number) for number in range(100)])
    working = node.Node(site, SimpleNamespace(key=key_of(site)), replied)
    monkeypatch.setattr(working, "fetch", lambda _, name, until: fetched.append(name) or b"")
    with ThreadPoolExecutor(node.AT_ONCE) as pool:
        contents = working.fetch_all(pool, message, 0.0)
        assert [next(contents) for _ in range(3)] == [b""] * 3
        contents.close()
    assert len(fetched) <= node.AT_ONCE


def test_a_site_that_is_stopped_in_a_message_does_not_count_it_as_a_kill(site):
    for _ in range(node.BEGINNINGS + 1):
        state = State()
        state.before["PullObject"] = [Fault(grpc.StatusCode.UNAVAILABLE)] * 1000
        with at_work(site, state):
            state.send("long")
            until(lambda state=state: "PullObject" in state.calls)
        assert not list((site.path / "owed").glob("*/begun"))


class Killed(BaseException):
    """SIGKILL, as far as a thread can have one."""


def killing(*arguments):
    raise Killed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("method", ["PullObject", "ask", "PushMessages", "PushObject", "ConfirmMessageReceived"])
def test_what_is_owed_outlives_a_kill_at_every_point(site, method):
    """Between pull and reply, between the reply that is saved and its push, and before the push is confirmed."""

    def wrap(made):
        call = made.call
        made.call = lambda name, *rest: killing() if name == method else call(name, *rest)
        return made

    state, asked = State(), []

    def counted(item):
        asked.append(item.path.name)
        replied(item)

    with at_work(site, state, ask=killing if method == "ask" else counted, wrap=wrap) as working:
        name = state.send("what is owed")
        until(lambda: working.last)
        time.sleep(0.2)
    assert name not in state.done() or method == "ConfirmMessageReceived"
    assert [path.name for path in (site.path / "owed").iterdir()] == [name]
    state.handed = None  # Flower hands a message out once
    with at_work(site, state, ask=counted):
        until(lambda: name in state.confirmed)
        until(lambda: not list((site.path / "owed").iterdir()))
    assert state.text(name) == "dewo si tahw" and len(state.replies) == 1
    assert len(asked) == 1


def test_left_over_files_of_killed_processes_are_removed(site):
    for name in ("0" * 64, "half"):
        (site.path / "owed" / name).mkdir(parents=True)
        (site.path / "owed" / name / "objects").write_bytes(b"x")
    state = State()
    with at_work(site, state):
        exchange(site, state, "next")
    assert not list((site.path / "owed").iterdir())


def test_a_message_that_ends_the_site_again_and_again_is_answered_with_an_error(site):
    state = State()
    name = state.send("deadly")
    pulled = state.PullMessages(SimpleNamespace(message_ids=[]), b"")
    mine = owed.Owed.take(site.path / "owed", pulled)
    for _ in range(node.BEGINNINGS):
        mine.begin()
    with at_work(site, state, ask=killing):
        until(lambda: name in state.done())
    assert "ended 3 times" in state.text(name)


def test_without_room_for_an_answer_nothing_is_asked_of_the_worker(site, monkeypatch, caplog):
    monkeypatch.setattr(owed, "ROOM", 2**60)
    state = State()
    with at_work(site, state, ask=killing):
        name = state.send("large")
        until(lambda: name in state.done())
    assert state.text(name) == f"error: {node.UNTOLD}"
    assert "too little room" in caplog.text and str(site.path) in caplog.text


@pytest.mark.parametrize("ttl", [60.0, math.inf])
def test_a_run_that_has_ended_wants_no_answer_whatever_time_a_message_is_said_to_live(site, ttl):
    state = State()
    name = state.send("too late")
    state.waiting[0][0].metadata.ttl = ttl

    def ask(item):
        state.ended = True
        replied(item)

    with at_work(site, state, ask=ask):
        until(lambda: state.ended and not list((site.path / "owed").iterdir()))
        state.ended = False
        assert name not in state.replies


@pytest.mark.parametrize(
    ("ttl", "longest"), [(60.0, 60.0), (math.inf, node.LONGEST_TTL_S), (math.nan, 0.0), (-1.0, 0.0)]
)
def test_a_message_ends_at_some_time(ttl, longest):
    began = time.monotonic()
    ends = node.deadline_of(SimpleNamespace(ttl=ttl))
    assert began + longest <= ends <= time.monotonic() + longest


def test_a_message_that_the_coordinator_knows_nothing_of_any_more_does_not_hold_up_the_next(site, monkeypatch):
    monkeypatch.setattr(node, "REFUSED_S", 0.2)
    state = State()
    state.before["PullObject"] = [Fault(grpc.StatusCode.UNKNOWN, "KeyError") for _ in range(10_000)]
    with at_work(site, state):
        name = state.send("forgotten")
        until(lambda: "PullObject" in state.calls and not list((site.path / "owed").iterdir()))
        assert name not in state.replies
        state.before.clear()
        exchange(site, state, "next")


HASH = "a" * 64


@pytest.mark.parametrize(
    ("name", "child"),
    [("../../etc/passwd", HASH), ("", HASH), ("x" * 64, HASH), ("A" * 64, HASH), (HASH, "../x"), (HASH, "")],
)
def test_a_message_with_an_id_that_is_no_hash_touches_no_file(site, caplog, name, child):
    state = State()
    with at_work(site, state, ask=killing):
        state.send("evil")
        state.waiting.clear()
        message = flower.request("PushMessages", None)
        root = message.messages_list.add()
        root.metadata.message_id = name
        tree = message.message_object_trees.add(object_id=name)
        tree.children.add(object_id=child)
        state.waiting.append((root, tree))
        until(lambda: "not one of Flower's" in caplog.text)
        state.handed = None
    assert not (site.path / "owed").exists() or not list((site.path / "owed").iterdir())
