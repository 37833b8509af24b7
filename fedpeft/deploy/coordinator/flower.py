"""What the coordinator's processes use of Flower beyond its public interface: the Control API of its SuperLink.

Private, and so listed and tried by tests/unit/test_flower_names.py: the messages of its APIs (flwr.proto) and the HTTP
client of its operators (flwr.supercore). What needs Flower's server is in `coordinator.fleet`.

The SuperLink registers sites and knows which are connected. Runs of fedpeft are none of its runs: their messages are in
their own processes (`post`), and their names and states in their folders. It has no user accounts: who reaches its port
may submit runs. It is bound to 127.0.0.1, and what is submitted is never executed: nobody takes it from the SuperLink.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import httpx
from flwr.app import Error, Message, Metadata
from flwr.app.message.message import make_message
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

from fedpeft.deploy.flower import METHODS, DecodeError
from fedpeft.deploy.settings import Server
from fedpeft.errors import RunError

log = logging.getLogger("fedpeft")
LATEST_S, OLDEST_S = SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE  # of a signature's time
RETRY_S = 0.1  # while the SuperLink is being started


class Refusal(Exception):
    """A call that is not answered: the HTTP status, and what its caller is told."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"{status}: {said}")
        self.status, self.said = status, said

    @classmethod
    def numbered(cls, status: int, number: int, said: str) -> Refusal:
        """One with Flower's number of an error, which nodes go by."""
        return cls(status, json.dumps({"code": number, "public_message": said}))


def read_request(method: str, body: bytes) -> Any:
    """The request of a call to the Fleet API.

    Raises:
        Refusal: it is none.
    """
    try:
        return METHODS[method].input_type._concrete_class.FromString(body)
    except DecodeError as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"no request of {method}.") from error


def error_reply(about: Metadata, error: Error) -> Message:
    """A reply that nobody sent, with metadata of our own."""
    return make_message(about, error=error)


def is_signed(key: bytes, text: str, signature: bytes) -> bool:
    """Whether the holder of a key, which is given as Flower keeps it, has signed the text."""
    return verify_signature(bytes_to_public_key(key), text.encode(), signature)


class Control:
    """A connection to the running coordinator."""

    def __init__(self, server: Server, insecure: bool) -> None:
        self.server = server
        root = None if insecure else (server.path / "ca.crt").read_bytes()
        self.client = ControlHttpClient.from_server_address(server.control, root is None, root, [])

    def nodes(self) -> list[NodeInfo]:
        """The SuperLink's nodes that have not been unregistered, online or not."""
        answer = self.client.ListNodes(ListNodesRequest())
        return [node for node in answer.nodes_info if node.status != NodeStatus.UNREGISTERED]

    def online(self) -> list[NodeInfo]:
        """The nodes that count as connected, as soon as the SuperLink answers."""
        while True:
            try:
                return [node for node in self.nodes() if node.status == NodeStatus.ONLINE]
            except httpx.TransportError as error:
                log.debug("the SuperLink does not answer: %s", error)
                time.sleep(RETRY_S)

    def register_missing(self) -> None:
        """Make the SuperLink's sites those of the folder."""
        nodes, wanted = self.nodes(), set(self.server.site_keys().items())
        for node in nodes:
            # Key and name together: a site that made a new key is another one to the SuperLink.
            if node.public_key and node.name and (node.name, node.public_key) not in wanted:
                self.client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))  # it is kept, as unregistered
        known = {(node.name, node.public_key) for node in nodes}
        for name, key in sorted(wanted - known):
            self.client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))

    def close(self) -> None:
        """Close the HTTP connection; the coordinator goes on."""
        self.client.close()


@contextmanager
def connect_once(server: Server, insecure: bool) -> Iterator[Control]:
    """A connection for one command.

    Raises:
        RunError: the coordinator does not answer.
    """
    control = Control(server, insecure)
    try:
        yield control
    except httpx.HTTPError as error:
        raise RunError(
            f"the coordinator does not answer on {server.control}: {error}. Is `fedpeft server start "
            f"{server.path}` running?"
        ) from error
    finally:
        control.close()
