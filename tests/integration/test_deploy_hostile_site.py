"""A registered site that holds all it can of the Fleet port: the face's memory is bounded, and others get through."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
import threading
import time
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedpeft.deploy import address, flower, keys, settings
from fedpeft.deploy.coordinator import daemon, face, relay, server
from fedpeft.deploy.coordinator.flower import Control
from fedpeft.deploy.launch import LARGEST_CALL
from fedpeft.deploy.processes import end_children
from fedpeft.deploy.site.link import GrpcLink, HttpLink
from support.deployed import free_ports, until

STREAMS, MB = 64, 2**20
# Of the face beyond what it has at rest, in MiB: a call is there as gRPC's, as Python's and as protobuf's bytes, and
# once more on its way to its run.
MOST = (4 * relay.READ_AT_ONCE + 2) * LARGEST_CALL // MB


@pytest.fixture
def place(tmp_path):
    """The fleet process of a coordinator that knows north, which is hostile, and south."""
    port, control_port, http_port = free_ports(3)
    folder = tmp_path / "coordinator"
    server.init(folder, "localhost", port, control_port, "127.0.0.1", http_port)
    for name in ("north", "south"):
        server.add_site(folder, name, keys.site_keys(tmp_path / name))
    made = settings.server(folder)
    fleet = daemon.fleet_of(made, False, settings.environment(made.path))
    fleet.start()
    try:
        until(lambda: all(address.answers(*at) for at in daemon.ports(made)), "the ports")
        Control(made, insecure=False).register_missing()
        yield tmp_path, made, fleet.process.pid
    finally:
        end_children([fleet])


class South(threading.Thread):
    """A site that goes on with its work: the slowest of its calls, by either transport, in seconds."""

    def __init__(self, root, made):
        super().__init__(daemon=True)
        key, ca = private(root, "south"), (made.path / "ca.crt").read_bytes()
        self.links = [GrpcLink(f"localhost:{made.settings.port}", key, ca)]
        self.links.append(HttpLink(f"localhost:{made.settings.http_port}", key, ca))
        self.node = flower.Node(node_id=self.call(0, "ActivateNode", public_key=flower.public_bytes(key)).node_id)
        self.slowest, self.calls, self.ended, self.error = 0.0, 0, False, None

    def call(self, link, method, **fields):
        node = getattr(self, "node", None)
        request = flower.request(method, node, heartbeat_interval=30.0, **fields)
        return self.links[link].call(method, request, 30.0)

    def run(self):
        try:
            while not self.ended:
                begun = time.monotonic()
                assert self.call(self.calls % 2, "SendNodeHeartbeat").success
                self.slowest, self.calls = max(self.slowest, time.monotonic() - begun), self.calls + 1
                time.sleep(0.05)
        except Exception as error:
            self.error = error

    def end(self):
        self.ended = True
        self.join(60)
        print(f"south: {self.calls} calls, the slowest took {self.slowest:.2f} s")
        assert self.error is None and self.calls > 10


def private(root, name):
    return load_ssh_private_key((root / name / "site.key").read_bytes(), None)


def memory_of(pid, field):
    """VmRSS, or VmHWM, the most that it ever was, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(field))


def attack(place, act):
    """What the face's memory grew to beyond what it had, in MiB, and what `act` returns, while south goes on."""
    root, made, pid = place
    south = South(root, made)
    south.start()
    time.sleep(1)
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM begins anew
    before = memory_of(pid, "VmRSS")
    told = act(root, made)
    south.end()
    grown = memory_of(pid, "VmHWM") - before
    print(f"the face grew by {grown} MiB")
    return grown, told


@pytest.mark.attack
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["PushObject", "PullMessages"])
def test_streams_of_the_largest_size_over_grpc(place, method):
    def act(root, made):
        key = private(root, "north")

        async def flood():
            trusted = grpc.ssl_channel_credentials((made.path / "ca.crt").read_bytes())
            options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
            body = bytes(LARGEST_CALL - 1024)
            told, channels = [], []

            async def push(channel):
                try:
                    await channel.unary_unary(flower.grpc_path_of(method))(
                        body, metadata=flower.identity(key), timeout=90
                    )
                except grpc.aio.AioRpcError as error:
                    told.append(f"{error.code().name}: {error.details()}")

            for _ in range(2):
                channels.append(grpc.aio.secure_channel(f"localhost:{made.settings.port}", trusted, options))
            await asyncio.gather(*(push(channel) for channel in channels for _ in range(STREAMS)))
            for channel in channels:
                await channel.close()
            return told

        return asyncio.run(flood())

    grown, told = attack(place, act)
    assert any(f"this site has {relay.CALLS_AT_ONCE} calls open" in said for said in told), set(told)
    assert grown < MOST


@pytest.mark.attack
@pytest.mark.timeout(600)
def test_bodies_that_never_end_over_http(place):
    def act(root, made):
        head = {
            "Host": "x",
            "Content-Length": LARGEST_CALL,
            **flower.headers_of(flower.identity(private(root, "north"))),
        }
        lines = [connect(made, head) for _ in range(STREAMS)]
        told, still = set(), list(lines)
        for _ in range(LARGEST_CALL // MB - 1):
            still = [line for line in still if taken(line)]
        for line in lines:
            with contextlib.suppress(OSError):
                told.add(line.recv(65536) + line.recv(65536))  # a head, and what is said
            line.close()
        return told

    grown, told = attack(place, act)
    assert any(f"this site has {relay.CALLS_AT_ONCE} calls open".encode() in said for said in told), told
    assert grown < MOST


@pytest.mark.attack
@pytest.mark.timeout(1200)
def test_as_many_connections_as_there_may_be_that_dribble_their_heads_over_http(place):
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 2 * face.CALLS), most))

    def act(root, made):
        lines = []
        try:
            for number in range(face.CALLS + 100):
                lines.append(connect(made, {"Host": "x"}, end=b"x-more: "))
                for line in lines[number % 50 :: 50]:
                    with contextlib.suppress(OSError):
                        line.sendall(b"x")
            time.sleep(face.HEAD_S)
        finally:
            for line in lines:
                line.close()

    try:
        grown, _ = attack(place, act)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (now, most))
    assert grown < face.CALLS // 4  # 256 KiB, which asyncio has for the TLS of each


def taken(line):
    """Whether another MiB of a body was taken; else it is not read any more, or the connection has ended."""
    with contextlib.suppress(OSError):
        line.sendall(bytes(MB))
        return True
    return False


def connect(made, head, end=b"\r\n"):
    """A connection over HTTPS that has sent the beginning of a call."""
    trusted = ssl.create_default_context(cafile=str(made.path / "ca.crt"))
    raw = socket.create_connection(("localhost", made.settings.http_port), timeout=30)
    line = trusted.wrap_socket(raw, server_hostname="localhost")
    fields = [f"{name}: {value}" for name, value in head.items()]
    line.sendall("\r\n".join([f"POST {flower.path_of('PushObject')} HTTP/1.1", *fields, ""]).encode() + end)
    line.settimeout(0.2)
    return line
