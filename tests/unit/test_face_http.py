"""Connections over HTTP by which nobody calls make room for those by which somebody does, and end."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from fedpeft.deploy import settings
from fedpeft.deploy.coordinator import face, relay
from support.deployed import free_ports
from support.relayed import flower, headers, rig

__all__ = ["flower", "rig"]  # fixtures
HEAD = b"POST /v1/fleet/get-fab HTTP/1.1\r\nhost: x\r\n"


@pytest.fixture
def play(rig, monkeypatch):
    """Runs a coroutine function that is given the port of a face with room for six connections."""
    passing, folder, _ = rig
    monkeypatch.setattr(face, "CALLS", 7)
    monkeypatch.setattr(face, "HEAD_S", 0.5)
    chosen = settings.server(folder)
    chosen.settings.listen, chosen.settings.http_port = "127.0.0.1", free_ports(1)[0]

    async def all_of(act):
        serving = face.http_server(passing, chosen, insecure=True)
        task = asyncio.create_task(serving.serve())
        while not serving.started:
            await asyncio.sleep(0.01)
        try:
            await act(chosen.settings.http_port)
        finally:
            serving.should_exit = True
            await task

    return lambda act: asyncio.run(all_of(act))


async def connect(port, sent=HEAD):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    await writer.drain()
    return reader, writer


def call(place, body=b"body", length=None):
    fields = {**headers(place), "content-length": len(body) if length is None else length}
    return HEAD + b"".join(f"{name}: {value}\r\n".encode() for name, value in fields.items()) + b"\r\n" + body


def test_who_calls_finds_room_beside_any_number_of_heads_that_do_not_end(play, rig, monkeypatch):
    monkeypatch.setattr(face, "HEAD_S", 60.0)

    async def act(port):
        slow = await connect(port, call(rig[2], length=5))  # its call has come, and its body not all of it
        await asyncio.sleep(0.1)
        idle = [await connect(port) for _ in range(20)]
        reader, _ = await connect(port, call(rig[2]))
        assert b"200 OK" in await asyncio.wait_for(reader.read(1000), 5)
        slow[1].write(b"!")
        assert b"200 OK" in await asyncio.wait_for(slow[0].read(1000), 5)
        ended = [reader.at_eof() or bool(reader.exception()) for reader, _ in idle]
        assert sum(ended) >= 15 and ended == sorted(ended, reverse=True)  # who has been there longest goes first

    play(act)


def test_a_call_is_open_until_its_answer_is_read(play, rig, monkeypatch):
    """Or a site could have any number of large answers wait for it."""
    monkeypatch.setattr(face, "HEAD_S", 60.0)
    monkeypatch.setattr(relay, "CALLS_AT_ONCE", 2)
    monkeypatch.setattr(rig[0].fleet, "call", lambda *_: bytes(2**24))

    async def act(port):
        unread = [await connect(port, call(rig[2])) for _ in range(2)]
        for reader, _ in unread:
            await reader.readexactly(1000)  # it has begun
        reader, _ = await connect(port, call(rig[2]))
        assert b"2 calls open" in await asyncio.wait_for(reader.readuntil(b"once."), 5)
        await asyncio.wait_for(unread[0][0].readexactly(2**24 - 1000), 20)
        reader, _ = await connect(port, call(rig[2]))
        assert b"200 OK" in await asyncio.wait_for(reader.readexactly(100), 5)

    play(act)


@pytest.mark.parametrize("first", [b"", "a call"])
def test_a_connection_ends_when_no_call_comes_by_it(play, rig, first):
    async def act(port):
        reader, writer = await connect(port, call(rig[2]) if first else HEAD)
        begun = time.monotonic()
        with contextlib.suppress(OSError):
            while not reader.at_eof() and time.monotonic() - begun < 10:
                writer.write(b"x-more: y\r\n" if not first or time.monotonic() - begun < 0.1 else HEAD[:1])
                await asyncio.sleep(0.05)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(1000), 0.05)
        assert 0.4 < time.monotonic() - begun < 5

    play(act)


def test_a_head_is_of_bounded_size(play, monkeypatch):
    """Of a stranger's, who has shown no key yet."""
    monkeypatch.setattr(face, "HEAD_S", 60.0)
    sent = []

    async def act(port):
        _, writer = await connect(port)
        with contextlib.suppress(OSError):
            for number in range(20_000):
                sent.append(f"x-{number}: {'y' * 100}\r\n".encode())
                writer.write(sent[-1])
                await writer.drain()
                await asyncio.sleep(0)

    play(act)
    assert len(b"".join(sent)) < 2**20
