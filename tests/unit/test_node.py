"""A site's node against a coordinator that fails in every way goes on, and answers each message exactly once."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedpeft.deploy import flower, keys
from fedpeft.deploy.processes import Child, end
from fedpeft.deploy.settings import Site, SiteSettings
from fedpeft.deploy.site import link, node, owed
from fedpeft.errors import RunError
from support.fleet import METHODS, Fault, GrpcStandIn, HttpStandIn, State, replied

STATUSES = [status for status in grpc.StatusCode if status is not grpc.StatusCode.OK]
HTTP_STATUSES = [400, 401, 403, 404, 405, 408, 409, 412, 413, 429, 500, 501, 502, 503, 504, "cut"]
SERVED = [method for method in METHODS if method != "ActivateNode"]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    for name, value in {"FIRST_PAUSE_S": 0.001, "LONGEST_PAUSE_S": 0.02, "POLL_S": 0.02, "NOTE_S": 0.0}.items():
        monkeypatch.setattr(node, name, value)
    monkeypatch.setattr(flower, "HEARTBEAT_S", 0.05)


@pytest.fixture
def site(tmp_path):
    keys.site_keys(tmp_path)
    return Site(tmp_path, SiteSettings(name="clinic", server="localhost:1"))


def key_of(site):
    return load_ssh_private_key((site.path / "site.key").read_bytes(), None)


@contextmanager
def at_work(site, state, kind=GrpcStandIn, ask=replied, wrap=lambda made: made):
    """A node that takes part meanwhile."""
    state.keys = [flower.public_bytes(key_of(site))]
    server = kind(state)
    site.settings.server = f"127.0.0.1:{server.port}"
    made = {GrpcStandIn: link.GrpcLink, HttpStandIn: link.HttpLink}[kind](site.settings.server, key_of(site), None)
    working = node.Node(site, wrap(made), ask)
    thread = threading.Thread(target=working.run, daemon=True)
    thread.start()
    try:
        yield working
    finally:
        working.leave()
        thread.join(10)
        server.close()
        assert not thread.is_alive()


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.005)


def exchange(site, state, text, seconds=20.0):
    """One message from here to there and back."""
    name = state.send(text)
    until(lambda: name in state.done(), seconds)
    assert state.text(name) == text[::-1] and state.confirmed.count(name) >= 1
    until(lambda: not list((site.path / "owed").glob("*")))
    return name


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


def test_a_run_that_has_ended_wants_no_answer(site):
    state = State()

    def ask(item):
        state.ended = True
        replied(item)

    with at_work(site, state, ask=ask):
        name = state.send("too late")
        until(lambda: state.ended and not list((site.path / "owed").iterdir()))
        state.ended = False
        assert name not in state.replies


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


class Relay:
    """A network in between that can go silent on the connections it has, and takes new ones."""

    def __init__(self, port):
        self.port_there, self.listening = port, socket.create_server(("127.0.0.1", 0))
        self.port, self.silent = self.listening.getsockname()[1], set()
        self.open = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                here = self.listening.accept()[0]
            except OSError:
                return
            there = socket.create_connection(("127.0.0.1", self.port_there))
            self.open.append(here)
            for one, other in ((here, there), (there, here)):
                threading.Thread(target=self.pump, args=(one, other, here), daemon=True).start()

    def pump(self, one, other, here):
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                if here not in self.silent:
                    other.sendall(data)

    def go_silent(self):
        self.silent |= set(self.open)


@pytest.mark.parametrize(("kind", "transport"), [(GrpcStandIn, link.GrpcLink), (HttpStandIn, link.HttpLink)])
def test_a_half_open_connection_is_left_for_a_new_one(site, monkeypatch, kind, transport):
    monkeypatch.setattr(node, "WITHIN_S", {})
    monkeypatch.setattr(node, "OTHERS_WITHIN_S", 0.5)
    state = State()
    relays = []

    def through(made):
        relays.append(Relay(int(made.server.rpartition(":")[2]) if kind is GrpcStandIn else made.client.base_url.port))
        return transport(f"127.0.0.1:{relays[0].port}", key_of(site), None)

    with at_work(site, state, kind, wrap=through):
        exchange(site, state, "first")
        relays[0].go_silent()
        exchange(site, state, "second")
    relays[0].listening.close()


def test_a_call_that_is_under_way_when_the_site_stops_is_no_trouble(site, caplog):
    entered, closed = threading.Event(), threading.Event()

    class Cut:
        key = key_of(site)

        def call(self, method, request, within_s, shift_s=0.0):
            if method == "ActivateNode":
                entered.set()
                closed.wait(10)
            raise link.Failure("CANCELLED", "Channel closed!")

        def close(self):
            closed.set()

    working = node.Node(site, Cut(), replied)
    thread = threading.Thread(target=working.run, daemon=True)
    thread.start()
    assert entered.wait(10)
    working.leave()
    thread.join(10)
    assert not thread.is_alive() and json.loads((site.path / "status.json").read_text())["state"] == "stopped"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def said(site, caplog, server, ca=None):
    """The lines of a node that is kept out for a moment."""
    site.settings.server = server
    working = node.Node(site, link.GrpcLink(server, key_of(site), ca), replied)
    thread = threading.Thread(target=working.run, daemon=True)
    thread.start()
    until(lambda: any(record.levelno == logging.WARNING for record in caplog.records))
    time.sleep(0.3)
    working.leave()
    thread.join(10)
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_nothing_listens_no_such_name_and_an_unknown_key_are_each_said_once_with_the_address(site, caplog):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    (line,) = said(site, caplog, f"127.0.0.1:{free}")
    assert line.startswith(f"127.0.0.1:{free}: nothing listens there")
    caplog.clear()
    (line,) = said(site, caplog, "no-such-host.invalid:9092")
    assert "no-such-host.invalid:9092: there is no such name" in line
    caplog.clear()
    server = GrpcStandIn(State())
    (line,) = said(site, caplog, f"127.0.0.1:{server.port}")
    assert "does not know this site's key" in line and "add-site" in line
    assert "does not know" in json.loads((site.path / "status.json").read_text())["trouble"]
    server.close()


def test_a_foreign_certificate_and_a_port_of_something_else_are_named(site, caplog, tmp_path):
    for name in ("theirs", "others"):
        keys.certificates(tmp_path / name, "localhost")
    pair = [(tmp_path / "theirs" / name).read_bytes() for name in ("server.key", "server.crt")]
    state = State([flower.public_bytes(key_of(site))])
    server = GrpcStandIn(state, credentials=grpc.ssl_server_credentials([pair]))
    (line,) = said(site, caplog, f"localhost:{server.port}", (tmp_path / "others" / "ca.crt").read_bytes())
    assert "its certificate is none that ca.crt vouches for" in line
    server.close()
    caplog.clear()
    plain = HttpStandIn(state)
    lines = said(site, caplog, f"localhost:{plain.port}", (tmp_path / "others" / "ca.crt").read_bytes())
    assert "what listens there is no Fleet API" in lines[0]
    plain.close()


@pytest.mark.parametrize("host", ["::1", "127.0.0.1", "localhost"])
def test_a_site_reaches_a_coordinator_by_ipv6_as_by_ipv4(site, tmp_path, host):
    keys.certificates(tmp_path / "theirs", host)
    pair = [(tmp_path / "theirs" / name).read_bytes() for name in ("server.key", "server.crt")]
    bare = f"[{host}]" if ":" in host else "127.0.0.1"
    server = GrpcStandIn(State([flower.public_bytes(key_of(site))]), 0, grpc.ssl_server_credentials([pair]), bare)
    name = f"[{host}]" if ":" in host else host
    made = link.GrpcLink(f"{name}:{server.port}", key_of(site), (tmp_path / "theirs" / "ca.crt").read_bytes())
    request = flower.request("ActivateNode", None, public_key=flower.public_bytes(made.key), heartbeat_interval=30)
    assert made.call("ActivateNode", request, 10).node_id == 7
    made.close()
    server.close()


WORKER = """
import sys, time
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
pipe.send_bytes(b"ready")
while True:
    path = pipe.recv_bytes().decode()
    if path.endswith("deadly"):
        sys.exit(9)
    pipe.send_bytes(b"failed" if path.endswith("broken") else b"answered")
"""


def test_a_worker_that_ends_is_said_to_have_and_its_successor_is_waited_for():
    child = Child("worker", [sys.executable, "-c", WORKER], {}, piped=True)
    worker = node.Worker(child)
    child.start()
    stop = threading.Event()

    def keep():
        while not stop.wait(0.05):
            child.keep()

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        worker.ask(SimpleNamespace(path="fine"))
        with pytest.raises(RunError, match="its own log says why"):
            worker.ask(SimpleNamespace(path="broken"))
        with pytest.raises(RunError, match="worker ended; it is started again"):
            worker.ask(SimpleNamespace(path="deadly"))
        worker.ask(SimpleNamespace(path="fine"))
    finally:
        stop.set()
        thread.join()
        end([child])
