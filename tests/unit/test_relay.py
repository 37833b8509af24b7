"""What sites call reaches Flower only if it is theirs and of a size; pulls wait, and no message is lost on its way."""

from __future__ import annotations

import asyncio
import contextlib
import json
from base64 import b64decode, b64encode
from datetime import UTC, datetime, timedelta

import grpc
import grpc.aio
import pytest
from flwr.app import Message, RecordDict
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.proto.message_pb2 import PullObjectResponse

from fedpeft.deploy import keys, settings
from fedpeft.deploy.coordinator import face, post, relay, server
from fedpeft.deploy.flower import RUN_ENDED
from fedpeft.flower import empty_run
from support.deployed import free_ports
from support.relayed import NODE, call, flower, headers, named, of_run, pulled, rig

__all__ = ["flower", "rig"]  # fixtures


def test_a_call_goes_on_as_it_is_with_the_key_that_it_was_signed_by(rig, flower):
    passing, _, place = rig
    assert asyncio.run(call(passing, "GetFab", b"body", headers(place))) == b"answer"
    assert flower.asked == [("GetFab", b"body", keys.pem((place / "site.pub").read_text()))]


def test_a_call_of_another_s_node_is_refused(rig, flower):
    passing, _, place = rig
    with pytest.raises(relay.Refusal, match="node") as refused:
        asyncio.run(call(passing, "PullMessages", pulled().replace(bytes([NODE]), b"\x08"), headers(place)))
    assert refused.value.status == 401 and not flower.asked


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({}, 401, "invalid signature"),
        ({"flwr-signature": "?"}, 401, "no signed identity"),
        ({"flwr-timestamp": "yesterday"}, 401, "no signed identity"),
        ({"flwr-timestamp": "2026-01-01T00:00:00"}, 401, "no signed identity"),  # of no time zone
        ({"flwr-public-key": b64encode(b"stranger").decode()}, 412, "not registered"),
    ],
)
def test_an_identity_that_is_not_a_site_s_never_reaches_flower(rig, flower, change, status, words):
    passing, _, place = rig
    later = (datetime.now(UTC) + timedelta(seconds=1)).isoformat()
    with pytest.raises(relay.Refusal, match=words) as refused:
        asyncio.run(call(passing, "GetFab", b"", {**headers(place), "flwr-timestamp": later, **change}))
    assert refused.value.status == status and not flower.asked


def test_a_site_that_was_not_added_yet_learns_of_its_clock_first(rig, flower):
    passing, _, place = rig
    old = headers(place, -400, **{"flwr-public-key": b64encode(b"stranger").decode()})
    with pytest.raises(relay.Refusal, match="timestamp") as refused:
        asyncio.run(call(passing, "RegisterNode", b"", old))
    assert refused.value.status == 401 and not flower.asked


@pytest.mark.parametrize(("shift_s", "taken"), [(-303, True), (-307, False), (3, True), (7, False)])
def test_a_clock_may_be_as_far_off_as_flower_allows(rig, shift_s, taken):
    passing, _, place = rig
    if taken:
        assert asyncio.run(call(passing, "GetFab", b"", headers(place, shift_s)))
    else:
        with pytest.raises(relay.Refusal, match="timestamp"):
            asyncio.run(call(passing, "GetFab", b"", headers(place, shift_s)))


def test_a_site_that_is_added_is_let_in_at_once_and_its_old_key_is_not(rig, tmp_path):
    passing, folder, place = rig
    other = tmp_path / "other"
    line = keys.site_keys(other)
    with pytest.raises(relay.Refusal) as refused:
        asyncio.run(call(passing, "ActivateNode", b"", headers(other)))
    assert json.loads(refused.value.said)["code"] == 2004  # Flower's word for it, which its own nodes know
    server.add_site(folder, "north", line)
    assert asyncio.run(call(passing, "ActivateNode", b"", headers(other))) == b"answer"
    with pytest.raises(relay.Refusal, match="not registered"):
        asyncio.run(call(passing, "ActivateNode", b"", headers(place)))


def test_a_site_that_was_killed_is_let_in_again_without_a_wait(rig, flower):
    passing, _, place = rig
    flower.there = True
    assert asyncio.run(call(passing, "ActivateNode", b"", headers(place))) == b"answer"
    left = [body for method, body, _ in flower.asked if method == "DeactivateNode"]
    assert [DeactivateNodeRequest.FromString(body).node_id for body in left] == [NODE]
    flower.refusal = relay.Refusal(412, '{"code": 2004}')
    with pytest.raises(relay.Refusal, match="2004"):
        asyncio.run(call(passing, "ActivateNode", b"", headers(place)))


def test_calls_that_are_too_large_or_too_many_are_refused(rig, flower):
    passing, _, place = rig
    with pytest.raises(relay.Refusal, match="at most 1048576") as refused:
        asyncio.run(call(passing, "GetFab", bytes(2**20 + 1), headers(place)))
    assert refused.value.status == 413
    large = of_run("PushObject", object_content=bytes(2**20 + 1))
    assert asyncio.run(call(passing, "PushObject", large, headers(place))) == b"answer"
    with pytest.raises(relay.Refusal, match="at most 1048576"):  # each of two bytes is 50 when read
        asyncio.run(call(passing, "PushMessages", bytes(2**20 + 1), headers(place)))

    async def crowd():
        flower.delay_s = 0.2
        calls = [call(passing, "GetFab", b"", headers(place)) for _ in range(relay.CALLS_AT_ONCE + 3)]
        return await asyncio.gather(*calls, return_exceptions=True)

    refused = [answer for answer in asyncio.run(crowd()) if isinstance(answer, relay.Refusal)]
    assert len(refused) == 3 and {refusal.status for refusal in refused} == {429}
    assert all("32 calls open" in str(refusal) for refusal in refused)
    assert asyncio.run(call(passing, "GetFab", b"", headers(place)))  # they are counted off again


@pytest.mark.parametrize("method", ["PushObject", "GetFab"])
def test_few_of_a_site_s_calls_are_read_at_a_time_and_another_s_do_not_wait(rig, flower, monkeypatch, method):
    """What is not read stays with its sender. A site that brings objects slowly can still say that it is there."""
    passing, folder, place = rig
    server.add_site(folder, "south", keys.site_keys(folder / "south"))
    reading = []

    async def never():
        reading.append(1)
        await asyncio.sleep(60)

    def crowd():
        calls = [call(passing, method, never, headers(place)) for _ in range(relay.CALLS_AT_ONCE - 1)]
        return asyncio.gather(*calls, return_exceptions=True)

    async def play():
        slow = crowd()
        await asyncio.sleep(0.1)
        others = [call(passing, "PushObject", of_run("PushObject"), headers(folder / "south"))]
        if method == "PushObject":
            others.append(call(passing, "GetFab", b"", headers(place)))
        assert await asyncio.wait_for(asyncio.gather(*others), 30) == [b"answer"] * len(others)
        assert len(reading) == relay.READ_AT_ONCE
        slow.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await slow
        monkeypatch.setattr(relay, "READ_S", 0.01)
        assert {refusal.status for refusal in await crowd()} == {408}

    asyncio.run(play())


def test_flower_s_refusal_is_told_as_it_is(rig, flower):
    passing, _, place = rig
    flower.refusal = relay.Refusal(403, '{"code": 2007, "public_message": "no"}')
    with pytest.raises(relay.Refusal) as refused:
        asyncio.run(call(passing, "GetFab", b"", headers(place)))
    assert (refused.value.status, json.loads(refused.value.said)["code"]) == (403, 2007)


def test_a_call_of_a_run_that_is_being_started_again_waits_and_one_of_another_goes_to_flower(rig, flower):
    """Flower knows nothing of runs of ours, and nobody would ever see what it took of one whose process is away."""
    passing, folder, place = rig
    run = folder / "runs" / "run-1"
    run.mkdir()
    (run / "resolved.yaml").touch()
    ours = of_run("PullObject", settings.number_of("run-1"))
    with pytest.raises(relay.Refusal, match="being started") as refused:
        asyncio.run(call(passing, "PullObject", ours, headers(place)))
    assert refused.value.status == 503 and not flower.asked
    assert asyncio.run(call(passing, "PullObject", of_run("PullObject", 6), headers(place))) == b"answer"
    server.put_status(run, state="stopped")
    with pytest.raises(relay.Refusal, match="has ended") as refused:
        asyncio.run(call(passing, "PullObject", ours, headers(place)))
    assert json.loads(refused.value.said)["code"] == RUN_ENDED and len(flower.asked) == 1


def test_a_pull_waits_and_ends_as_soon_as_a_run_has_a_message(rig, flower, monkeypatch):
    passing, folder, place = rig
    monkeypatch.setattr(relay, "LOOK_S", 1e6)  # nobody looks: who waits has to be told
    monkeypatch.setattr(relay, "WAIT_S", 1e6)
    box = post.Post(empty_run(5), list, folder)

    async def play():
        await passing.counter.open()
        clerk = post.Clerk(folder, box)
        waiting = asyncio.create_task(call(passing, "PullMessages", pulled(), headers(place)))
        while not passing.counter.runs:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.15)
        assert not waiting.done() and flower.looks == 1
        (name,) = box.push_messages([Message(RecordDict(), NODE, "train")])
        assert named(await asyncio.wait_for(waiting, 60)) == name
        part = await call(passing, "PullObject", of_run("PullObject", object_id=name), headers(place))
        with pytest.raises(relay.Refusal, match="node"):
            await call(passing, "PullObject", of_run("PullObject", node=8, object_id=name), headers(place))
        clerk.close()
        while passing.counter.runs:
            await asyncio.sleep(0.01)
        return PullObjectResponse.FromString(part)

    answer = asyncio.run(play())
    assert answer.object_available and b"Message" in answer.object_content
    assert flower.looks == 1 and not flower.asked


def test_a_process_without_the_secret_is_no_run(rig):
    passing, folder, _ = rig

    async def play():
        await passing.counter.open()
        reader, writer = await asyncio.open_connection("127.0.0.1", int((folder / post.PLACE).read_text()))
        writer.write(post.hello(b"guessed", 5))
        assert await reader.read() == b"" and not passing.counter.runs

    asyncio.run(play())


def test_a_message_that_nobody_told_of_is_looked_for_and_a_pull_ends_without_one(rig, flower, monkeypatch):
    passing, _, place = rig
    monkeypatch.setattr(relay, "LOOK_S", 0.05)
    monkeypatch.setattr(relay, "WAIT_S", 0.3)
    assert asyncio.run(call(passing, "PullMessages", pulled(), headers(place))) == b""
    assert flower.looks >= 3 and not flower.asked

    async def play():
        monkeypatch.setattr(relay, "WAIT_S", 20.0)
        waiting = asyncio.create_task(call(passing, "PullMessages", pulled(), headers(place)))
        await asyncio.sleep(0.1)
        flower.messages.append("m1")
        return named(await waiting)

    assert asyncio.run(play()) == "m1" and len(flower.asked) == 1


def test_one_look_at_flower_is_for_all_who_wait(rig, flower, monkeypatch):
    passing, folder, place = rig
    monkeypatch.setattr(relay, "LOOK_S", 0.1)
    monkeypatch.setattr(relay, "WAIT_S", 20.0)
    nodes = {}
    for number in range(12):
        (place / f"site-{number}").mkdir()
        line = keys.site_keys(place / f"site-{number}")
        server.add_site(folder, f"site-{number}", line)
        nodes[keys.pem(line)] = 100 + number
    flower.node_of = nodes.get

    async def play():
        calls = [
            asyncio.create_task(
                call(passing, "PullMessages", pulled(node=100 + number), headers(place / f"site-{number}"))
            )
            for number in range(12)
        ]
        while len(passing.nodes) < 12:
            await asyncio.sleep(0.01)
        before = flower.looks
        while flower.looks < before + 3:
            await asyncio.sleep(0.01)
        assert not flower.asked
        flower.messages, flower.nodes_with_messages = ["m1"], lambda: {105} if flower.messages else set()
        assert named(await calls[5]) == "m1" and [method for method, _, _ in flower.asked] == ["PullMessages"]
        assert not any(call.done() for call in calls[:5] + calls[6:])

    asyncio.run(play())


def test_a_message_is_given_again_until_the_site_shows_that_it_has_it(rig, flower, monkeypatch):
    passing, _, place = rig
    flower.messages += ["m1", "m2", "m3", "m4"]

    def pull(*received):
        return named(asyncio.run(call(passing, "PullMessages", pulled(*received), headers(place))))

    assert [pull(), pull(), pull("another")] == ["m1"] * 3
    assert pull("m1") == "m2"
    asyncio.run(call(passing, "PullObject", of_run("PullObject"), headers(place)))  # as Flower's own node shows it
    assert pull() == "m3"
    assert [pull() for _ in range(relay.REPEATS + 1)] == ["m3"] * relay.REPEATS + ["m4"]  # not for ever


def test_what_flower_hands_out_while_a_site_hangs_up_is_not_lost(rig, flower):
    """A cancelled call, as grpc.aio makes of a connection that breaks; and one that a newer pull takes the place of."""
    passing, _, place = rig

    async def play():
        flower.messages, flower.delay_s = ["m1"], 0.2
        broken = asyncio.create_task(call(passing, "PullMessages", pulled(), headers(place)))
        await asyncio.sleep(0.1)
        broken.cancel()
        assert named(await call(passing, "PullMessages", pulled(), headers(place))) == "m1"

        flower.delay_s = 0.0
        older = asyncio.create_task(call(passing, "PullMessages", pulled("m1"), headers(place)))
        await asyncio.sleep(0.1)
        flower.messages = ["m2"]
        newer = await call(passing, "PullMessages", pulled("m1"), headers(place))
        assert named(newer) == "m2" and await asyncio.wait_for(older, 1) == b""

    asyncio.run(play())


def over_grpc(passing, folder, act):
    """What `act` gives that is called with a channel to a face."""
    chosen = settings.server(folder)
    (chosen.settings.port,) = free_ports(1)

    async def play():
        opened = face.grpc_server(passing, chosen, insecure=True)
        await opened.start()
        most = [("grpc.max_receive_message_length", -1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{chosen.settings.port}", most) as channel:
            try:
                return await act(channel)
            finally:
                await opened.stop(None)

    return asyncio.run(play())


def signed(fields):
    """An identity as it is over gRPC."""
    return [
        (name, value) if name == "flwr-timestamp" else (f"{name}-bin", b64decode(value))
        for name, value in fields.items()
        if name.startswith("flwr-")
    ]


def test_a_stranger_is_refused_before_a_byte_of_its_message_is_read(rig, flower):
    """Over gRPC, where a message of any size, or one that never comes, would hold up others."""
    passing, folder, place = rig
    stranger = {**headers(place), "flwr-public-key": b64encode(b"stranger").decode()}

    async def act(channel):
        try:
            await channel.stream_unary("/flwr.proto.Fleet/PushObject")(metadata=signed(stranger), timeout=20)
        except grpc.aio.AioRpcError as error:
            return error

    error = over_grpc(passing, folder, act)
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION and "not registered" in error.details()


def test_a_call_over_grpc_is_open_until_its_answer_is_read(rig, flower, monkeypatch):
    """Or a site could have any number of large answers wait for it. One that sends nothing is answered too."""
    passing, folder, place = rig
    monkeypatch.setattr(relay, "CALLS_AT_ONCE", 2)
    monkeypatch.setattr(flower, "call", lambda *_: bytes(2**24))
    fields = signed(headers(place))

    async def act(channel):
        unread = [channel.unary_stream("/flwr.proto.Fleet/GetFab")(b"", metadata=fields) for _ in range(2)]
        for slow in unread:
            await slow.initial_metadata()  # it has begun
        ask = channel.unary_unary("/flwr.proto.Fleet/GetFab")
        with pytest.raises(grpc.aio.AioRpcError, match="2 calls open"):
            await ask(b"", metadata=fields, timeout=20)
        assert len(await unread[0].read()) == 2**24
        assert await unread[0].code() == grpc.StatusCode.OK
        assert len(await ask(b"", metadata=fields, timeout=20)) == 2**24
        nothing = channel.stream_unary("/flwr.proto.Fleet/GetFab")(metadata=fields, timeout=20)
        await nothing.done_writing()
        unread[1].cancel()
        return len(await nothing)

    assert over_grpc(passing, folder, act) == 2**24


def through_door(passing, path, method, body, fields):
    """Status, content type and content of one HTTP request to the door."""
    told = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(event):
        told.append(event)

    pairs = [(name.encode(), value.encode()) for name, value in fields.items()]
    scope = {"type": "http", "path": path, "method": method, "headers": pairs}
    asyncio.run(face.door(passing)(scope, receive, send))
    return told[0]["status"], dict(told[0]["headers"])[b"content-type"], told[1]["body"]


def test_over_http_the_fleet_s_paths_are_open_and_no_others(rig, flower):
    passing, _, place = rig
    signed = headers(place)
    assert through_door(passing, "/v1/fleet/get-fab", "POST", b"x", signed) == (200, b"application/protobuf", b"answer")
    others = ("/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/v1/fleet/../control/list-runs", "/health")
    for path in others:
        assert through_door(passing, path, "POST", b"x", signed)[0] == 404
    assert through_door(passing, "/v1/fleet/get-fab", "GET", b"", signed)[0] == 404
    assert len(flower.asked) == 1
    status, kind, content = through_door(passing, "/v1/fleet/get-fab", "POST", b"x", {})
    assert (status, kind) == (401, b"application/json") and "identity" in json.loads(content)["detail"]
    large = {**signed, "content-length": str(2**40)}
    assert through_door(passing, "/v1/fleet/push-object", "POST", b"x", large)[0] == 413
