"""The round refuses bad replies with a reason, and what is refused changes nothing; quorum and deadline."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedpeft.packing import pack_state
from fedpeft.state import AdapterState, RoundFailed, Rules, ServerState
from fedpeft.strategies.rules.fedit import FedIT
from fedpeft.strategies.wire import PACKED
from support.scripted import START, Reply, ScriptedGrid, good, raw, run, spoiled, with_value

pytestmark = pytest.mark.usefixtures("flower_run")

# Bad replies ---------------------------------------------------------------------------------------------------------


def truncated(message: Message) -> RecordDict:
    adapter, task = PACKED.open(message.content)
    reply = PACKED.reply(adapter.select(task.uploads), {"num-examples": 10.0}, task.round)
    reply["arrays"] = ArrayRecord({"adapter": Array(pack_state(adapter)[0][:-3])})
    return reply


TASK = {"task": '{"round": 1}', "manifest": pack_state(START)[1]}


def with_bytes(data: bytes) -> Reply:
    arrays = ArrayRecord({"adapter": Array("float32", (14,), "numpy.ndarray", data)})
    return raw(arrays=arrays, metrics=MetricRecord({"num-examples": 10}), config=ConfigRecord(TASK))


BAD = {
    "missing key": (spoiled(lambda state: state.without(("B",))), "missing q/B"),
    "extra key": (spoiled(lambda state: state.replace({"q/C": torch.ones(1)})), "unexpected q/C"),
    "empty": (spoiled(lambda state: AdapterState({}, state.sites)), "missing q/A, q/B"),
    "misshapen": (
        spoiled(lambda state: state.replace({"q/B": torch.ones(3, 1)})),
        r"q/B has shape [3, 1], expected [3, 2]",
    ),
    "transposed": (
        spoiled(lambda state: state.replace({"q/B": torch.ones(2, 3)})),
        r"q/B has shape [2, 3], expected [3, 2]",
    ),
    "wrong dtype": (spoiled(lambda state: state.map(lambda value: value.double())), "dtype torch.float64"),
    "nan": (spoiled(with_value(math.nan)), "q/B has NaN or inf"),
    "inf": (spoiled(with_value(math.inf)), "q/B has NaN or inf"),
    "weight 0": (
        spoiled(lambda state: state, metrics={"num-examples": 0.0}),
        "num-examples is 0: the client has no record",
    ),
    "no record": (
        spoiled(lambda state: state, metrics={"accuracy": math.nan, "num-examples": 0.0}),
        "num-examples is 0: the client has no record",
    ),
    "weight negative": (spoiled(lambda state: state, metrics={"num-examples": -5.0}), "num-examples is -5"),
    "weight nan": (spoiled(lambda state: state, metrics={"num-examples": math.nan}), "num-examples is nan"),
    "weight inf": (spoiled(lambda state: state, metrics={"num-examples": math.inf}), "num-examples is inf"),
    "weight missing": (spoiled(lambda state: state, metrics={"train_loss": 1.0}), "no num-examples"),
    "stale": (spoiled(lambda state: state, round=0), "stale: an update of round 0, not 1"),
    "far": (spoiled(lambda state: state.map(lambda value: value + 1e4)), "run.max_update_norm"),
    "client error": (lambda message: Error(2, "CUDA out of memory"), "client error: CUDA out of memory"),
    "silent": (lambda message: None, "no reply before the deadline"),
    "no records": (raw(), "num-examples"),
    "no arrays": (raw(metrics=MetricRecord({"num-examples": 10})), "records: missing arrays, config"),
    "no manifest": (
        raw(
            metrics=MetricRecord({"num-examples": 10}),
            config=ConfigRecord({"task": "{}"}),
            arrays=ArrayRecord({"adapter": Array(np.zeros(3, np.float32))}),
        ),
        "config: missing manifest",
    ),
    "task is no mapping": (
        raw(
            metrics=MetricRecord({"num-examples": 10}),
            arrays=ArrayRecord({"adapter": Array(pack_state(START)[0])}),
            config=ConfigRecord({"task": "3", "manifest": pack_state(START)[1]}),
        ),
        "",
    ),
    "arrays of another kind": (
        raw(arrays=MetricRecord({"adapter": 1.0, "num-examples": 10}), config=ConfigRecord(TASK)),
        "no num-examples",
    ),
    "no bytes": (with_bytes(b""), "0 bytes, expected 56 and a header for float32 [14]"),
    "junk bytes": (with_bytes(b"junk" * 20), "unreadable header"),
    "truncated array": (truncated, "float32 [11], expected float32 [14]"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_reply_is_quarantined_with_its_reason_and_changes_nothing(kind):
    bad, reason = BAD[kind]
    rules = {"deadline_s": 0.2, "max_update_norm": 100.0}
    server, events, _ = run({"a": good(1.0, 10), "bad": bad, "c": good(4.0, 30)}, **rules)
    only_good, _, _ = run({"a": good(1.0, 10), "c": good(4.0, 30)}, **rules)
    assert server.adapter.sha256() == only_good.adapter.sha256()
    quarantine, done = events
    assert (quarantine["event"], quarantine["client"], quarantine["round"]) == ("quarantine", "bad", 1)
    assert reason in quarantine["reason"]
    assert done["clients"] == ["a", "c"] and list(done["quarantined"]) == ["bad"]


def test_the_norm_bound_is_on_the_distance_from_what_was_sent():
    """3 x 2 + 2 x 4 entries moved by 2: sqrt(14 * 4) = 7.48; the tensors themselves are larger."""
    start = START.map(lambda value: value + 50)
    for bound, expected in ((7.4, []), (7.5, ["a"])):
        rules = {"max_update_norm": bound, "quorum": 0.1}
        if expected:
            assert run({"a": good(2.0)}, start=start, **rules)[1][-1]["clients"] == expected
        else:
            with pytest.raises(RoundFailed, match=r"update norm 7\.48 is over run\.max_update_norm=7\.4"):
                run({"a": good(2.0)}, start=start, **rules)


def test_too_few_good_replies_name_every_failed_client():
    clients = {"a": good(1.0), "b": BAD["nan"][0], "c": BAD["client error"][0], "d": BAD["stale"][0]}
    with pytest.raises(RoundFailed) as failed:
        run(clients, quorum=0.5)
    message = str(failed.value)
    assert "round 1: 1 good replies of 4" in message and "run.quorum=0.5 needs 2" in message
    for client, reason in (("b", "NaN or inf"), ("c", "CUDA out of memory"), ("d", "stale")):
        assert f"{client}: " in message and reason in message
    assert "a: " not in message


def test_the_quorum_counts_the_asked_and_rounds_up():
    clients = {"a": good(1.0), "b": good(1.0), "c": BAD["nan"][0]}
    assert run(clients, quorum=0.6)[1][-1]["clients"] == ["a", "b"]  # ceil(0.6 * 3) = 2
    with pytest.raises(RoundFailed, match="needs 3"):
        run(clients, quorum=0.7)


def test_one_good_reply_is_always_needed():
    with pytest.raises(RoundFailed, match="0 good replies of 1"):
        run({"a": BAD["nan"][0]}, quorum=0.01)


def test_a_failed_round_leaves_no_event_and_no_checkpoint():
    events, states = [], []
    with pytest.raises(RoundFailed):
        FedIT().run(
            ScriptedGrid({"a": BAD["nan"][0]}),
            ServerState(START),
            Rules(rounds=2, clients=1),
            record=events.append,
            after_round=states.append,
        )
    assert [event["event"] for event in events] == ["quarantine"] and states == []


def test_it_does_not_wait_past_the_deadline():
    began = time.monotonic()
    with pytest.raises(RoundFailed, match="b: no reply before the deadline"):
        run({"a": good(1.0), "b": lambda message: None}, quorum=1.0, deadline_s=0.3)
    assert 0.3 <= time.monotonic() - began < 3.0


def test_it_does_not_wait_when_all_have_answered():
    began = time.monotonic()
    run({"a": good(1.0), "b": BAD["client error"][0]}, deadline_s=60.0)
    assert time.monotonic() - began < 10.0


def test_replies_are_matched_by_message_not_by_the_node_that_they_claim():
    """Flower reports a dead node's error from another node's id."""

    class Misattributed(ScriptedGrid):
        def pull_messages(self, message_ids):
            replies = super().pull_messages(message_ids)
            for reply in replies:
                if reply.has_error():
                    reply.metadata.__dict__["_src_node_id"] = 100
            return replies[::-1]

    events: list = []
    grid = Misattributed({"a": good(1.0, 10), "b": BAD["client error"][0], "c": good(4.0, 30)})
    server = FedIT().run(grid, ServerState(START), Rules(rounds=1, clients=3), record=events.append)
    assert events[0]["client"] == "b"
    torch.testing.assert_close(server.adapter["q/B"], torch.full((3, 2), 3.25))


@pytest.mark.parametrize("refusal", [[], [None]])
def test_a_message_that_the_link_did_not_take_is_not_waited_for(refusal):
    """Flower's grids answer a push with nothing, or with None, for a message that could not be sent."""

    class Lossy(ScriptedGrid):
        def push_messages(self, messages):
            numbers = []
            for message in messages:
                gone = message.metadata.message_type == "train" and self.names[message.metadata.dst_node_id] == "b"
                numbers += refusal if gone else [self._push(message)]
            return numbers

        def pull_messages(self, message_ids):
            assert all(isinstance(number, str) for number in message_ids)
            return super().pull_messages(message_ids)

    events: list = []
    began = time.monotonic()
    server = FedIT().run(
        Lossy({"a": good(2.0), "b": good(9.0)}),
        ServerState(START),
        Rules(rounds=1, clients=2, deadline_s=60),
        record=events.append,
    )
    assert time.monotonic() - began < 10
    assert events[0]["client"] == "b" and "no reply" in events[0]["reason"]
    torch.testing.assert_close(server.adapter["q/B"], torch.full((3, 2), 2.0))
