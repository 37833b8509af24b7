"""What the Fleet API takes of Flower beyond its public interface: calls, who signs them, messages as objects.

It is light, as a site's node is. The coordinator's side has `coordinator.flower` beside it, and what simulations need
is in `fedpeft.flower`. tests/unit/test_flower_names.py lists each private name, and tries it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from flwr import __version__
from flwr.app import ConfigRecord as PublicConfigRecord
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto, recorddict_from_proto, recorddict_to_proto
from flwr.proto.fleet_pb2 import DESCRIPTOR, PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import Message as MessageMessage
from flwr.proto.node_pb2 import Node
from flwr.proto.recorddict_pb2 import ConfigRecord, MetricRecord
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictMessage
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from google.protobuf.message import DecodeError

from fedpeft.deploy import bounds
from fedpeft.flower import ErrorCode, identify

__all__ = [
    "DecodeError",
    "Message",
    "Node",
    "PullMessagesResponse",
    "PushMessagesRequest",
    "message_from_proto",
    "remove_content_from_message",
]

PROTOBUF = "application/protobuf"  # of bodies over HTTP
HEARTBEAT_S = 30.0  # within twice this a node that is silent counts as away
KEY_IN_USE, UNKNOWN_KEY, RUN_ENDED, NO_RUN = 23, 2004, 2007, 2008  # Flower's numbers of errors
FRESH_S = 20.0  # of a signature
ALONG, ALONG_BYTES = "fedpeft.objects", 2**16  # a record with a message's objects, and the most of them
SIGNED: dict[Any, tuple[float, list[tuple[str, str | bytes]]]] = {}  # by keys: when, and the identity
Objects = Callable[[str], bytes]
FLEET = DESCRIPTOR.services_by_name["Fleet"]
METHODS = FLEET.methods_by_name
# Of objects by their names: what must hold of their bytes before Flower builds them.
BOUNDS: dict[str, Callable[[bytes], None]] = {
    "Message": lambda body: bounds.require_few(body, MessageMessage.DESCRIPTOR),
    "ConfigRecord": lambda body: bounds.require_few(body, ConfigRecord.DESCRIPTOR),
    "MetricRecord": lambda body: bounds.require_few(body, MetricRecord.DESCRIPTOR),
    "RecordDict": bounds.require_short,
    "ArrayRecord": bounds.require_short,
    "Array": bounds.require_pieces_once,
    "ArrayChunk": lambda body: None,
}


def request(method: str, node: Node | None, **fields: Any) -> Any:
    """The request of a call to the Fleet API, such as PullMessages; with the node where it has one."""
    kind = METHODS[method].input_type
    return kind._concrete_class(**fields, **({"node": node} if "node" in kind.fields_by_name else {}))


def path_of(method: str) -> str:
    """Where a method of the Fleet API is called over HTTP."""
    return f"/v1/fleet/{re.sub(r'(?<!^)(?=[A-Z])', '-', method).lower()}"


def grpc_path_of(method: str) -> str:
    """Where a method of the Fleet API is called over gRPC."""
    return f"/{FLEET.full_name}/{method}"


def answer_type(method: str) -> Any:
    """The class of the answer to a call."""
    return METHODS[method].output_type._concrete_class


def error_number(text: str) -> int:
    """Flower's number of an error from what came with it; 0 if there is none."""
    try:
        return int(json.loads(text)["code"])
    except (ValueError, TypeError, KeyError):
        return 0


def public_bytes(key: Any) -> bytes:
    """The public half of a key, as Flower knows a node by it."""
    return public_key_to_bytes(key.public_key())


def identity(key: Any, shift_s: float = 0.0) -> list[tuple[str, str | bytes]]:
    """What proves who calls over gRPC: public key, time (`shift_s` from now), its signature, and our versions.

    Signed anew after a while, or when the clock was set: a signature costs either side as much as a small call.
    """
    age_s = time.time() - SIGNED.get(key, (0.0, []))[0]
    if shift_s or not 0 <= age_s < FRESH_S:
        SIGNED[key] = time.time() if not shift_s else 0.0, signed(key, shift_s)
    return SIGNED[key][1]


def signed(key: Any, shift_s: float) -> list[tuple[str, str | bytes]]:
    """An identity with a signature of its own."""
    stamp = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=shift_s)).isoformat()
    return [
        ("flwr-public-key-bin", public_bytes(key)),
        ("flwr-timestamp", stamp),
        ("flwr-signature-bin", sign_message(key, stamp.encode("ascii"))),
        ("flwr-package-name", "flwr"),
        ("flwr-package-version", __version__),
        ("flwr-component-name", "SuperNode"),
    ]


def headers_of(identity: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
    """The same as it is over HTTP, where bytes are in base64."""
    return {
        name.removesuffix("-bin"): b64encode(value).decode() if isinstance(value, bytes) else value
        for name, value in identity
        if name.startswith("flwr-")
    }


def object_ids(tree: Any) -> Iterator[str]:
    """Ids of an object tree, children first."""
    for child in tree.children:
        yield from object_ids(child)
    yield tree.object_id


def inflated(pulled: PullMessagesResponse, contents: dict[str, bytes]) -> Message:
    """The message of one pull, from its objects."""
    return put_together(pulled.message_object_trees[0].object_id, contents)


def put_together(root: str, contents: dict[str, bytes]) -> Message:
    """The message with this id, from its objects.

    Raises:
        ValueError: one of them would become much more than it is, or is of no known kind.
        Exception: Flower's, of objects that are no message.
    """
    for content in contents.values():
        head, _, body = content.partition(HEAD_BODY_DIVIDER)
        bounds.require_short(head)
        name = head.decode().partition(HEAD_VALUE_DIVIDER)[0]
        if name not in BOUNDS:
            raise ValueError(f"an object is of no known kind: {name}")
        BOUNDS[name](body)
    message = cast(Message, inflate_object_from_contents(root, contents))
    message.metadata.__dict__["_message_id"] = root  # an object does not hold its own hash
    return message


def send_along(message: Any, objects: dict[str, bytes]) -> None:
    """Let small objects of a message travel in the call that names it, as each of them costs a call otherwise.

    Flower leaves `content` of a message empty, and reads nothing of it: its content is in the objects.
    """
    if sum(map(len, objects.values())) <= ALONG_BYTES:
        message.content.CopyFrom(recorddict_to_proto(RecordDict({ALONG: PublicConfigRecord({**objects})})))


def take_along(message: Any) -> dict[str, bytes]:
    """The objects that travelled with a message, which then has none; what is not what its id says is left out."""
    found = {
        entry.key: bytes(entry.value.bytes)
        for item in message.content.items
        if item.key == ALONG
        for entry in item.config_record.items
    }
    if message.HasField("content"):  # which stays, empty: Flower takes a message without any for none
        del message.content.items[:]
    return {name: content for name, content in found.items() if hashlib.sha256(content).hexdigest() == name}


def deflated(reply: Message) -> tuple[PushMessagesRequest, Objects]:
    """A reply as it is pushed: without its content, beside what gives the objects that have it, by their ids."""
    reply.metadata.__dict__["_message_id"] = reply.object_id
    request = PushMessagesRequest(messages_list=[message_to_proto(remove_content_from_message(reply))])
    with no_object_id_recompute():
        request.message_object_trees.append(get_object_tree(reply))
        objects = {name: item.deflate() for name, item in get_all_nested_objects(reply).items()}
    return request, objects.__getitem__


def content_to_bytes(content: RecordDict) -> bytes:
    """A message's content as one protobuf message."""
    return bytes(recorddict_to_proto(content).SerializeToString(deterministic=True))


def content_from_bytes(whole: bytes) -> RecordDict:
    """The inverse of `content_to_bytes`.

    Raises:
        ValueError: it is none, or would become much more than it is.
    """
    bounds.require_few(whole, RecordDictMessage.DESCRIPTOR)
    try:
        return recorddict_from_proto(RecordDictMessage.FromString(whole))
    except DecodeError as error:
        raise ValueError("it is no content of a message") from error


def failure(pulled: PullMessagesResponse, reason: str) -> Message:
    """The reply to a message that this site cannot answer."""
    context_of(pulled)
    crashed = Error(ErrorCode.CLIENT_APP_CRASHED, reason)
    return Message(crashed, reply_to=message_from_proto(pulled.messages_list[0]))


def context_of(pulled: PullMessagesResponse) -> Context:
    """Flower's context of a message, which this process then works on."""
    data = pulled.messages_list[0].metadata
    identify(data.run_id, data.dst_node_id, 0)
    return Context(data.run_id, data.dst_node_id, {}, RecordDict(), {})
