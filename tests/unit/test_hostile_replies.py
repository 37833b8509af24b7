"""Replies made to break a coordinator: each is quarantined in a sentence, costs hardly any memory, changes nothing."""

from __future__ import annotations

import json
import tracemalloc

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedpeft.errors import RunError
from fedpeft.foreign import TEXT_BYTES
from fedpeft.record.report import html_table
from fedpeft.state import AdapterState, Rules, ServerState
from fedpeft.strategies import wire
from fedpeft.strategies.rules.fedit import FedIT
from fedpeft.strategies.sequence import exchange
from support.malformed import ARRAYS, INF, MANIFESTS, MB, NAN, RECORDS, message
from support.scripted import START, ScriptedGrid, good, raw, run

pytestmark = pytest.mark.usefixtures("flower_run")

TASKS = {
    "no mapping": "[]",
    "no round": "{}",
    "a round in a text": '{"round": "1"}',
    "a round of true": '{"round": true}',
    "a round of 1.0": '{"round": 1.0}',
    "the round before": '{"round": 0}',
    "the round after": '{"round": 2}',
    "a round of 4000 digits": '{"round": 1%s}' % ("0" * 4000),
    "a deep one": '{"round": 1, "a": %s1}' % ("[" * 50_000),
    "64 MB": '{"round": 1, "a": "%s"}' % ("x" * 64 * MB),
    "bytes": b'{"round": 1}',
    "NaN": '{"round": NaN}',
}
METRICS = {
    "none": {"loss": 1.0},
    "0": {"num-examples": 0},
    "-1": {"num-examples": -1},
    "NaN": {"num-examples": NAN},
    "inf": {"num-examples": INF},
    "1e308": {"num-examples": 1e308},
    "10^400": {"num-examples": 10**400},
    "a list": {"num-examples": [1.0, 2.0]},
    "a loss of NaN": {"num-examples": 1, "train_loss": NAN},
    "a loss of -inf": {"num-examples": 1, "train_loss": -INF},
    "a loss of 1e300": {"num-examples": 1, "loss": 1e300},
    "a name with escapes": {"num-examples": 1, "\x1b[31m": 1.0},
    "a name of 1 MB": {"num-examples": 1, "x" * MB: 1.0},
    "5000": {"num-examples": 1, **{f"m{n}": 1.0 for n in range(5000)}},
    "of lists": {"num-examples": 1, "a": [1] * MB},
}
ERRORS = {
    "of 64 MB": "x" * 64 * MB,
    "with escapes": "\x1b[2J\x07\r" * 3000,
    "of nothing": "",
    "of HTML": "<script>alert(1)</script>",
    "of lines": "a\nround 9: everyone quarantined\n" * 1000,
    "of surrogates": "\ud800" * 2000,
    "of markup": "[/red][link=x]" * 500,
}
REPLIES = {
    **{f"array: {kind}": (lambda make=make: message(make())) for kind, make in ARRAYS.items()},
    **{f"manifest: {kind}": (lambda make=make: message(manifest=make())) for kind, make in MANIFESTS.items()},
    **{f"records: {kind}": make for kind, make in RECORDS.items()},
    **{f"task: {kind}": (lambda task=task: message(task=task)) for kind, task in TASKS.items()},
    **{f"metrics: {kind}": (lambda found=found: message(metrics=found)) for kind, found in METRICS.items()},
    **{f"error: {kind}": (lambda text=text: Error(2, text)) for kind, text in ERRORS.items()},
}
SAMPLE = (
    "array: a header of 10^13 elements",
    "array: objects in pickles",
    "array: a second array of 64 MB",
    "array: a tensor of torch",
    "array: compressed",
    "manifest: spaces around it",
    "manifest: 100000 brackets",
    "manifest: sizes that overflow",
    "manifest: an entry twice",
    "records: a field too many",
    "task: a round of 4000 digits",
    "task: the round before",
    "metrics: 1e308",
    "metrics: a loss of NaN",
    "error: of 64 MB",
    "error: with escapes",
)


def judged(reply) -> str:
    """The sentence with which a reply is quarantined; the round must end as without it, within bounds."""
    only_good, _, _ = run({"a": good(1.0, 10), "c": good(4.0, 30)}, quorum=0.5)
    tracemalloc.start()
    try:
        server, events, _ = run({"a": good(1.0, 10), "bad": lambda request: reply, "c": good(4.0, 30)}, quorum=0.5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100 * MB, f"{peak / MB:.0f} MB"
    assert server.adapter.sha256() == only_good.adapter.sha256()
    quarantine, done = events
    assert (quarantine["event"], quarantine["client"]) == ("quarantine", "bad") and done["clients"] == ["a", "c"]
    reason = quarantine["reason"]
    assert 0 < len(reason.encode()) <= TEXT_BYTES and reason.isprintable()
    assert len(json.dumps(events)) < 4 * TEXT_BYTES
    return reason


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_hostile_reply_is_quarantined_in_a_sentence(kind):
    judged(REPLIES[kind]())


@pytest.mark.attack
@pytest.mark.parametrize("kind", REPLIES)
def test_every_hostile_reply_is_quarantined_in_a_sentence(kind):
    judged(REPLIES[kind]())


def test_the_message_that_they_are_made_from_is_good():
    """So that each of them is refused for what was changed in it."""
    server, _, _ = run({"a": raw(**message())})
    assert server.adapter.sha256() == START.sha256() and len(REPLIES) > 90


def test_a_text_from_a_client_is_text_in_the_report():
    page = html_table(["reason"], [[judged(Error(2, ERRORS["of HTML"]))]])
    assert "<script" not in page and "&lt;script" in page


class Twisted(ScriptedGrid):
    """`b` answers twice, or from another node."""

    def __init__(self, clients, twist: str) -> None:
        super().__init__(clients)
        self.twist = twist

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        found = []
        for reply in replies:
            mine = reply.metadata.message_type == "train" and reply.metadata.src_node_id == self.nodes["b"]
            if mine and self.twist == "other":
                reply.metadata.__dict__["_src_node_id"] = self.nodes["a"]
            found += [reply] * (2 if mine and self.twist == "twice" else 1)
        return found


@pytest.mark.parametrize(("twist", "words"), [("twice", "answered one message twice"), ("other", "in its name")])
def test_a_second_reply_and_one_in_another_s_name_are_refused(twist, words):
    events: list = []
    grid = Twisted({"a": good(2.0), "b": good(9.0)}, twist)
    server = FedIT().run(grid, ServerState(START), Rules(rounds=1, clients=2), record=events.append)
    assert events[0]["client"] == "b" and words in events[0]["reason"]
    torch.testing.assert_close(server.adapter["q/B"], torch.full((3, 2), 2.0))


@pytest.mark.parametrize(
    "identity",
    [
        RecordDict({}),
        RecordDict({"identity": ConfigRecord({})}),
        RecordDict({"identity": MetricRecord({"name": 1})}),
        RecordDict({"identity": ConfigRecord({"name": "../x"})}),
        RecordDict({"identity": ConfigRecord({"name": 3})}),
        RecordDict({"identity": ConfigRecord({"name": "\x1b[2J"})}),
        Error(2, "\x00" * MB),
        RecordDict({"identity": ConfigRecord({"name": "x" * MB})}),
        RecordDict({"identity": ConfigRecord({"name": "b"}), "more": ConfigRecord({})}),
    ],
)
def test_who_does_not_tell_a_name_takes_no_part(identity, caplog):
    class Nameless(ScriptedGrid):
        def _push(self, message):
            number = super()._push(message)
            if self.names[message.metadata.dst_node_id] == "b":
                self.replies[number] = Message(identity, reply_to=message)
            return number

    clients = {"a": good(2.0), "b": good(9.0)}
    assert list(wire.PACKED.roster(Nameless(clients), None)) == ["a"]
    assert all(len(record.getMessage()) < TEXT_BYTES + 100 for record in caplog.records) and caplog.records
    with pytest.raises(RunError, match="1 of 2 clients told their names"):
        wire.PACKED.roster(Nameless(clients), 2)


FORM = {"x": (2, 3), "n": (2,)}


def sums(number: int = 1, **changed) -> RecordDict:
    tensors = {"x": torch.ones(2, 3, dtype=torch.float64), "n": torch.ones(2, dtype=torch.float64), **changed}
    state = AdapterState({}, extra={key: value for key, value in tensors.items() if value is not None})
    return wire.PACKED.reply(state, {"num-examples": 5.0}, number)


def test_sums_are_opened_as_updates_are(flower_run):
    def read(content):
        return exchange.read_sums(Message(content, reply_to=Message(RecordDict({}), 7, "query.sums")), 1, FORM)

    state, weight = read(sums())
    assert {key: tuple(value.shape) for key, value in state.extra.items()} == FORM and weight == 5.0
    hostile = [
        sums(0),
        sums(n=None),
        sums(x=torch.ones(6)),
        sums(other=torch.ones(2, 3)),
        sums(x=torch.full((2, 3), NAN)),
        sums(x=torch.ones(2, 3, dtype=torch.int64)),
        wire.PACKED.reply(AdapterState({"x": torch.ones(2, 3), "n": torch.ones(2)}), {"num-examples": 5.0}, 1),
        *(make() for kind, make in RECORDS.items() if kind != "a record of 64 MB too many"),
        message(manifest="[" * 50_000),
        message(metrics={"num-examples": INF}),
    ]
    for content in hostile:
        with pytest.raises(wire.BadReply) as error:
            read(content)
        assert len(str(error.value).encode()) <= TEXT_BYTES


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({}),
        message(),
        RecordDict({"metrics": MetricRecord({"num-examples": 3, "accuracy": NAN})}),
        RecordDict({"metrics": MetricRecord({"num-examples": 3}), "arrays": ArrayRecord({})}),
    ],
)
def test_scores_come_alone_and_finite(content):
    with pytest.raises(wire.BadReply):
        wire.scores(Message(content, reply_to=Message(RecordDict({}), 7, "evaluate")))
