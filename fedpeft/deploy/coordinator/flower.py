"""What the coordinator uses of Flower beyond its public interface: its SuperLink, its APIs, its state on the disk.

Private, and so listed and tried by tests/unit/test_flower_names.py: the messages of its APIs (flwr.proto), their HTTP
clients and what signs their calls (flwr.supercore), its state and the functions behind its Fleet API (flwr.server,
flwr.superlink), its program.

The SuperLink hands out runs and registers sites, over HTTP. What sites call is answered by Flower's own functions in
the process that they reach, on the state that the SuperLink has too: over HTTP a call costs a multiple of that.
"""

from __future__ import annotations

import errno
import inspect
import json
import re
import sqlite3
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

import httpx
from flwr.app import Error, Message, Metadata
from flwr.app.message.message import make_message
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE, Status
from flwr.common.serde import fab_to_proto, run_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fleet_pb2 import DESCRIPTOR, DeactivateNodeRequest, PullMessagesRequest, PullMessagesResponse
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    AcquireTaskResponse,
    GetNodesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.server.superlink.linkstate import LinkStateFactory, SqlLinkState
from flwr.supercore.constant import NodeStatus, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.cli.flower_superlink import flower_superlink
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.servicer.fleet import fleet_handlers
from google.protobuf.message import DecodeError

from fedpeft.flower import identify

__all__ = [
    "FLEET_METHODS",
    "FLEET_SERVICE",
    "LATEST_S",
    "OLDEST_S",
    "PROTOBUF",
    "UNKNOWN_KEY",
    "ControlHttpClient",
    "DeactivateNodeRequest",
    "FleetApi",
    "HeldTask",
    "ListNodesRequest",
    "ListRunsRequest",
    "PullMessagesRequest",
    "PullMessagesResponse",
    "Refusal",
    "RegisterNodeRequest",
    "RuntimeHttpClient",
    "StartRunRequest",
    "StopRunRequest",
    "Task",
    "UnregisterNodeRequest",
    "control_client",
    "error_reply",
    "executor_client",
    "flower_superlink",
    "is_signed",
    "start_run_request",
    "take_task",
]
FLEET_SERVICE = DESCRIPTOR.services_by_name["Fleet"].full_name
FLEET_METHODS = DESCRIPTOR.services_by_name["Fleet"].methods_by_name
PROTOBUF = PROTOBUF_MEDIA_TYPE
UNKNOWN_KEY = int(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED)
LATEST_S, OLDEST_S = SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE  # of a signature's time
AUTHENTICATED = frozenset({"/flwr.proto.Runtime/AcquireTask"})  # what an executor needs its secret for
LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
NO_DISK = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)


class Refusal(Exception):
    """A call that is not answered: the HTTP status, and what its caller is told."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"{status}: {said}")
        self.status, self.said = status, said


def control_client(place: str, root: bytes | None) -> ControlHttpClient:
    """The API of operators at HOST:PORT; without a root certificate not over TLS."""
    about = RuntimeVersionHttpInterceptor(component_name="flwr CLI")
    return ControlHttpClient.from_server_address(place, root is None, root, [about])


def executor_client(place: str, root: bytes | None, secret: bytes) -> RuntimeHttpClient:
    """The API that hands out tasks, to those who know the secret."""
    about = RuntimeVersionHttpInterceptor(component_name="SuperExec")
    proof = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=AUTHENTICATED)
    return RuntimeHttpClient.from_server_address(place, root is None, root, [about, proof])


def take_task(client: RuntimeHttpClient) -> tuple[int, str] | None:
    """Flower's number and token of a run that is to be started; None if there is none."""
    answer: AcquireTaskResponse = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
    return (int(answer.task.run_id), answer.token) if answer.HasField("task") and answer.token else None


def task_client(place: str, root: bytes | None, token: str, again: Any = None) -> RuntimeHttpClient:
    """The API of who works on a task; `again` makes calls anew that a SuperLink did not answer."""
    about = RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")
    proof = RuntimeTokenHttpInterceptor(token)
    return RuntimeHttpClient.from_server_address(place, root is None, root, [about, proof], retry_invoker=again)


class HeldTask:
    """A task that this process has others work on; Flower gives it up if not told so for 30 s, later 60."""

    def __init__(self, place: str, root: bytes | None, token: str) -> None:
        self.client = task_client(place, root, token)

    def beat(self) -> bool:
        """Say that it is worked on; whether Flower still has it.

        Raises:
            httpx.HTTPError: the SuperLink does not answer.
        """
        try:
            return bool(self.client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success)
        except httpx.HTTPStatusError as error:
            if error.response.is_server_error:
                raise
            return False

    def close(self) -> None:
        """Close the connection; the task is given up unless it has ended."""
        self.client.close()


def start_run_request(files: dict[str, bytes], settings: dict[str, bool | float | int | str]) -> StartRunRequest:
    """A run of an app that consists of these files, with these settings of its own."""
    content = build_fab_from_files(files)[0]
    return StartRunRequest(fab=fab_to_proto(Fab("", content, {})), override_config=user_config_to_proto(settings))


class Task:
    """The task of one run: which run it is, and how it ended."""

    def __init__(self, place: str, root: bytes | None, token: str) -> None:
        self.client = task_client(place, root, token, make_simple_http_retry_invoker())
        answer = self.client.PullTaskInput(PullTaskInputRequest())
        identify(answer.run.run_id, answer.context.node_id, answer.task_id)
        self.run = run_from_proto(answer.run)

    def nodes(self) -> list[NodeInfo]:
        """The nodes that count as connected."""
        return list(self.client.GetNodes(GetNodesRequest()).nodes)

    def end(self, reason: str) -> None:
        """Say that the task has ended; with a reason if it failed."""
        self.client.PushTaskOutput(
            PushTaskOutputRequest(sub_status="failed" if reason else "completed", details=reason)
        )


def disk_trouble(error: Exception, database: Path) -> OSError | None:
    """What the disk said where an error of Flower's state is the disk's; one that is only busy is to be tried again."""
    cause = getattr(error, "orig", None)  # SQLAlchemy's, of SQLite's
    code = cause.sqlite_errorcode & 0xFF if isinstance(cause, sqlite3.OperationalError) else -1
    if code in LOCKED:
        return OSError(errno.EAGAIN, "busy", str(database))
    full = code == sqlite3.SQLITE_FULL
    return OSError(errno.ENOSPC if full else errno.EIO, str(cause), str(database)) if code in NO_DISK else None


class FleetApi:
    """Flower's Fleet API: its own functions, called in this process.

    Flower's HTTP server compares the caller's key with the node that a call is of. There is no such server in between,
    so that is done here; signatures are looked at by the caller.
    """

    def __init__(self, database: Path, insecure: bool) -> None:
        self.database, self.insecure, self.state = database, insecure, self.opened(database)
        self.parts = {
            "state": self.state,
            "store": self.state.object_store,
            "enable_supernode_auth": not insecure,
        }

    @staticmethod
    def opened(database: Path) -> SqlLinkState:
        """Flower's runs, nodes and messages on the disk; a SuperLink has made the file."""
        store = ObjectStoreFactory(str(database))
        return cast(SqlLinkState, LinkStateFactory(str(database), NoOpFederationManager(), store).state())

    @staticmethod
    def handler(method: str) -> Any:
        """Flower's function behind a method."""
        return getattr(fleet_handlers, re.sub(r"(?<!^)(?=[A-Z])", "_", method).lower())

    def call(self, method: str, body: bytes, key: bytes) -> bytes:
        """The answer to a call of who holds this key.

        Raises:
            Refusal: by Flower, with its number, or there is no answer.
        """
        try:
            asked = FLEET_METHODS[method].input_type._concrete_class.FromString(body)
        except DecodeError as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"no request of {method}.") from error
        handler = self.handler(method)
        wanted = inspect.signature(handler).parameters
        try:
            self.require_own(asked, key)
            answer = handler(asked, **{name: part for name, part in self.parts.items() if name in wanted})
        except FlowerError as error:
            said = API_ERROR_MAP[error.code]
            raise Refusal(said.http_status_code, json.dumps(error.to_json(said.public_message))) from error
        except Refusal:
            raise
        except Exception as error:
            if trouble := disk_trouble(error, self.database):
                raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, f"the coordinator's disk: {trouble.strerror}.") from error
            raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "the coordinator cannot answer this call.") from error
        return bytes(answer.SerializeToString())

    def require_own(self, asked: Any, key: bytes) -> None:
        """Refuse a call of another node than the key's."""
        fields = asked.DESCRIPTOR.fields_by_name
        if self.insecure:
            return
        if "public_key" in fields:
            if asked.public_key != key:
                raise Refusal(HTTPStatus.UNAUTHORIZED, "invalid node: the key is not the caller's.")
            return
        named = {(asked.node if "node" in fields else asked).node_id}
        if "messages_list" in fields:
            named |= {message.metadata.src_node_id for message in asked.messages_list}
        if named != {self.node_of(key)}:
            raise Refusal(HTTPStatus.UNAUTHORIZED, "invalid node ID.")

    def node_of(self, key: bytes) -> int | None:
        """Flower's number of the node with this key."""
        return self.state.get_node_id_by_public_key(key)

    def online(self, key: bytes) -> int | None:
        """Flower's number of a node that counts as connected; None if the key has none."""
        node = self.node_of(key)
        found = [] if node is None else self.state.get_node_info(node_ids=[node], statuses=[NodeStatus.ONLINE])
        return node if found else None

    def works_on(self, run: int) -> bool:
        """Whether a run has neither ended nor is unknown."""
        status = self.state.get_run_status({run}).get(run)
        return status is not None and status.status != Status.FINISHED


def error_reply(about: Metadata, error: Error) -> Message:
    """A reply that nobody sent, with metadata of our own."""
    return make_message(about, error=error)


def is_signed(key: bytes, text: str, signature: bytes) -> bool:
    """Whether the holder of a key, which is given as Flower keeps it, has signed the text."""
    return verify_signature(bytes_to_public_key(key), text.encode(), signature)
