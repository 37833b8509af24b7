"""Between the face and a run's process no message is lost, whatever breaks or hangs up, and no call ends either."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import asynccontextmanager

import pytest
from flwr.app import Message, RecordDict
from flwr.proto.message_pb2 import PullObjectResponse

from fedpeft.deploy import settings
from fedpeft.deploy.coordinator import post, relay
from fedpeft.flower import empty_run, identify
from support.relayed import NODE, call, flower, headers, named, of_run, pulled, rig

__all__ = ["flower", "rig"]  # fixtures
RUN = 5


@pytest.fixture
def box(rig, monkeypatch):
    """A run's messages."""
    monkeypatch.setattr(relay, "LOOK_S", 1e6)  # nobody looks: who waits has to be told
    monkeypatch.setattr(relay, "WAIT_S", 20.0)
    monkeypatch.setattr(post, "AGAIN_S", 0.01)
    identify(RUN, 1, 0)
    return post.Post(empty_run(RUN), list, rig[1])


def send(box):
    (name,) = box.push_messages([Message(RecordDict(), NODE, "train")])
    return name


@asynccontextmanager
async def opened(passing):
    """A face whose run is connected; at the end it is gone, as if it was killed."""
    await passing.counter.open()
    while RUN not in passing.counter.runs:
        await asyncio.sleep(0.01)
    yield passing
    (passing.counter.folder / post.PLACE).write_text("1")  # nobody listens
    passing.counter.runs[RUN].writer.close()
    while passing.counter.runs:
        await asyncio.sleep(0.01)


def test_what_a_face_had_when_it_was_killed_is_handed_out_by_the_next_one(rig, flower, box):
    """Between the run, which hands a message out once, and the site, which never got it."""
    passing, folder, place = rig

    def another():
        return relay.Relay(settings.server(folder), False, flower)

    async def pull(through, *received):
        return named(await asyncio.wait_for(call(through, "PullMessages", pulled(*received), headers(place)), 30))

    async def play():
        clerk = post.Clerk(folder, box)
        first, second = send(box), None
        async with opened(passing):
            assert await pull(passing) == first
        async with opened(another()) as next_one:
            assert await pull(next_one) == first
            await call(next_one, "PullObject", of_run("PullObject", object_id=first), headers(place))
        async with opened(another()) as next_one:  # the site has shown that it has it
            second = send(box)
            assert await pull(next_one) == second
        async with opened(another()) as next_one:
            third = send(box)
            assert await pull(next_one, second) == third  # as this pull shows
        assert not box.boxes[NODE]
        clerk.close()

    asyncio.run(play())


def test_a_site_that_hangs_up_again_and_again_gets_every_message_once(rig, box):
    passing, folder, place = rig

    async def play():
        clerk = post.Clerk(folder, box)
        sent, got = [], []
        async with opened(passing):
            for number in range(40):
                waiting = asyncio.create_task(call(passing, "PullMessages", pulled(*got[-1:]), headers(place)))
                await asyncio.sleep(0.001 * (number % 7))
                if number % 2:
                    sent.append(send(box))
                await asyncio.sleep(0.001 * (number % 3))
                waiting.cancel()
                if sent != got:
                    answer = call(passing, "PullMessages", pulled(*got[-1:]), headers(place))
                    got.append(named(await asyncio.wait_for(answer, 30)))
        assert len(sent) == 20 and got == sent
        clerk.close()

    asyncio.run(play())


def test_numbers_of_calls_begin_again_after_the_largest_that_fits(rig, box):
    passing, folder, place = rig

    async def play():
        clerk = post.Clerk(folder, box)
        name = send(box)
        async with opened(passing):
            passing.counter.runs[RUN].numbers = itertools.count(2**32 - 4)
            for _ in range(8):
                part = await call(passing, "PullObject", of_run("PullObject", object_id=name), headers(place))
                assert PullObjectResponse.FromString(part).object_available
        clerk.close()

    asyncio.run(play())


def test_a_call_that_a_run_cannot_answer_is_refused_and_the_next_one_is_answered(rig, box, caplog):
    passing, folder, place = rig
    answered = box.PullObject

    def fail(node, asked):
        box.PullObject = answered
        raise KeyError("\x1b[2J")

    async def play():
        clerk = post.Clerk(folder, box)
        async with opened(passing):
            box.PullObject = fail
            with pytest.raises(relay.Refusal, match="cannot answer this call") as refused:
                await call(passing, "PullObject", of_run("PullObject"), headers(place))
            assert refused.value.status == 500
            assert await call(passing, "PullObject", of_run("PullObject"), headers(place)) is not None
        clerk.close()

    asyncio.run(play())
    (said,) = [record.getMessage() for record in caplog.records if record.name == "fedpeft"]
    assert "cannot be answered" in said and said.isprintable()
