"""The Fleet port as a site sees it: gRPC of our own and HTTP before Flower's SuperLink, with TLS and keys."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime

import grpc
import httpx
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.message_pb2 import PullObjectRequest
from flwr.proto.node_pb2 import Node

from fedpeft.deploy import address, keys, settings
from fedpeft.deploy.coordinator import daemon, server
from fedpeft.deploy.coordinator.flower import Control
from fedpeft.deploy.coordinator.post import Clerk, Post
from fedpeft.deploy.processes import end_children
from fedpeft.flower import empty_run
from support.deployed import free_ports, until


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """SuperLink and face of a coordinator that knows one site, whose keys are in `north`."""
    root = tmp_path_factory.mktemp("face")
    port, control_port, http_port = free_ports(3)
    server.init(root / "coordinator", "localhost", port, control_port, "127.0.0.1", http_port)
    server.add_site(root / "coordinator", "north", keys.site_keys(root / "north"))
    made = settings.server(root / "coordinator")
    fleet = daemon.fleet_of(made, False, settings.environment(made.path))
    fleet.start()
    try:
        until(lambda: all(address.answers(*at) for at in daemon.ports(made)), "the ports")
        Control(made, insecure=False).register_missing()
        yield root, made, fleet
    finally:
        end_children([fleet])


class Caller:
    """The least of a node."""

    def __init__(self, root, made, folder="north"):
        self.key = load_ssh_private_key((root / folder / "site.key").read_bytes(), None)
        self.public = keys.pem((root / folder / "site.pub").read_text())
        trusted = grpc.ssl_channel_credentials((made.path / "ca.crt").read_bytes())
        self.stub = FleetStub(grpc.secure_channel(f"localhost:{made.settings.port}", trusted))

    def call(self, method, request):
        stamp = datetime.now(UTC).isoformat()
        signature = self.key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
        fields = (
            ("flwr-public-key-bin", self.public),
            ("flwr-timestamp", stamp),
            ("flwr-signature-bin", signature),
        )
        return getattr(self.stub, method)(request, metadata=fields, timeout=40)

    def activate(self):
        answer = self.call("ActivateNode", ActivateNodeRequest(public_key=self.public, heartbeat_interval=30))
        return Node(node_id=answer.node_id)


def test_messages_reach_a_waiting_site_also_after_a_kill(place):
    root, made, fleet = place
    caller = Caller(root, made)
    node = caller.activate()
    control = Control(made, insecure=False)
    post = Post(empty_run(settings.number_of("run-1")), control.online, root)
    Clerk(made.path, post)
    arrived, got = [], []

    def wait():
        got.append(caller.call("PullMessages", PullMessagesRequest(node=node)))
        arrived.append(time.monotonic())

    delays = []
    for number in range(5):
        site = threading.Thread(target=wait)
        site.start()
        time.sleep(0.3 + number / 5)
        content = RecordDict({"config": ConfigRecord({"number": number, "content": bytes(100_000)})})
        begun = time.monotonic()
        post.push_messages([Message(content, node.node_id, "train")])
        site.join(30)
        delays.append(arrived[-1] - begun)
        named = got[-1].messages_list[0].metadata
        request = PullObjectRequest(node=node, run_id=named.run_id, object_id=named.message_id)
        assert caller.call("PullObject", request).object_available
    assert len({answer.messages_list[0].metadata.message_id for answer in got}) == 5
    print("seconds from a push to the site:", delays)

    # What a run sends meanwhile is there when the face is back, and so is who is connected.
    fleet.process.kill()
    fleet.process.wait(30)  # for all of its threads, which hold its ports until then
    post.push_messages([Message(RecordDict(), node.node_id, "train")])
    fleet.start()
    until(lambda: all(address.answers(*at) for at in daemon.ports(made)), "the ports")
    assert caller.call("PullMessages", PullMessagesRequest(node=node)).messages_list
    assert caller.activate() == node
    control.close()


def test_a_stranger_is_told_so_and_reaches_nothing(place):
    root, made, _ = place
    keys.site_keys(root / "stranger")
    with pytest.raises(grpc.RpcError) as refused:
        Caller(root, made, "stranger").activate()
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION and '"code": 2004' in refused.value.details()
    trusted = httpx.create_ssl_context(verify=str(made.path / "ca.crt"))
    with httpx.Client(base_url=f"https://localhost:{made.settings.http_port}", verify=trusted) as client:
        assert client.post("/v1/fleet/activate-node", content=b"").status_code == 401
        assert client.post("/v1/control/list-runs", content=b"").status_code == 404
