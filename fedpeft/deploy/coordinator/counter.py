"""Where runs at work meet the calls of their sites: the face's end of the connections that `post.Clerk` makes."""

from __future__ import annotations

import asyncio
import hmac
import itertools
from collections import defaultdict
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

from fedpeft.deploy.coordinator.flower import Refusal
from fedpeft.deploy.coordinator.post import BELL, FRAME, METHODS, PLACE, hello
from fedpeft.files import write_bytes

HELLO = len(hello(b"", 0))
GONE = "the run is being started again."


class Run:
    """One connection, and the calls that wait for an answer over it, by numbers that begin again after 2^32."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer, self.numbers = writer, itertools.count()
        self.waiting: dict[int, asyncio.Future[bytes]] = {}


class Counter:
    """The runs that are connected.

    Args:
        wake: told of a node that has a message.
    """

    def __init__(self, folder: Path, wake: Callable[[int], None]) -> None:
        self.folder, self.wake = folder, wake
        self.runs: dict[int, Run] = {}
        self.bells: dict[int, set[int]] = defaultdict(set)  # runs that may have a message, by node

    async def open(self) -> None:
        """Listen on loopback, and write down where."""
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        write_bytes(self.folder / PLACE, str(server.sockets[0].getsockname()[1]).encode())

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection, as long as it lasts."""
        number = 0
        try:
            said = await reader.readexactly(HELLO)
            number = int.from_bytes(said[:8], "big")
            if not hmac.compare_digest(said, hello((self.folder / "secret").read_bytes(), number)):
                return
            run = self.runs[number] = Run(writer)
            await self.read(reader, number, run)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            if number in self.runs and self.runs[number].writer is writer:
                for future in self.runs.pop(number).waiting.values():
                    if not future.done():
                        future.set_exception(Refusal(HTTPStatus.SERVICE_UNAVAILABLE, GONE))
                for runs in self.bells.values():
                    runs.discard(number)
            writer.close()

    async def read(self, reader: asyncio.StreamReader, number: int, run: Run) -> None:
        """Hand on what a run says."""
        while True:
            size, call, status, _ = FRAME.unpack(await reader.readexactly(FRAME.size))
            body = await reader.readexactly(size)
            if call == BELL:
                self.bells[status].add(number)
                self.wake(status)
            elif (future := run.waiting.pop(call, None)) is not None and not future.done():
                if status == HTTPStatus.OK:
                    future.set_result(body)
                else:
                    future.set_exception(Refusal(status, body.decode()))

    async def pull(self, node: int, body: bytes) -> bytes:
        """The message that a run has for a node; empty if none has."""
        bells = self.bells[node]
        while bells:
            number = bells.pop()  # before it is asked: what it says meanwhile counts
            if answer := await self.call(number, "PullMessages", node, body):
                bells.add(number)
                return answer
        return b""

    async def call(self, number: int, method: str, node: int, body: bytes) -> bytes:
        """A run's answer to the call of a node.

        Raises:
            Refusal: the run's, or it has ended meanwhile.
        """
        run = self.runs.get(number)
        if run is None:
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, GONE)
        call = BELL + 1 + next(run.numbers) % (2**32 - 1)
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        run.waiting[call] = future
        run.writer.write(FRAME.pack(len(body), call, node, METHODS.index(method)) + body)
        try:
            await run.writer.drain()
            return await future
        except ConnectionError as error:
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, GONE) from error
        finally:
            run.waiting.pop(call, None)
