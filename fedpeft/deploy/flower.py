"""What both sides of a deployment use of Flower beyond its public interface: messages as bytes.

The coordinator's side has `coordinator.flower` beside it, and what simulations need is in `fedpeft.flower`.
tests/unit/test_flower_names.py lists each private name, and tries it.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage


def write_message(message: Message) -> bytes:
    """A message as bytes."""
    data: bytes = message_to_proto(message).SerializeToString()
    return data


def read_message(data: bytes) -> Message:
    """The message that `write_message` wrote."""
    return message_from_proto(ProtoMessage.FromString(data))


def write_context(context: Context) -> bytes:
    """A context as bytes."""
    data: bytes = context_to_proto(context).SerializeToString()
    return data


def read_context(data: bytes) -> Context:
    """The context that `write_context` wrote."""
    return context_from_proto(ProtoContext.FromString(data))
