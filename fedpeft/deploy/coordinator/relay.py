"""Hands sites' calls to Flower's Fleet API on loopback, over whichever transport they came.

A call is refused before Flower sees it if its key is not registered, its signature is false or old, it is too large, or
its site has too many calls open. What is passed on is the call's bytes with its own signed identity, which Flower
checks again. Nothing is kept but what is on its way: the message that a site's last pull got, until the site shows that
it has it. A site whose connection broke in between is given it once more; Flower itself hands out a message only once.
"""

from __future__ import annotations

import asyncio
import binascii
import json
import logging
import ssl
from base64 import b64decode
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path

import httpx
from google.protobuf.message import DecodeError

from fedpeft.deploy.coordinator.flower import (
    FLEET_METHODS,
    LATEST_S,
    OLDEST_S,
    PROTOBUF,
    UNKNOWN_KEY,
    DeactivateNodeRequest,
    ListNodesResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    is_signed,
)
from fedpeft.deploy.flower import path_of
from fedpeft.deploy.launch import LARGEST_CALL
from fedpeft.deploy.settings import Server
from fedpeft.foreign import shown

log = logging.getLogger("fedpeft")
PATHS = {path_of(name): name for name in FLEET_METHODS}
PATH_OF = {**{name: path for path, name in PATHS.items()}, "ListNodes": "/v1/control/list-nodes"}  # of Flower's
KEY, STAMP, SIGNATURE = "flwr-public-key", "flwr-timestamp", "flwr-signature"  # over gRPC two of them end in -bin
LARGE = {"PushMessages", "PushObject"}  # the others name things
SMALL_CALL = 2**20  # bytes
CALLS_AT_ONCE = 32  # of one site
WAIT_S = 20.0  # of a pull, when there is no message
LOOK_S = 1.0  # between looks at Flower for messages of which nobody told us; longer when many sites wait
LOOKS_PER_S = 50
PUSHED = "pushed"  # a file in the coordinator's folder: a run's process touches it when it has pushed messages
PUSHED_S = 0.02
REPEATS = 3  # of one message
SHOWS = {"GetRun", "GetFab", "PullObject", "PushMessages", "PushObject", "ConfirmMessageReceived"}
FLOWER_S = 60.0


class Refusal(Exception):
    """A call that is not answered: the HTTP status, and what its caller is told."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"{status}: {said}")
        self.status, self.said = status, said


@dataclass
class Line:
    """What is open with one site."""

    calls: int = 0
    pulls: int = 0
    message: bytes = b""  # the last pull's answer, until the site shows that it has it
    name: str = ""
    repeats: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    newer: asyncio.Event = field(default_factory=asyncio.Event)

    def settle(self) -> None:
        """The site has the message of its last pull."""
        self.message, self.name, self.repeats = b"", "", 0


class Relay:
    """Between sites and Flower; for one event loop.

    Args:
        insecure: any key will do, as for Flower.
    """

    def __init__(self, server: Server, insecure: bool, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.server, self.insecure = server, insecure
        trusted = False if insecure else ssl.create_default_context(cafile=str(server.path / "ca.crt"))
        self.client = httpx.AsyncClient(
            base_url=f"{'http' if insecure else 'https'}://{server.control}",
            verify=trusted,
            timeout=FLOWER_S,
            limits=httpx.Limits(max_connections=64),
            transport=transport,
            trust_env=False,  # loopback is reached directly
        )
        self.lines: dict[bytes, Line] = defaultdict(Line)
        self.waiting = 0
        self.pushed = asyncio.Event()
        self.known: tuple[int, frozenset[bytes]] = (-1, frozenset())

    async def call(self, method: str, body: bytes, headers: Mapping[str, str]) -> bytes:
        """The answer to a call.

        Args:
            headers: lower-case names; those of Flower go with the call.

        Raises:
            Refusal: by this process or by Flower.
        """
        line = self.lines[self.admit(method, len(body), headers)]
        if line.calls >= CALLS_AT_ONCE:
            raise Refusal(HTTPStatus.TOO_MANY_REQUESTS, f"this site has {CALLS_AT_ONCE} calls open.")
        line.calls += 1
        try:
            if method == "PullMessages":
                return await self.pull(line, body, headers)
            if method == "ActivateNode":
                return await self.activate(body, headers)
            if method in SHOWS:
                line.settle()
            return await self.post(method, body, headers)
        finally:
            line.calls -= 1

    def admit(self, method: str, size: int, headers: Mapping[str, str]) -> bytes:
        """The key of a call's site; refuse it by its size in bytes or by its identity.

        Raises:
            Refusal: why.
        """
        largest = LARGEST_CALL if method in LARGE else SMALL_CALL
        if size > largest:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{method}: {size} bytes; at most {largest}.")
        if self.insecure:
            return headers.get(KEY, "").encode()
        try:
            key, signature = (b64decode(headers[name], validate=True) for name in (KEY, SIGNATURE))
            stamp = headers[STAMP]
            age_s = (datetime.now(UTC) - datetime.fromisoformat(stamp)).total_seconds()
        except (KeyError, ValueError, TypeError, binascii.Error) as error:
            raise Refusal(HTTPStatus.UNAUTHORIZED, "no signed identity (key, timestamp, signature).") from error
        # Ahead of the key: a site that nobody has added yet can look at its clock too.
        if not -LATEST_S < age_s < OLDEST_S:
            raise Refusal(
                HTTPStatus.UNAUTHORIZED,
                f"the timestamp of the signature is {age_s:.0f} s old by the coordinator's clock; from "
                f"{-LATEST_S:g} to {OLDEST_S:g} s are taken.",
            )
        if key not in self.registered():
            said = {"code": UNKNOWN_KEY, "public_message": "Failed to activate SuperNode: its key is not registered."}
            raise Refusal(HTTPStatus.PRECONDITION_FAILED, json.dumps(said))
        if not is_signed(key, stamp, signature):
            raise Refusal(HTTPStatus.UNAUTHORIZED, "invalid signature.")
        return key

    def registered(self) -> frozenset[bytes]:
        """Keys of the sites that were added, as Flower keeps them; read anew when their folder has changed."""
        changed = (self.server.path / "sites").stat().st_mtime_ns
        if changed != self.known[0]:
            self.known = changed, frozenset(self.server.site_keys().values())
        return self.known[1]

    async def post(self, method: str, body: bytes, headers: Mapping[str, str]) -> bytes:
        """Flower's answer to a call."""
        kept = {name: value for name, value in headers.items() if name.startswith("flwr-")}
        try:
            answer = await self.client.post(
                PATH_OF[method], content=body, headers={**kept, "content-type": PROTOBUF, "accept": PROTOBUF}
            )
        except httpx.HTTPError as error:
            log.debug("%s: %r", method, error)
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "the coordinator's SuperLink does not answer.") from error
        if answer.status_code != HTTPStatus.OK:
            raise Refusal(answer.status_code, shown(answer.text))
        return answer.content

    async def activate(self, body: bytes, headers: Mapping[str, str]) -> bytes:
        """Let a site in. One that was killed counts as connected for a minute, and Flower takes in none that is: so it
        leaves first, by its own signature.
        """
        try:
            return await self.post("ActivateNode", body, headers)
        except Refusal as refusal:
            node = await self.node_of(b64decode(headers[KEY])) if str(UNKNOWN_KEY) in refusal.said else None
            if node is None:
                raise
            await self.post("DeactivateNode", DeactivateNodeRequest(node_id=node).SerializeToString(), headers)
            return await self.post("ActivateNode", body, headers)

    async def node_of(self, key: bytes) -> int | None:
        """Flower's number of the site with this key; None if it has none."""
        answer = await self.post("ListNodes", b"", {})
        nodes = ListNodesResponse.FromString(answer).nodes_info
        return next((node.node_id for node in nodes if node.public_key == key and node.status == "online"), None)

    async def pull(self, line: Line, body: bytes, headers: Mapping[str, str]) -> bytes:
        """The answer to a pull, which waits for a message; an older one of the same site ends without."""
        try:
            received = set(PullMessagesRequest.FromString(body).message_ids)
        except DecodeError as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, "no request of PullMessages.") from error
        line.pulls += 1
        mine = line.pulls
        line.newer.set()
        line.newer = newer = asyncio.Event()
        clock = asyncio.get_running_loop().time
        until = clock() + WAIT_S
        while mine == line.pulls:
            pushed = self.pushed
            # Shielded: a site that hangs up meanwhile must not take with it what Flower has just handed out.
            answer = await asyncio.shield(asyncio.create_task(self.take(line, received, body, headers)))
            left_s = until - clock()
            if answer or left_s <= 0:
                return answer
            await self.rest(pushed, newer, left_s)
        return b""

    async def take(self, line: Line, received: set[str], body: bytes, headers: Mapping[str, str]) -> bytes:
        """A site's message: the one that its last pull got, if that was lost, or Flower's next; empty if none."""
        async with line.lock:
            if line.message and line.name not in received and line.repeats < REPEATS:
                line.repeats += 1
                return line.message
            if line.message and line.name not in received:
                log.warning("a message was handed out %d times, and its site does not show it.", 1 + REPEATS)
            line.settle()
            answer = await self.post("PullMessages", body, headers)
            messages = PullMessagesResponse.FromString(answer).messages_list
            if not messages:
                return b""
            line.message, line.name = answer, messages[0].metadata.message_id
            return answer

    async def rest(self, pushed: asyncio.Event, newer: asyncio.Event, longest_s: float) -> None:
        """Wait until messages were pushed, the site has pulled anew, or it is time to look at Flower."""
        self.waiting += 1
        look_s = max(LOOK_S, self.waiting / LOOKS_PER_S)
        events = [asyncio.ensure_future(event.wait()) for event in (pushed, newer)]
        try:
            await asyncio.wait(events, timeout=min(look_s, longest_s), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for event in events:
                event.cancel()
            self.waiting -= 1

    async def watch(self) -> None:
        """Wake waiting pulls whenever a run's process says that it has pushed messages."""
        seen = moment(self.server.path / PUSHED)
        while True:
            await asyncio.sleep(PUSHED_S)
            if (now := moment(self.server.path / PUSHED)) != seen:
                seen = now
                self.pushed.set()
                self.pushed = asyncio.Event()


def moment(path: Path) -> int:
    """When a file was last touched, in ns; 0 if there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def tell_pushed(folder: Path) -> None:
    """Say that messages are there to be pulled."""
    (folder / PUSHED).touch()
