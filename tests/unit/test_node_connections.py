"""What a site's node does and says when its connection or its worker is not there."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import socket
import sys
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import grpc
import pytest

from fedpeft.deploy import flower, keys
from fedpeft.deploy.processes import Child, end_children
from fedpeft.deploy.site import link, node
from fedpeft.errors import RunError
from support.fleet import Fault, GrpcStandIn, HttpStandIn, State, replied
from support.network import Cutting
from support.nodes import at_work, exchange, fast, key_of, site, until

__all__ = ["fast", "site"]  # fixtures


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


@pytest.mark.parametrize(("kind", "transport"), [(GrpcStandIn, link.GrpcLink), (HttpStandIn, link.HttpLink)])
def test_a_proxy_that_cuts_every_connection_loses_no_message_and_doubles_none(site, kind, transport):
    state, proxies = State(), []
    asked = []

    def counted(owed):
        asked.append(owed.path.name)
        time.sleep(0.05)
        replied(owed)

    def through(made):
        port = int(made.server.rpartition(":")[2]) if kind is GrpcStandIn else made.client.base_url.port
        proxies.append(Cutting(port, (0.05, 0.3)))
        return transport(f"127.0.0.1:{proxies[0].port}", key_of(site), None)

    with at_work(site, state, kind, ask=counted, wrap=through):
        names = [exchange(site, state, f"message {number}") for number in range(20)]
    proxies[0].close()
    assert proxies[0].cuts >= 3 and asked == names and sorted(state.replies) == sorted(names)


def test_an_identity_is_signed_anew_after_a_while_and_whenever_the_clock_jumps(site, monkeypatch):
    """A signature costs as much as a small call; one of before a jump would be refused as long as the jump is."""
    key, now = key_of(site), [1e6]
    monkeypatch.setattr(flower.time, "time", lambda: now[0])
    made = [flower.identity(key)]
    for moment in (1e6 + flower.FRESH_S - 1, 1e6 + flower.FRESH_S + 1, 1e6 - 3600, 1e6 + 3600):
        now[0] = moment
        made.append(flower.identity(key))
    stamps = [dict(one)["flwr-signature-bin"] for one in made]
    assert stamps[0] == stamps[1] and len(set(stamps)) == 4
    assert flower.identity(key, 60.0) != made[-1] != flower.identity(key)  # a shifted one is kept for nobody


@pytest.mark.parametrize("kind", [GrpcStandIn, HttpStandIn])
def test_a_clock_that_jumps_holds_up_and_loses_nothing_and_is_said(site, monkeypatch, caplog, kind):
    """Forth, back, and right again; every call in between is refused, and so is what a site that has trained brings."""
    ahead_s, signed, state, asked = [0.0], flower.signed, State(), []
    monkeypatch.setattr(flower, "time", SimpleNamespace(time=lambda: time.time() + ahead_s[0]))
    monkeypatch.setattr(flower, "signed", lambda key, shift_s: signed(key, shift_s + ahead_s[0]))

    def train(owed):
        asked.append(owed.path.name)
        ahead_s[0] = jumps.pop()
        replied(owed)

    jumps = [-3600.0, 3600.0]
    with at_work(site, state, kind, ask=train):
        for _ in range(2):
            caplog.clear()
            name = state.send("trained before the jump")
            until(lambda: "Set this machine's clock" in caplog.text)
            time.sleep(0.1)
            assert name not in state.replies
            ahead_s[0] = 0.0
            until(lambda name=name: name in state.done())
    assert len(asked) == len(state.replies) == 2


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
        end_children([child])


@pytest.mark.parametrize("packed", ["gzip", "deflate", "br"])
def test_an_answer_that_is_packed_is_not_unpacked(site, packed):
    """Whether asked for or not: a few bytes could become as many as this machine has."""
    body = gzip.compress(b"0" * 10**6)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.send_header("content-encoding", packed)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        made = link.HttpLink(f"127.0.0.1:{server.server_port}", key_of(site), None)
        with pytest.raises(link.Failure, match=f"packed by {packed}, which was not asked for"):
            made.call("PullMessages", flower.request("PullMessages", None), 5.0)
        made.close()
        server.shutdown()


def test_an_answer_is_read_up_to_a_bound(site, monkeypatch):
    monkeypatch.setattr(link, "SMALL", 10)
    state = State()
    state.before["ActivateNode"] = [Fault(500, "x" * 1000)]
    with closing(HttpStandIn(state)) as server:
        made = link.HttpLink(f"127.0.0.1:{server.port}", key_of(site), None)
        with pytest.raises(link.Failure, match="more than 10 bytes"):
            made.call("ActivateNode", flower.request("ActivateNode", None, public_key=b""), 5.0)
        made.close()


@pytest.mark.parametrize("kind", [GrpcStandIn, HttpStandIn])
def test_an_answer_that_only_names_things_is_read_up_to_a_bound_and_the_node_goes_on(site, caplog, kind):
    state = State()
    pulled = state.PullMessages

    def bomb(request, key):
        state.PullMessages = pulled
        return flower.PullMessagesResponse.FromString(b"\x1a\x80\x80\x80\x01" + b"\x12\x00" * 2**20)

    state.PullMessages = bomb
    with at_work(site, state, kind):
        exchange(site, state, "next")
    assert f"more than {link.SMALL} bytes" in caplog.text and "Traceback" not in caplog.text
