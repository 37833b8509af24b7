"""What the coordinator's processes use of Flower beyond its public interface: its Control API, names of its Fleet API.

Private, and so listed and tried by tests/unit/test_flower_names.py: the messages of its APIs (flwr.proto) and the HTTP
client of its operators (flwr.supercore). What needs Flower's server is in `coordinator.fleet`.

The SuperLink registers sites and knows which are connected. Runs of fedpeft are none of its runs: their messages are in
their own processes (`post`), and their names and states in their folders.
"""

from __future__ import annotations

import json
import sys

from flwr.app import Error, Message, Metadata
from flwr.app.message.message import make_message
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.proto.fleet_pb2 import DESCRIPTOR, DeactivateNodeRequest, PullMessagesRequest, PullMessagesResponse
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

__all__ = [
    "FLEET_METHODS",
    "FLEET_SERVICE",
    "LATEST_S",
    "OLDEST_S",
    "PROTOBUF",
    "ControlHttpClient",
    "DeactivateNodeRequest",
    "ListNodesRequest",
    "NodeInfo",
    "NodeStatus",
    "PullMessagesRequest",
    "PullMessagesResponse",
    "Refusal",
    "RegisterNodeRequest",
    "UnregisterNodeRequest",
    "control_client",
    "error_reply",
    "is_signed",
    "run_superlink",
]
FLEET_SERVICE = DESCRIPTOR.services_by_name["Fleet"].full_name
FLEET_METHODS = DESCRIPTOR.services_by_name["Fleet"].methods_by_name
PROTOBUF = PROTOBUF_MEDIA_TYPE
LATEST_S, OLDEST_S = SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE  # of a signature's time


class Refusal(Exception):
    """A call that is not answered: the HTTP status, and what its caller is told."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"{status}: {said}")
        self.status, self.said = status, said

    @classmethod
    def numbered(cls, status: int, number: int, said: str) -> Refusal:
        """One with Flower's number of an error, which nodes go by."""
        return cls(status, json.dumps({"code": number, "public_message": said}))


def run_superlink(arguments: list[str]) -> None:
    """Be Flower's SuperLink, with the options of its command line."""
    from flwr.superlink.cli.flower_superlink import flower_superlink

    sys.argv = ["flower-superlink", *arguments]
    flower_superlink()


def control_client(place: str, root: bytes | None) -> ControlHttpClient:
    """The API of operators at HOST:PORT; without a root certificate not over TLS."""
    return ControlHttpClient.from_server_address(place, root is None, root, [])


def error_reply(about: Metadata, error: Error) -> Message:
    """A reply that nobody sent, with metadata of our own."""
    return make_message(about, error=error)


def is_signed(key: bytes, text: str, signature: bytes) -> bool:
    """Whether the holder of a key, which is given as Flower keeps it, has signed the text."""
    return verify_signature(bytes_to_public_key(key), text.encode(), signature)
