"""A run's process keeps its messages and answers its sites' calls: each gets its own, once, and answers it once."""

from __future__ import annotations

import hashlib
import json
import random
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedpeft.deploy import flower, parcel
from fedpeft.deploy.coordinator import post
from fedpeft.deploy.coordinator.flower import Refusal
from fedpeft.flower import ErrorCode, empty_run, identify

RUN, NORTH, SOUTH = 5, 7, 8


@pytest.fixture
def box(tmp_path):
    identify(RUN, 1, 0)
    return post.Post(empty_run(RUN), lambda: [SimpleNamespace(node_id=NORTH), SimpleNamespace(node_id=SOUTH)], tmp_path)


def send(box, text="hello", node=NORTH, ttl=60.0):
    identify(RUN, 1, 0)
    content = RecordDict({"config": ConfigRecord({"text": text})})
    (name,) = box.push_messages([Message(content, node, "train", ttl=ttl)])
    return name


def call(box, method, node=NORTH, **fields):
    request = flower.request(method, flower.Node(node_id=node), **fields)
    return flower.answer_type(method).FromString(box.answer(method, node, request.SerializeToString()))


def fetch(box, node=NORTH):
    """The message that a node is given, with its content."""
    pulled = call(box, "PullMessages", node)
    if not pulled.messages_list:
        return None
    names = flower.object_ids(pulled.message_object_trees[0])
    parts = {name: call(box, "PullObject", node, run_id=RUN, object_id=name).object_content for name in names}
    return flower.inflated(pulled, parts)


def answer(message, text="back", node=NORTH):
    """The request that pushes an answer, and its objects."""
    identify(RUN, node, 0)
    request, contents = flower.deflated(Message(RecordDict({"config": ConfigRecord({"text": text})}), reply_to=message))
    names = list(dict.fromkeys(flower.object_ids(request.message_object_trees[0])))
    return request, {name: contents(name) for name in names}


def bring(box, request, objects, node=NORTH, count=None):
    """Push an answer, or its first objects; how each call was answered."""
    trees = [request.message_object_trees[0]]
    taken = call(box, "PushMessages", node, messages_list=request.messages_list, message_object_trees=trees)
    wanted = list(taken.objects_to_push)[:count]
    return [
        call(
            box,
            "PushObject",
            node,
            run_id=RUN,
            object_id=name,
            object_content=objects[name],
            session_id=taken.session_id,
        ).stored
        for name in wanted
    ]


def test_a_node_that_asks_for_an_app_is_waited_for_no_more(box, monkeypatch):
    """Flower's own gets no run, and ignores the message; the run hears that, and who else was asked still answers."""
    monkeypatch.setattr(post, "AWAY_S", 0.0)
    mine, other = send(box), send(box, node=SOUTH)
    assert fetch(box) is not None
    with pytest.raises(Refusal, match="no app") as refused:
        call(box, "GetRun", run_id=RUN)
    assert refused.value.status == 403 and json.loads(refused.value.said)["code"] == flower.NO_RUN
    (reply,) = box.pull_messages([mine, other])
    assert reply.metadata.reply_to_message_id == mine and reply.error.reason == post.FOREIGN
    assert fetch(box, SOUTH) is not None


def test_a_message_goes_to_its_site_once_and_comes_back_once(box):
    name = send(box)
    assert fetch(box, SOUTH) is None
    message = fetch(box)
    assert message.content["config"]["text"] == "hello" and fetch(box) is None
    assert list(box.pull_messages([name])) == []
    request, objects = answer(message)
    assert bring(box, request, objects) == [True] * 3
    (reply,) = box.pull_messages([name])
    assert reply.content["config"]["text"] == "back" and reply.metadata.reply_to_message_id == name
    assert list(box.pull_messages([name])) == []
    # A site whose last call was answered by nobody makes it again, and is told that all is well.
    assert bring(box, request, objects) == []
    assert not box.letters and not any(box.of.values())


def test_an_answer_that_did_not_come_whole_gives_way_to_another_and_a_whole_one_does_not(box):
    """A site that is killed in between trains again, and its answer has another id."""
    name = send(box)
    message = fetch(box)
    bring(box, *answer(message, "first"), count=1)
    assert list(box.pull_messages([name])) == []
    assert bring(box, *answer(message, "second")) == [True] * 3
    assert bring(box, *answer(message, "third")) == []
    (reply,) = box.pull_messages([name])
    assert reply.content["config"]["text"] == "second"


def test_a_site_that_asks_for_an_older_message_of_the_same_content_is_given_the_newer_one_too(box):
    """A run that was started again asks anew: parts of what its sites still have from before are parts of that too."""
    name = send(box)
    own = box.letters[name].objects
    assert len(own) == 3
    for part in own.keys() - {name}:
        assert call(box, "PullObject", run_id=RUN, object_id=part).object_found
    assert not call(box, "PullObject", run_id=RUN, object_id="0" * 64).object_found  # the older message itself
    assert fetch(box).content["config"]["text"] == "hello"


def test_a_site_cannot_read_or_answer_what_is_another_s(box):
    name = send(box)
    message = fetch(box)
    assert not call(box, "PullObject", SOUTH, run_id=RUN, object_id=name).object_found
    assert bring(box, *answer(message, node=SOUTH), node=SOUTH) == []
    assert bring(box, *answer(message, node=NORTH), node=SOUTH) == []  # in the name of the other
    assert list(box.pull_messages([name])) == []


def test_objects_are_what_their_ids_say_and_no_more_than_was_to_be_expected(box, monkeypatch):
    send(box)
    message = fetch(box)
    box.of[NORTH][message.metadata.message_id].room = 2000
    request, objects = answer(message)
    with pytest.raises(Refusal, match="not what its id says"):
        bring(box, request, {name: b"x" for name in objects})
    with pytest.raises(Refusal, match="more than 2000 bytes"):
        bring(box, *answer(message, "x" * 3000))
    with pytest.raises(Refusal, match="beside the objects"):
        request, objects = answer(message)
        request.messages_list[0].error.reason = "x" * post.ENVELOPE
        bring(box, request, objects)
    monkeypatch.setattr(post, "OBJECTS", 2)
    with pytest.raises(Refusal, match="objects"):
        bring(box, *answer(message))
    with pytest.raises(Refusal, match="no request"):
        box.answer("PushObject", NORTH, b"\xff\xff")


def test_calls_of_broken_bytes_are_refused_in_a_sentence_and_change_nothing(box):
    """Each honest call of an exchange with bits turned, bytes cut off, doubled or in another's place; 3,000 of them."""
    chance, name = random.Random(7), send(box)
    message = fetch(box)
    request, objects = answer(message)
    node, trees = flower.Node(node_id=NORTH), list(request.message_object_trees)
    fields, laden = {"run_id": RUN, "session_id": name}, type(request.messages_list[0])()
    laden.CopyFrom(request.messages_list[0])
    flower.send_along(laden, objects)
    honest = [
        ("PullMessages", flower.request("PullMessages", node, message_ids=[name])),
        ("PullObject", flower.request("PullObject", node, run_id=RUN, object_id=name)),
        (
            "PushMessages",
            flower.request("PushMessages", node, messages_list=request.messages_list, message_object_trees=trees),
        ),
        *(
            ("PushObject", flower.request("PushObject", node, object_id=key, object_content=content, **fields))
            for key, content in objects.items()
        ),
        ("PushMessages", flower.request("PushMessages", node, messages_list=[laden], message_object_trees=trees)),
    ]
    bodies = [(method, made.SerializeToString()) for method, made in honest]
    refused = 0
    for _ in range(3000):
        method, body = chance.choice(bodies)
        broken = bytearray(body)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(broken) + 1)
            match chance.randrange(4):
                case 0:
                    broken[at : at + 1] = bytes([chance.randrange(256)])
                case 1:
                    del broken[at : at + chance.randint(1, 40)]
                case 2:
                    broken[at:at] = broken[chance.randrange(len(broken) + 1) :][:100]
                case 3:
                    broken += chance.choice(bodies)[1]
        try:
            box.answer(chance.choice([method, chance.choice(bodies)[0]]), NORTH, bytes(broken))
        except Refusal as refusal:
            assert refusal.said.isprintable() and refusal.said.endswith(".")
            refused += 1
    assert refused > 100
    for reply in box.pull_messages([name]):  # pieces of honest calls may have put the honest answer together
        assert reply.content["config"]["text"] == "back"
        return
    assert (
        bring(box, request, objects) != [] and next(iter(box.pull_messages([name]))).content["config"]["text"] == "back"
    )


def test_an_answer_that_cannot_be_put_together_is_an_error_that_takes_no_other_with_it(box):
    names = [send(box, node=node) for node in (NORTH, SOUTH)]
    good, bad = fetch(box, NORTH), fetch(box, SOUTH)
    bring(box, *answer(good))
    request, _ = answer(bad, node=SOUTH)
    junk = b"Evil\x1b[2J" * 5000

    tree = request.message_object_trees[0]
    tree.Clear()
    tree.object_id = hashlib.sha256(junk).hexdigest()
    assert bring(box, request, {tree.object_id: junk}, SOUTH) == [True]
    replies = {reply.metadata.reply_to_message_id: reply for reply in box.pull_messages(names)}
    assert not replies[names[0]].has_error() and replies[names[1]].error.code == ErrorCode.UNKNOWN
    said = replies[names[1]].error.reason
    assert "unreadable" in said and said.isprintable() and len(said.encode()) <= 2048


def test_a_small_message_takes_its_objects_along_and_so_may_its_answer(box):
    name = send(box)
    pulled = call(box, "PullMessages")
    parts = flower.take_along(pulled.messages_list[0])
    assert set(parts) == set(flower.object_ids(pulled.message_object_trees[0]))
    assert not pulled.messages_list[0].content.items
    request, objects = answer(flower.inflated(pulled, parts))
    first = next(iter(objects))
    odd = {**objects, first: b"another", hashlib.sha256(b"strange").hexdigest(): b"strange"}
    flower.send_along(request.messages_list[0], odd)
    trees = [request.message_object_trees[0]]
    taken = call(box, "PushMessages", messages_list=request.messages_list, message_object_trees=trees)
    assert list(taken.objects_to_push) == [first] and not list(box.pull_messages([name]))  # is not what its id says
    flower.send_along(request.messages_list[0], objects)
    assert not call(
        box, "PushMessages", messages_list=request.messages_list, message_object_trees=trees
    ).objects_to_push
    (reply,) = box.pull_messages([name])
    assert reply.content["config"]["text"] == "back"


def test_a_large_message_does_not(box):
    send(box, "x" * (flower.ALONG_BYTES + 1))
    pulled = call(box, "PullMessages")
    assert not pulled.messages_list[0].content.items
    assert call(box, "PullObject", object_id=pulled.message_object_trees[0].object_id).object_available


def test_what_an_answer_takes_along_has_no_more_room_than_what_it_brings(box):
    name = send(box)
    message = flower.inflated(pulled := call(box, "PullMessages"), flower.take_along(pulled.messages_list[0]))
    box.letters[name].room = 100
    request, objects = answer(message, "y" * 1000)
    flower.send_along(request.messages_list[0], objects)
    with pytest.raises(Refusal, match="more than 100 bytes"):
        call(
            box,
            "PushMessages",
            messages_list=request.messages_list,
            message_object_trees=request.message_object_trees,
        )


def test_what_will_not_be_answered_is_an_error(box):
    away, late, lost = send(box, node=99), send(box, ttl=1e-9), send(box, "nobody waits", ttl=1e-9)
    there = send(box, node=SOUTH)

    def errors():
        box.looked -= post.AWAY_S
        replies = box.pull_messages([away, late, there])
        return {reply.metadata.reply_to_message_id: reply.error.code for reply in replies}

    assert errors() == {late: ErrorCode.MESSAGE_UNAVAILABLE}
    assert errors() == {away: ErrorCode.NODE_UNAVAILABLE}  # not before it was away twice: it may be coming back
    assert list(box.letters) == [there] and lost not in box.letters
    assert fetch(box) is None  # of the late ones neither is handed out


def test_what_is_the_same_for_many_sites_is_kept_once(box):
    content = RecordDict({"config": ConfigRecord({"bytes": bytes(1000)})})
    names = [
        *box.push_messages([Message(content, NORTH, "train")]),
        *box.push_messages([Message(content, SOUTH, "train")]),
    ]
    first, second = (box.letters[name].objects for name in names)
    shared = first.keys() & second.keys()
    assert len(shared) == 2 and all(first[name] is second[name] for name in shared)


def test_a_parcel_holds_what_was_put_in_and_takes_what_lies_beside():
    content = RecordDict({"config": ConfigRecord({"bytes": bytes(range(256)) * 40_000})})
    packed = parcel.pack_content(content)
    assert len(packed) == 3 and parcel.is_packed(packed) and not parcel.is_packed(content)
    assert parcel.unpack_content(content) is content
    packed["beside"] = ConfigRecord({"site": "north"})
    opened = parcel.unpack_content(packed)
    assert opened["config"] == content["config"] and opened["beside"]["site"] == "north"
    packed["config"] = ConfigRecord({})
    with pytest.raises(ValueError, match="both in the parcel and beside it"):
        parcel.unpack_content(packed)
    with pytest.raises(ValueError):
        parcel.unpack_content(RecordDict({f"{parcel.NAME}.0": ConfigRecord({"piece": b"\xff\xff"})}))
    with pytest.raises(ValueError, match="no bytes"):
        parcel.unpack_content(RecordDict({f"{parcel.NAME}.0": ConfigRecord({"piece": "text"})}))
