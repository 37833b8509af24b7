"""Bytes that would become a multiple of themselves are refused before anything is built of them."""

from __future__ import annotations

import hashlib
import json
import tracemalloc

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictMessage

from fedpeft.deploy import bounds, flower, parcel
from fedpeft.flower import identify

FEW = 1000  # parts, in these tests
MB = 2**20


def entries(kind, count):
    """A record of so many of the smallest entries there are."""
    whole = RecordDictMessage()
    if kind == "records":
        for number in range(count):
            whole.items.add(key=str(number)).config_record.SetInParent()
        return whole.SerializeToString()
    item = whole.items.add(key="x")
    if kind == "config":
        for number in range(count):
            item.config_record.items.add(key=str(number)).value.bool = True
    elif kind == "metrics":
        for number in range(count):
            item.metric_record.items.add(key=str(number)).value.double = 1.0
    elif kind == "arrays":
        for number in range(count):
            item.array_record.items.add(key=str(number)).value.SetInParent()
    elif kind == "dimensions":
        item.array_record.items.add(key="x").value.shape.extend([1] * count)
    elif kind == "texts":
        item.config_record.items.add(key="x").value.string_list.vals.extend([""] * count)
    else:
        listed = item.config_record.items.add(key="x").value
        {"truths": listed.bool_list, "integers": listed.sint_list, "reals": listed.double_list}[kind].vals.extend(
            [1] * count
        )
    return whole.SerializeToString()


KINDS = ("records", "config", "metrics", "arrays", "dimensions", "texts", "truths", "integers", "reals")


@pytest.mark.parametrize("kind", KINDS)
def test_entries_are_counted_before_they_are_built(monkeypatch, kind):
    monkeypatch.setattr(bounds, "PARTS", FEW)
    few, many = entries(kind, FEW // 10), entries(kind, FEW + 1)
    bounds.require_few(few, RecordDictMessage.DESCRIPTOR)
    flower.content_from_bytes(few) if kind != "arrays" else None
    monkeypatch.setattr(flower.RecordDictMessage, "FromString", None, raising=False)
    packed = RecordDict({f"{parcel.NAME}.0": ConfigRecord({"piece": many})})
    with pytest.raises(ValueError, match="more than 1000 parts"):
        parcel.unpack_content(packed)


def test_what_is_large_and_simple_is_not_counted_and_what_is_cut_off_is_told():
    content = RecordDict(
        {
            "arrays": ArrayRecord({"x": Array("float32", (MB,), "numpy.ndarray", bytes(4 * MB))}),
            "config": ConfigRecord({"text": "x" * MB, "reals": [0.5] * 1000, "negative": -1}),
            "metrics": MetricRecord({"loss": 1.0}),
        }
    )
    whole = flower.content_to_bytes(content)
    tracemalloc.start()
    bounds.require_few(whole, RecordDictMessage.DESCRIPTOR)
    assert tracemalloc.get_traced_memory()[1] < MB
    tracemalloc.stop()
    assert flower.content_from_bytes(whole)["config"] == content["config"]
    for broken in (whole[:-1], b"\x0a", b"\xff" * 20, b"\x0b", b"\x0a\xff\xff\xff\xff\x0f"):
        with pytest.raises(ValueError):
            bounds.require_few(broken, RecordDictMessage.DESCRIPTOR)


def made_of(kind, children, body):
    """An object of Flower's and its id."""
    content = f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body
    return hashlib.sha256(content).hexdigest(), content


def message_of(*objects, record):
    """The objects of a message whose content has this one record; its id and they."""
    identify(5, 7, 0)
    good = Message(RecordDict({"x": ConfigRecord({})}), 7, "train")
    request, contents = flower.deflated(good)
    tree = request.message_object_trees[0]
    body = contents(tree.object_id).partition(b"\0")[2]
    content = made_of("RecordDict", [record], json.dumps({"x": record}).encode())
    root = made_of("Message", [content[0]], body)
    return root[0], dict([*objects, content, root])


def test_an_array_of_one_piece_a_million_times_is_not_put_together():
    piece = made_of("ArrayChunk", [], bytes(1000))

    def array_of(indices):
        told = {"dtype": "uint8", "shape": [1], "stype": "numpy.ndarray", "arraychunk_ids": indices}
        array = made_of("Array", [piece[0]], json.dumps(told).encode())
        record = made_of("ArrayRecord", [array[0]], json.dumps({"x": array[0]}).encode())
        return message_of(piece, array, record, record=record[0])

    root, contents = array_of([0])
    assert len(flower.put_together(root, contents).content["x"]["x"].data) == 1000
    with pytest.raises(ValueError, match="a piece twice"):
        flower.put_together(*array_of([0] * 1000))


def test_objects_of_a_message_are_counted_too(monkeypatch):
    monkeypatch.setattr(bounds, "PARTS", FEW)
    body = entries("config", FEW + 1)
    inner = RecordDictMessage.FromString(body).items[0].config_record.SerializeToString()
    record = made_of("ConfigRecord", [], inner)
    with pytest.raises(ValueError, match="more than 1000 parts"):
        flower.put_together(*message_of(record, record=record[0]))
    strange = made_of("Strange", [], b"")
    with pytest.raises(ValueError, match="no known kind: Strange"):
        flower.put_together(*message_of(strange, record=strange[0]))
    monkeypatch.setattr(bounds, "INDEX_BYTES", 50)
    with pytest.raises(ValueError, match="of names"):
        flower.put_together(*message_of(made_of("ConfigRecord", [], b""), record="0" * 64))
