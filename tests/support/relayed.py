"""A relay with a site that it knows, before a stand-in of Flower's Fleet API; its fixtures are imported by name."""

from __future__ import annotations

import time
from base64 import b64encode
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse

from fedpeft.deploy import keys, settings
from fedpeft.deploy.coordinator import relay, server
from fedpeft.deploy.flower import METHODS

NODE = 7


class Flower:
    """Stands where Flower's Fleet API is: what was asked, the messages that it still has, and whether north counts as
    connected.
    """

    def __init__(self):
        self.asked, self.messages, self.delay_s, self.refusal, self.there = [], [], 0.0, None, False
        self.looks = 0

    def call(self, method, body, key):
        self.asked.append((method, body, key))
        time.sleep(self.delay_s)
        if self.refusal:
            raise self.refusal
        if method == "ActivateNode" and self.there:
            raise relay.Refusal(412, '{"code": 2004}')
        if method == "DeactivateNode":
            self.there = False
        if method != "PullMessages":
            return b"answer"
        answer = PullMessagesResponse()
        if self.messages:
            answer.messages_list.add().metadata.message_id = self.messages.pop(0)
        return answer.SerializeToString()

    def nodes_with_messages(self):
        self.looks += 1
        return {NODE} if self.messages else set()

    def node_of(self, key):
        return NODE

    def online(self, key):
        return NODE if self.there else None


@pytest.fixture
def flower():
    return Flower()


@pytest.fixture
def rig(tmp_path, flower):
    """A relay that knows site north, and north's headers at a shift of its clock."""
    folder = tmp_path / "coordinator"
    server.init(folder, "localhost", 9092, 9093, "127.0.0.1")
    server.add_site(folder, "north", keys.site_keys(tmp_path))
    return relay.Relay(settings.server(folder), False, flower), folder, tmp_path


def headers(place, shift_s=0.0, **changed):
    key = load_ssh_private_key((place / "site.key").read_bytes(), None)
    stamp = (datetime.now(UTC) + timedelta(seconds=shift_s)).isoformat()
    signature = key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
    public = keys.pem((place / "site.pub").read_text())
    found = {
        "flwr-public-key": b64encode(public).decode(),
        "flwr-timestamp": stamp,
        "flwr-signature": b64encode(signature).decode(),
        "cookie": "x",
    }
    return {**found, **changed}


async def call(passing, method, body, fields):
    """The answer to a call of a site whose message is there, or comes by `body`."""

    async def read():
        return body

    async with passing.call(method, body if callable(body) else read, fields) as content:
        return content


def named(content):
    messages = PullMessagesResponse.FromString(content).messages_list
    return messages[0].metadata.message_id if messages else None


def pulled(*received, node=NODE):
    return PullMessagesRequest(message_ids=received, node={"node_id": node}).SerializeToString()


def of_run(method, run=5, node=NODE, **fields):
    """A call that is of a run."""
    kind = METHODS[method].input_type._concrete_class
    return kind(node={"node_id": node}, run_id=run, **fields).SerializeToString()
