"""The Fleet port: what sites reach of the coordinator, and all that they reach.

gRPC with the Fleet methods alone, and, where `http_port` is set, the same by POST for sites behind a web proxy and for
Flower's own nodes. Both end here and go on through `relay.Relay`; neither Control nor Runtime API can be reached.
Flower's SuperLink, which has these on loopback, is in the same process: it takes a second to import, and has little to
do once it is there.

python -m fedpeft.deploy.launch fleet FOLDER PARENT MODE OPTIONS
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import ssl
import threading
from base64 import b64encode
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import uvicorn

from fedpeft.deploy import address, flower, settings
from fedpeft.deploy.coordinator.fleet import FleetApi, run_superlink
from fedpeft.deploy.coordinator.flower import Refusal
from fedpeft.deploy.coordinator.relay import PATHS, Relay
from fedpeft.deploy.launch import LARGEST_CALL
from fedpeft.deploy.settings import Server

log = logging.getLogger("fedpeft")
STATUS: dict[int, Any] = {
    HTTPStatus.BAD_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    HTTPStatus.UNAUTHORIZED: grpc.StatusCode.UNAUTHENTICATED,
    HTTPStatus.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    HTTPStatus.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    HTTPStatus.CONFLICT: grpc.StatusCode.FAILED_PRECONDITION,
    HTTPStatus.PRECONDITION_FAILED: grpc.StatusCode.FAILED_PRECONDITION,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: grpc.StatusCode.OUT_OF_RANGE,  # always; RESOURCE_EXHAUSTED passes
    HTTPStatus.UNPROCESSABLE_ENTITY: grpc.StatusCode.INVALID_ARGUMENT,
    HTTPStatus.TOO_MANY_REQUESTS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    HTTPStatus.INTERNAL_SERVER_ERROR: grpc.StatusCode.INTERNAL,
    HTTPStatus.SERVICE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
}
OPTIONS = [
    ("grpc.so_reuseport", 0),  # or a second coordinator would take half of the calls
    ("grpc.max_receive_message_length", LARGEST_CALL),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_concurrent_streams", 64),  # of one connection
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),  # sites ask whether the connection still stands
    ("grpc.keepalive_permit_without_calls", 1),
]
CALLS = 4096  # of all sites together
POLL_S = 0.05
Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


def main(folder: Path, mode: str, *options: str) -> None:
    """Serve until the process is ended.

    Args:
        mode: tls or insecure.
        options: of the SuperLink's command line.
    """
    server = settings.server(folder)
    threading.Thread(target=serve_or_end, args=(server, mode == "insecure"), daemon=True).start()
    run_superlink(*options)


def serve_or_end(server: Server, insecure: bool) -> None:
    """Serve sites; where that fails, end the process, which is then started again."""
    try:
        asyncio.run(serve(server, insecure))
    except BaseException:
        log.exception("sites cannot be served")
    os._exit(1)


async def serve(server: Server, insecure: bool) -> None:
    """Serve over gRPC, and over HTTP if server.yaml says so."""
    while not address.answers("127.0.0.1", server.settings.control_port):
        await asyncio.sleep(POLL_S)  # the SuperLink makes its state, or brings an older Flower's up to date
    relay = Relay(server, insecure, FleetApi(server.database(insecure), insecure))
    await relay.counter.open()
    face = grpc_server(relay, server, insecure)
    await face.start()
    if server.settings.http_port is None:
        await face.wait_for_termination()
    else:
        await http_server(relay, server, insecure).serve()


def grpc_server(relay: Relay, server: Server, insecure: bool) -> grpc.aio.Server:
    """The Fleet methods, bound to the Fleet port."""
    face = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=CALLS)
    face.add_generic_rpc_handlers((Methods(relay),))
    place = address.join(server.settings.listen, server.settings.port)
    if insecure:
        face.add_insecure_port(place)
    else:
        pair = [((server.path / "server.key").read_bytes(), (server.path / "server.crt").read_bytes())]
        face.add_secure_port(place, grpc.ssl_server_credentials(pair))
    return face


class Methods(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The Fleet methods. A call's identity is looked at before its message is read."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.handlers = {
            flower.grpc_path_of(name): (name, grpc.unary_unary_rpc_method_handler(answerer(relay, name)))
            for name in flower.METHODS
        }

    def service(self, handler_call_details: Any) -> Any:
        """What handles a call; of a method that is none of these, nothing."""
        name, handler = self.handlers.get(handler_call_details.method, ("", None))
        if handler is None:
            return None
        try:
            self.relay.admit(name, 0, headers_of(handler_call_details.invocation_metadata))
        except Refusal as refusal:
            return grpc.stream_unary_rpc_method_handler(refuser(refusal))  # as of a stream, of which nothing is read
        return handler


def refuser(refusal: Refusal) -> Callable[[Any, Any], Awaitable[None]]:
    """What answers a call with a refusal and reads nothing of it."""

    async def answer(_: Any, context: Any) -> None:
        await refuse(context, refusal)

    return answer


async def refuse(context: Any, refusal: Refusal) -> None:
    """End a call with the status of a refusal."""
    await context.abort(STATUS.get(refusal.status, grpc.StatusCode.UNKNOWN), refusal.said)


def answerer(relay: Relay, method: str) -> Callable[[bytes, Any], Awaitable[bytes]]:
    """What answers one method over gRPC; messages stay bytes."""

    async def answer(body: bytes, context: Any) -> bytes:
        try:
            return await relay.call(method, body, headers_of(context.invocation_metadata()))
        except Refusal as refusal:
            await refuse(context, refusal)
            raise

    return answer


def headers_of(metadata: Any) -> dict[str, str]:
    """A call's identity as it is written over HTTP, where bytes are in base64."""
    return {
        name.removesuffix("-bin"): b64encode(value).decode() if isinstance(value, bytes) else value
        for name, value in metadata or ()
        if name.startswith("flwr-")
    }


def http_server(relay: Relay, server: Server, insecure: bool) -> uvicorn.Server:
    """The Fleet paths, bound to `http_port`."""
    config = uvicorn.Config(
        door(relay),
        host=server.settings.listen,
        port=server.settings.http_port or 0,
        lifespan="off",
        access_log=False,
        log_level="warning",
        limit_concurrency=CALLS,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=1,  # calls that wait are made again
        ssl_certfile=None if insecure else str(server.path / "server.crt"),
        ssl_keyfile=None if insecure else str(server.path / "server.key"),
    )
    config.load()
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    return uvicorn.Server(config)


def door(relay: Relay) -> Callable[[dict[str, Any], Receive, Send], Awaitable[None]]:
    """An ASGI application: POST to a Fleet path, and nothing else."""

    async def answer(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            status: int = HTTPStatus.OK
            kind, content = flower.PROTOBUF, await passed(relay, scope, headers, receive)
        except Refusal as refusal:
            status, kind = refusal.status, "application/json"
            said = refusal.said
            content = (said if said.startswith("{") else json.dumps({"detail": said})).encode()
        fields = [(b"content-type", kind.encode()), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": int(status), "headers": fields})
        await send({"type": "http.response.body", "body": content})

    return answer


async def passed(relay: Relay, scope: dict[str, Any], headers: Mapping[str, str], receive: Receive) -> bytes:
    """The answer to one HTTP request. Its identity is looked at before its body is read."""
    method = PATHS.get(scope["path"])
    if method is None or scope["method"] != "POST":
        raise Refusal(HTTPStatus.NOT_FOUND, "only the Fleet API is here: POST to /v1/fleet/...")
    size = headers.get("content-length", "0")
    relay.admit(method, int(size) if size.isascii() and size.isdigit() else 0, headers)
    body = bytearray()
    while True:
        part = await receive()
        if part["type"] == "http.disconnect":
            raise Refusal(HTTPStatus.BAD_REQUEST, "the connection ended.")
        body += part.get("body", b"")
        if len(body) > LARGEST_CALL:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {LARGEST_CALL} bytes.")
        if not part.get("more_body"):
            return await relay.call(method, bytes(body), headers)
