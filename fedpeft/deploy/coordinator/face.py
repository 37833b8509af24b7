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
from collections.abc import Awaitable, Callable
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedpeft.deploy import address, flower, settings
from fedpeft.deploy.coordinator.fleet import FleetApi, run_superlink
from fedpeft.deploy.coordinator.flower import Refusal
from fedpeft.deploy.coordinator.relay import PATHS, Relay, require_size
from fedpeft.deploy.launch import LARGEST_CALL
from fedpeft.deploy.settings import Server

log = logging.getLogger("fedpeft")
STATUS: dict[int, Any] = {
    HTTPStatus.BAD_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    HTTPStatus.UNAUTHORIZED: grpc.StatusCode.UNAUTHENTICATED,
    HTTPStatus.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    HTTPStatus.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    HTTPStatus.REQUEST_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
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
    ("grpc.http2.bdp_probe", 0),  # or of each stream all comes that the network carries, whether it is read or not
    ("grpc.max_connection_idle_ms", 300_000),  # a site calls more often, whatever it is at
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),  # sites ask whether the connection still stands
    ("grpc.keepalive_permit_without_calls", 1),
]
CALLS = 4096  # of all sites together
HEAD_S = 10.0  # from one call over HTTP to the next, or the connection ends
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
    """The Fleet methods, bound to the Fleet port; each as of streams, so that `answerer` reads its message."""
    face = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=CALLS)
    handlers = {name: grpc.stream_stream_rpc_method_handler(answerer(relay, name)) for name in flower.METHODS}
    face.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(flower.FLEET.full_name, handlers),))
    place = address.join(server.settings.listen, server.settings.port)
    if insecure:
        face.add_insecure_port(place)
    else:
        pair = [((server.path / "server.key").read_bytes(), (server.path / "server.crt").read_bytes())]
        face.add_secure_port(place, grpc.ssl_server_credentials(pair))
    return face


def answerer(relay: Relay, method: str) -> Callable[[Any, Any], Awaitable[None]]:
    """What answers one method over gRPC, and waits until the answer is taken; messages stay bytes."""

    async def answer(_: Any, context: Any) -> None:
        async def read() -> bytes:
            # Not by the iterator, whose cycle of references would keep a message until the collector comes by.
            message = await context.read()
            return b"" if message is grpc.aio.EOF else bytes(message)

        try:
            async with relay.call(method, read, flower.headers_of(context.invocation_metadata() or ())) as content:
                await context.write(content)
        except Refusal as refusal:  # not by `abort`, which keeps its exception, and so what was read, likewise
            context.set_code(STATUS.get(refusal.status, grpc.StatusCode.UNKNOWN))
            context.set_details(refusal.said)

    return answer


class Prompt(H11Protocol):  # its heads are bounded, those of uvicorn's other protocol not
    """A connection over HTTP that makes room for others, or ends after a while, as long as nobody calls by it."""

    since = 0.0
    seen: object = None  # the call that was the newest at the last look

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) >= CALLS:
            idle = [one for one in self.connections if isinstance(one, Prompt) and one.since and not one.serves()]
            for oldest in sorted(idle, key=lambda one: one.since)[:1]:
                oldest.transport.abort()
                self.connections.discard(oldest)
        self.since = self.loop.time()
        self.loop.call_later(HEAD_S, self.look)

    def serves(self) -> bool:
        """Whether a call came whose answer has not gone."""
        return self.cycle is not None and not self.cycle.response_complete

    def look(self) -> None:
        """End it if no call has come since the last look."""
        if self.transport.is_closing():
            return
        if self.seen is self.cycle and not self.serves():
            self.transport.abort()
        self.seen = self.cycle
        self.loop.call_later(HEAD_S, self.look)


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
        http=Prompt,
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
        size = headers.get("content-length", "0")
        try:
            method = PATHS.get(scope["path"])
            if method is None or scope["method"] != "POST":
                raise Refusal(HTTPStatus.NOT_FOUND, "only the Fleet API is here: POST to /v1/fleet/...")
            read = partial(read_body, method, receive)
            stated = int(size) if size.isascii() and size.isdigit() else 0
            async with relay.call(method, read, headers, stated) as content:
                await put(send, HTTPStatus.OK, flower.PROTOBUF, content)
        except Refusal as refusal:
            said = refusal.said if refusal.said.startswith("{") else json.dumps({"detail": refusal.said})
            await put(send, refusal.status, "application/json", said.encode())

    return answer


async def put(send: Send, status: int, kind: str, content: bytes) -> None:
    """Send an answer, and return when the network has taken it."""
    fields = [(b"content-type", kind.encode()), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": int(status), "headers": fields})
    await send({"type": "http.response.body", "body": content, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def read_body(method: str, receive: Receive) -> bytes:
    """The body of an HTTP request, as long as it may be one of this method."""
    body, more = bytearray(), True
    while more:
        part = await receive()
        if part["type"] == "http.disconnect":
            raise Refusal(HTTPStatus.BAD_REQUEST, "the connection ended.")
        body += part.get("body", b"")
        require_size(method, len(body))
        more = part.get("more_body", False)
    return bytes(body)
