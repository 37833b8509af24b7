"""A site's Flower client: takes a message from the SuperNode, has the resident worker answer it, hands the reply back.

It stands where Flower would unpack the app that came from the server and run it. The app's bytes arrive with the task,
as the SuperNode passes them on; they are dropped unread. This process never imports torch.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

log = logging.getLogger("fedpeft")
POLL_S = 0.1
DOWN_S = 1.0
PATIENCE_S = 60.0  # for a worker that is being started
AUTHENTICATED = frozenset({"/flwr.proto.Runtime/AcquireTask"})


def main(folder: Path, address: str, socket: str) -> None:
    """Work until ended.

    Args:
        address: HOST:PORT of the SuperNode's runtime API, on loopback.
        socket: of the resident worker.
    """
    secret = (folder / "secret").read_bytes()
    client = RuntimeHttpClient.from_server_address(
        address,
        True,
        None,
        [
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=AUTHENTICATED),
        ],
    )
    worker = WorkerLink(socket)
    while True:
        try:
            answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
            if answer.HasField("task") and answer.token:
                threading.Thread(target=handled, args=(address, answer.token, worker), daemon=True).start()
        except httpx.HTTPError as error:
            log.debug("the SuperNode does not answer: %s", error)
            time.sleep(DOWN_S)
        time.sleep(POLL_S)


def handled(address: str, token: str, worker: WorkerLink) -> None:
    """One message in a thread of its own: Flower makes a task before the message is there, and keeps it for hours when
    the coordinator went away in between. Such a one must not hold up the next.
    """
    try:
        handle(address, token, worker)
    except Exception:  # of one message, as when its run was stopped meanwhile
        log.exception("a message was lost")


def handle(address: str, token: str, worker: WorkerLink) -> None:
    """One message, from the SuperNode to the worker and back."""
    client = RuntimeHttpClient.from_server_address(
        address,
        True,
        None,
        [RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), RuntimeTokenHttpInterceptor(token)],
    )
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    context, failed = None, "the message was lost"
    try:
        noted = Noted(client)
        message, context, _, _ = pull_task_input(noted)  # type: ignore[arg-type]  # the fourth is the app that the server sent
        reply, context = worker.ask(message, context, noted.identity)
        push_message(client, reply, context)
        failed = str(reply.error.reason) if reply.has_error() else ""
    finally:
        # Also of a message that was lost, or Flower would keep its task for hours.
        push_task_output(client, context, SubStatus.FAILED if failed else SubStatus.COMPLETED, failed)
        heartbeat.stop()
        client.close()


class Noted:
    """Flower's client, noting whose task it is given: Flower itself keeps that once a process, not once a thread."""

    def __init__(self, client: RuntimeHttpClient) -> None:
        self.client, self.identity = client, [0, 0, 0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def PullTaskInput(self, request: Any) -> Any:
        """Flower's call, after which `identity` holds run, node and task of its answer."""
        answer = self.client.PullTaskInput(request)
        self.identity = [answer.run.run_id, answer.context.node_id, answer.task_id]
        return answer


class WorkerLink:
    """The connection to the resident worker, made when it is needed; for one message at a time."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self.pipe: Connection | None = None
        self.lock = threading.Lock()

    def ask(self, message: Message, context: Context, identity: list[int]) -> tuple[Message, Context]:
        """Reply and new context; an error reply if the worker ends meanwhile or does not come up."""
        with self.lock:
            # Under the lock, as Flower keeps it once a process.
            TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = identity
            return self._ask(message, context, identity)

    def _ask(self, message: Message, context: Context, identity: list[int]) -> tuple[Message, Context]:
        try:
            pipe = self.pipe = self.pipe or self.connect()
            pipe.send_bytes(json.dumps(identity).encode())
            pipe.send_bytes(message_to_proto(message).SerializeToString())
            pipe.send_bytes(context_to_proto(context).SerializeToString())
            reply = message_from_proto(ProtoMessage.FromString(pipe.recv_bytes()))
            return reply, context_from_proto(ProtoContext.FromString(pipe.recv_bytes()))
        except (EOFError, OSError) as error:
            # A new connection for the next message: a pipe with half an answer in it cannot be read on.
            self.pipe = None
            log.warning("the worker is gone: %s", error or "it ended")
            reason = "the site's worker ended; it is started again."
            return Message(Error(ErrorCode.CLIENT_APP_CRASHED, reason), reply_to=message), context

    def connect(self) -> Connection:
        """A connection to the worker's socket, tried again for PATIENCE_S.

        Raises:
            OSError: the worker has not come up by then.
        """
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                return Client(self.socket, "AF_UNIX")
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(POLL_S)
