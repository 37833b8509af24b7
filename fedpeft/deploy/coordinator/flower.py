"""What the coordinator uses of Flower beyond its public interface: its SuperLink, its APIs on loopback, its Grid.

Private, and so listed and tried by tests/unit/test_flower_names.py: the messages of its APIs (flwr.proto), their HTTP
clients and what signs their calls (flwr.supercore), its Grid over HTTP and its program (flwr.superlink).
"""

from __future__ import annotations

import httpx
from flwr.app import Error, Message, Metadata
from flwr.app.message.message import make_message
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
from flwr.common.serde import fab_to_proto, run_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListNodesResponse,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fleet_pb2 import DESCRIPTOR, DeactivateNodeRequest, PullMessagesRequest, PullMessagesResponse
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    AcquireTaskResponse,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.cli.flower_superlink import flower_superlink
from flwr.superlink.grid.http_grid import HttpGrid

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
    "HeldTask",
    "ListNodesRequest",
    "ListNodesResponse",
    "ListRunsRequest",
    "PullMessagesRequest",
    "PullMessagesResponse",
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
FLEET_METHODS = tuple(DESCRIPTOR.services_by_name["Fleet"].methods_by_name)
PROTOBUF = PROTOBUF_MEDIA_TYPE
UNKNOWN_KEY = int(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED)
LATEST_S, OLDEST_S = SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE  # of a signature's time
AUTHENTICATED = frozenset({"/flwr.proto.Runtime/AcquireTask"})  # what an executor needs its secret for


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


class HeldTask:
    """A task that this process has others work on; Flower gives it up if not told so for 30 s, later 60."""

    def __init__(self, place: str, root: bytes | None, token: str) -> None:
        about = RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")
        proof = RuntimeTokenHttpInterceptor(token)
        self.client = RuntimeHttpClient.from_server_address(place, root is None, root, [about, proof])

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
    """The task of one run: its Grid, and how it ended."""

    def __init__(self, place: str, root: bytes | None, token: str) -> None:
        self.grid = HttpGrid(place, root is None, root, token=token)
        self.client = self.grid._runtime_client
        answer = self.client.PullTaskInput(PullTaskInputRequest())
        identify(answer.run.run_id, answer.context.node_id, answer.task_id)
        self.grid.set_run(run_from_proto(answer.run))

    def end(self, reason: str) -> None:
        """Say that the task has ended; with a reason if it failed."""
        self.client.PushTaskOutput(
            PushTaskOutputRequest(sub_status="failed" if reason else "completed", details=reason)
        )


def error_reply(about: Metadata, error: Error) -> Message:
    """A reply that nobody sent, with metadata of our own."""
    return make_message(about, error=error)


def is_signed(key: bytes, text: str, signature: bytes) -> bool:
    """Whether the holder of a key, which is given as Flower keeps it, has signed the text."""
    return verify_signature(bytes_to_public_key(key), text.encode(), signature)
