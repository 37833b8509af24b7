"""Hands sites' calls to the run that they are of, or to Flower's Fleet API, over whichever transport they came.

A call is refused before anything of it is read if its key is not registered, its signature is false or old, it is too
large, or its site has too many calls open; and then if it is of another node than its key's. Few of a site's calls are
read at a time. Nothing is kept but what is on its way: the message that a site's last pull got, until the site shows
that it has it. A site whose connection broke in between is given it once more; Flower itself hands out a message only
once.
"""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import logging
from asyncio import Semaphore
from base64 import b64decode
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

from fedpeft.deploy import flower
from fedpeft.deploy.coordinator.counter import Counter
from fedpeft.deploy.coordinator.flower import LATEST_S, OLDEST_S, Refusal, is_signed, read_request
from fedpeft.deploy.coordinator.post import METHODS
from fedpeft.deploy.coordinator.server import ENDED, get_status
from fedpeft.deploy.launch import LARGEST_CALL
from fedpeft.deploy.settings import Server

if TYPE_CHECKING:
    from fedpeft.deploy.coordinator.fleet import FleetApi

log = logging.getLogger("fedpeft")
PATHS = {flower.path_of(name): name for name in flower.METHODS}
KEY, STAMP, SIGNATURE = "flwr-public-key", "flwr-timestamp", "flwr-signature"  # over gRPC two of them end in -bin
LARGE = {"PushObject"}  # the others name things
SMALL_CALL = 2**20  # bytes
CALLS_AT_ONCE, READ_AT_ONCE = 32, 2  # of one site; of its calls that may be large, and of the others
READ_S = 300.0  # for one call
WAIT_S = 20.0  # of a pull, when there is no message
LOOK_S = 1.0  # between looks at Flower, for all who wait, for messages of which nobody told us
REPEATS = 3  # of one message
CONFIRM = "ConfirmMessageReceived"
SHOWS = {"GetRun", "GetFab", "PullObject", "PushMessages", "PushObject", CONFIRM}
THREADS = 4  # at work on Flower's state, of which one writes at a time
T = TypeVar("T")


@dataclass
class Line:
    """What is open with one site."""

    calls: int = 0
    pulls: int = 0
    message: bytes = b""  # the last pull's answer, until the site shows that it has it
    name: str = ""
    repeats: int = 0
    node: int = 0  # Flower's number of it
    at_flower: bool = False  # there may be a message of a run that is not ours
    proof: tuple[str, str] = ("", "")  # time and signature that were looked at last, and are good
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    turns: dict[bool, Semaphore] = field(default_factory=lambda: defaultdict(partial(Semaphore, READ_AT_ONCE)))
    wake: asyncio.Event = field(default_factory=asyncio.Event)  # there is a message, or a newer pull

    def settle(self) -> None:
        """The site has the message of its last pull."""
        self.message, self.name, self.repeats = b"", "", 0


class Relay:
    """Between sites and Flower; for one event loop.

    Args:
        insecure: any key will do, as for Flower.
    """

    def __init__(self, server: Server, insecure: bool, fleet: FleetApi) -> None:
        self.server, self.insecure, self.fleet = server, insecure, fleet
        self.pool = ThreadPoolExecutor(THREADS)
        self.lines: dict[bytes, Line] = defaultdict(Line)
        self.nodes: dict[int, Line] = {}
        self.counter = Counter(server.path, self.wake)
        self.known: tuple[int, frozenset[bytes]] = (-1, frozenset())
        self.looks: asyncio.Future[None] | None = None

    @contextlib.asynccontextmanager
    async def call(
        self, method: str, read: Callable[[], Awaitable[bytes]], headers: Mapping[str, str], size: int = 0
    ) -> AsyncIterator[bytes]:
        """The answer to a call, which counts as open until its answer is taken.

        Args:
            read: reads the call's message, of which nothing has been read yet.
            headers: lower-case names; those of Flower go with the call.
            size: bytes of the message, as far as they are told ahead.

        Raises:
            Refusal: by this process or by Flower.
        """
        key = self.admit(headers)
        require_size(method, size)
        line = self.lines[key]
        if line.calls >= CALLS_AT_ONCE:
            said = f"this site has {CALLS_AT_ONCE} calls open; no site may have more at once."
            raise Refusal(HTTPStatus.TOO_MANY_REQUESTS, said)
        line.calls += 1
        try:
            yield await self.read_and_answer(method, read, line, key)
        finally:
            line.calls -= 1

    async def read_and_answer(self, method: str, read: Callable[[], Awaitable[bytes]], line: Line, key: bytes) -> bytes:
        """The answer to a call of which nothing has been read yet, when it is its turn."""
        async with line.turns[method in LARGE]:
            try:
                body = await asyncio.wait_for(read(), READ_S)
            except TimeoutError as error:
                said = f"{method}: not all of it came within {READ_S:g} s."
                raise Refusal(HTTPStatus.REQUEST_TIMEOUT, said) from error
            require_size(method, len(body))
            if method in LARGE:  # its bytes are in memory until then
                return await self.answer(method, line, body, key)
        return await self.answer(method, line, body, key)

    async def answer(self, method: str, line: Line, body: bytes, key: bytes) -> bytes:
        """The answer to a call that was read."""
        if method == "PullMessages":
            return await self.pull(line, body, key)
        if method == "ActivateNode":
            return await self.activate(body, key)
        if method in SHOWS:
            line.settle()
        if method in (*METHODS, CONFIRM):
            return await self.of_a_run(method, line, body, key)
        return await self.work(self.fleet.call, method, body, key)

    def admit(self, headers: Mapping[str, str]) -> bytes:
        """The key of a call's site.

        Raises:
            Refusal: why it has none.
        """
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
            said = "Failed to activate SuperNode: its key is not registered."
            raise Refusal.numbered(HTTPStatus.PRECONDITION_FAILED, flower.UNKNOWN_KEY, said)
        if (stamp, headers[SIGNATURE]) != self.lines[key].proof:
            if not is_signed(key, stamp, signature):
                raise Refusal(HTTPStatus.UNAUTHORIZED, "invalid signature.")
            self.lines[key].proof = stamp, headers[SIGNATURE]
        return key

    def registered(self) -> frozenset[bytes]:
        """Keys of the sites that were added, as Flower keeps them; read anew when their folder has changed."""
        changed = (self.server.path / "sites").stat().st_mtime_ns
        if changed != self.known[0]:
            self.known = changed, frozenset(self.server.site_keys().values())
        return self.known[1]

    async def work(self, act: Callable[..., T], *given: Any) -> T:
        """What `act` returns, in another thread: Flower's state is on a disk."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, act, *given)

    async def activate(self, body: bytes, key: bytes) -> bytes:
        """Let a site in. One that was killed counts as connected for a minute, and Flower takes in none that is: so it
        leaves first.
        """
        try:
            return await self.work(self.fleet.call, "ActivateNode", body, key)
        except Refusal as refusal:
            node = await self.work(self.fleet.online, key) if str(flower.UNKNOWN_KEY) in refusal.said else None
            if node is None:
                raise
            leave = flower.request("DeactivateNode", None, node_id=node).SerializeToString()
            await self.work(self.fleet.call, "DeactivateNode", leave, key)
            return await self.work(self.fleet.call, "ActivateNode", body, key)

    async def of_a_run(self, method: str, line: Line, body: bytes, key: bytes) -> bytes:
        """The answer to a call that names its run: by the process that works on it, else by Flower."""
        run, node = named_in(method, body)
        if run in self.counter.runs:
            await self.require_own(line, node, key)
            if method == CONFIRM:  # nothing is to be done: an answer is there when all of it is
                return b""
            return await self.counter.call(run, method, line.node, body)
        if (folder := await self.work(self.server.run_with, run)) is not None:
            if get_status(folder)["state"] in ENDED:
                raise Refusal.numbered(HTTPStatus.FORBIDDEN, flower.RUN_ENDED, "the run has ended.")
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "the run is being started.")
        return await self.work(self.fleet.call, method, body, key)

    async def require_own(self, line: Line, node: int, key: bytes) -> None:
        """Refuse a call of another node than the key's."""
        if not self.insecure and node != line.node and node != await self.work(self.fleet.node_of, key):
            raise Refusal(HTTPStatus.UNAUTHORIZED, "invalid node ID.")
        line.node, self.nodes[node] = node, line

    async def pull(self, line: Line, body: bytes, key: bytes) -> bytes:
        """The answer to a pull, which waits for a message; an older one of the same site ends without."""
        asked = read_request("PullMessages", body)
        await self.require_own(line, asked.node.node_id, key)
        line.pulls += 1
        mine, received = line.pulls, set(asked.message_ids)
        line.wake.set()
        if self.looks is None or self.looks.done():
            self.looks = asyncio.create_task(self.look())
        clock = asyncio.get_running_loop().time
        until = clock() + WAIT_S
        while mine == line.pulls:
            line.wake = asyncio.Event()  # before looking: what comes while this looks wakes it
            # Shielded: a site that hangs up meanwhile must not take with it what was just handed out.
            answer = await asyncio.shield(asyncio.create_task(self.take(line, received, body, key)))
            left_s = until - clock()
            if answer or left_s <= 0:
                return answer
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(line.wake.wait(), left_s)
        return b""

    async def look(self) -> None:
        """Look at Flower for messages, now and then, and wake whom they are to."""
        while True:
            for node in await self.work(self.fleet.nodes_with_messages):
                if (line := self.nodes.get(node)) is not None:
                    line.at_flower = True
                    line.wake.set()
            await asyncio.sleep(LOOK_S)

    async def take(self, line: Line, received: set[str], body: bytes, key: bytes) -> bytes:
        """A site's message: the one that its last pull got, if that was lost, or the next; empty if none."""
        async with line.lock:
            if line.message and line.name not in received and line.repeats < REPEATS:
                line.repeats += 1
                return line.message
            if line.message and line.name not in received:
                log.warning("a message was handed out %d times, and its site does not show it.", 1 + REPEATS)
            line.settle()
            answer = await self.counter.pull(line.node, body)
            if not answer and line.at_flower:
                line.at_flower = False
                answer = await self.work(self.fleet.call, "PullMessages", body, key)
            messages = flower.PullMessagesResponse.FromString(answer).messages_list
            if not messages:
                return b""
            line.message, line.name = answer, messages[0].metadata.message_id
            return answer

    def wake(self, node: int) -> None:
        """Have the pull of a site look at once."""
        if (line := self.nodes.get(node)) is not None:
            line.wake.set()


def require_size(method: str, size: int) -> None:
    """Refuse a call of more bytes than one of this method may have."""
    largest = LARGEST_CALL if method in LARGE else SMALL_CALL
    if size > largest:
        raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{method}: {size} bytes; at most {largest}.")


def named_in(method: str, body: bytes) -> tuple[int, int]:
    """The run and the node that a call is of. What is read for that, which may be many times the bytes, goes at once.

    Raises:
        Refusal: it is no such call.
    """
    asked = read_request(method, body)
    try:
        run = asked.messages_list[0].metadata.run_id if method == "PushMessages" else asked.run_id
    except IndexError as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"no request of {method}.") from error
    return int(run), int(asked.node.node_id)
