"""A site's calls to its coordinator's Fleet API: the same messages and the same signed identity over gRPC or HTTP.

A call is one method of the API, such as PullMessages, with its protobuf message. What is no answer is a `Failure` with
whatever came instead, and a sentence for the site's log.
"""

from __future__ import annotations

import re
import ssl
import threading
from typing import Any, Protocol

import grpc
import httpx
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedpeft.deploy import flower
from fedpeft.deploy.launch import LARGEST_CALL
from fedpeft.deploy.settings import Site
from fedpeft.foreign import shown

LARGEST, SMALL = {"PullObject": LARGEST_CALL}, 2**20  # bytes of one answer; all but an object only names things
CHANNEL = [  # a half-open connection is found within 30 s, and a coordinator that comes back within two
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.max_receive_message_length", LARGEST_CALL),
    ("grpc.max_send_message_length", LARGEST_CALL),
]
CAUSES = (  # what an answer has in it, in lower case, and what that means
    (
        "resolution|resolving|name or service|no address associated|domain name",
        "there is no such name. Is site.server in site.yaml the name that the coordinator gave you?",
    ),
    (
        "wrong_version|record_layer|record layer|http1|http2|unimplemented|not found|http 405",
        "what listens there is no Fleet API. Is it the coordinator's Fleet port, and site.transport its kind?",
    ),
    (
        "certificate_verify|certificate verify|peer name|hostname|not valid for",
        "its certificate is none that ca.crt vouches for under this name. Get ca.crt anew.",
    ),
    ("connection refused", "nothing listens there. Does the coordinator run, and is that its Fleet port?"),
    ("timestamp", "its clock and this one differ by more than it allows. Set this machine's clock (NTP)."),
    ("unreachable|no route", "this machine has no way there. Look at its network, and at a firewall in between."),
    ("invalid supernode|invalid signature|invalid node", "it does not take this site's key. Was it given a new one?"),
)
LOST = (  # of statuses, those that say nothing of the call itself
    *("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "RESOURCE_EXHAUSTED"),
    *("HTTP 408", "HTTP 429", "HTTP 502", "HTTP 503", "HTTP 504"),
)
UNKNOWN = (
    "it does not know this site's key. Have the coordinator add it: fedpeft server add-site DIR NAME, with site.pub."
)


class Failure(Exception):
    """What came instead of an answer: a status, and what was said with it."""

    def __init__(self, status: str, said: str) -> None:
        super().__init__(f"{status}: {said}")
        self.status, self.said, self.number = status, said, flower.error_number(said)
        self.stranger = status in ("UNAUTHENTICATED", "HTTP 401")
        self.lost = status in LOST or not status.isupper()  # on the way, as far as can be seen

    def cause(self, server: str) -> str:
        """Whom this site called, what that means, and what to do where that is known."""
        text = f"{self.status} {self.said}".lower()
        found = (what for words, what in CAUSES if re.search(words, text))
        meant = UNKNOWN if self.number == flower.UNKNOWN_KEY else next(found, f"no answer ({self.status}).")
        return f"{server}: {meant}"

    def sentence(self, server: str) -> str:
        """The cause, and what was answered."""
        return f"{self.cause(server)} ({self.status}: {shown(self.said, 300)})"


class Link(Protocol):
    """A transport; `key` is the site's private one."""

    key: Any

    def call(self, method: str, request: Any, within_s: float, shift_s: float = 0.0) -> Any:
        """The answer to a call, signed as of `shift_s` from now.

        Raises:
            Failure: there is none, whatever the reason.
        """

    def close(self) -> None:
        """End the connection."""


class GrpcLink:
    """One channel, made anew where a call got no answer in time: its connection may be half open."""

    def __init__(self, server: str, key: Any, ca: bytes | None) -> None:
        self.server, self.key, self.ca = server, key, ca
        self.lock = threading.Lock()
        self.channel = self._open()

    def _open(self) -> grpc.Channel:
        if self.ca is None:
            return grpc.insecure_channel(self.server, CHANNEL)
        return grpc.secure_channel(self.server, grpc.ssl_channel_credentials(self.ca), CHANNEL)

    def call(self, method: str, request: Any, within_s: float, shift_s: float = 0.0) -> Any:
        channel = self.channel
        try:
            ask, who = channel.unary_unary(flower.grpc_path_of(method)), flower.identity(self.key, shift_s)
            return read_answer(method, ask(request.SerializeToString(), metadata=who, timeout=within_s))
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                self._renew_channel(channel)
            raise Failure(error.code().name, str(error.details())) from error
        except ValueError as error:  # another thread has closed the channel meanwhile
            raise Failure("CANCELLED", str(error)) from error

    def _renew_channel(self, stale: grpc.Channel) -> None:
        with self.lock:
            if self.channel is stale:
                self.channel = self._open()
                stale.close()

    def close(self) -> None:
        self.channel.close()


class HttpLink:
    """POST with protobuf bodies, for sites behind a web proxy."""

    def __init__(self, server: str, key: Any, ca: bytes | None) -> None:
        self.key = key
        trusted = ssl.create_default_context(cadata=ca.decode()) if ca else True
        self.client = httpx.Client(base_url=f"http{'s' if ca else ''}://{server}", verify=trusted)

    def call(self, method: str, request: Any, within_s: float, shift_s: float = 0.0) -> Any:
        headers = {"content-type": flower.PROTOBUF, "accept": flower.PROTOBUF, "accept-encoding": "identity"}
        headers |= flower.headers_of(flower.identity(self.key, shift_s))
        try:
            with self.client.stream(
                "POST", flower.path_of(method), content=request.SerializeToString(), headers=headers, timeout=within_s
            ) as answer:
                content = _as_sent(method, answer)
                if answer.status_code != httpx.codes.OK:
                    raise Failure(f"HTTP {answer.status_code}", content.decode("utf-8", "replace"))
                return read_answer(method, content)
        except (httpx.HTTPError, RuntimeError) as error:  # the latter of a client that another thread has closed
            raise Failure(type(error).__name__, str(error)) from error

    def close(self) -> None:
        self.client.close()


def read_answer(method: str, content: bytes) -> Any:
    """The message that an answer is.

    Raises:
        Failure: it is none, or larger than one of this method may be.
    """
    require_size(method, len(content))
    try:
        return flower.answer_type(method).FromString(content)
    except flower.DecodeError as error:
        raise Failure("INTERNAL", f"no protobuf message: {error}") from error


def require_size(method: str, size: int) -> None:
    """Raise Failure for an answer of more bytes than one of this method may have."""
    if size > (largest := LARGEST.get(method, SMALL)):
        raise Failure("OUT_OF_RANGE", f"the answer has more than {largest} bytes.")


def _as_sent(method: str, answer: httpx.Response) -> bytes:
    """The body of an answer, never unpacked: a few bytes could become as many as this machine has."""
    if (packed := answer.headers.get("content-encoding", "identity")) != "identity":
        raise Failure(f"HTTP {answer.status_code}", f"the answer is packed by {packed}, which was not asked for.")
    content = bytearray()
    for part in answer.iter_raw():
        content += part
        require_size(method, len(content))
    return bytes(content)


def connect(site: Site, insecure: bool = False) -> Link:
    """The transport that site.yaml names, with the site's key; nothing is sent yet."""
    ca = None if insecure else (site.path / "ca.crt").read_bytes()
    key = load_ssh_private_key((site.path / "site.key").read_bytes(), None)
    kind = GrpcLink if site.settings.transport == "grpc" else HttpLink
    return kind(site.settings.server, key, ca)
