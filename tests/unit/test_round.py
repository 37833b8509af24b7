"""The round of strategies/base.py against a grid of scripted clients: who is chosen, what is refused, when it stops."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedpeft.errors import RunError
from fedpeft.state import AdapterState, Site, pack
from fedpeft.strategies import wire
from fedpeft.strategies.base import FederatedStrategy, RoundFailed, Rules, ServerState, choose
from fedpeft.strategies.fedit import FedIT
from fedpeft.strategies.wire import PACKED

SITES = {"q": Site("lora", (3, 4), 2.0)}
START = AdapterState({"q/A": torch.ones(2, 4), "q/B": torch.zeros(3, 2)}, SITES)

Reply = Callable[[Message], "RecordDict | Error | None"]


@pytest.fixture(autouse=True)
def identity(monkeypatch):
    """Flower builds no message outside a run: pretend to be one."""
    for name, value in (("_run_id", 1), ("_node_id", 1), ("_task_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)


class ScriptedGrid(Grid):
    """Nodes that answer at once with what `clients[name](message)` gives; None never answers.

    Remembers what was sent to each (`sent`: client name -> messages but for queries).
    """

    def __init__(self, clients: dict[str, Reply], nodes: dict[str, int] | None = None) -> None:
        self.clients = clients
        self.nodes = nodes or {name: 100 + index for index, name in enumerate(clients)}
        self.names = {node: name for name, node in self.nodes.items()}
        self.sent: dict[str, list[Message]] = {name: [] for name in clients}
        self.replies: dict[str, Message] = {}
        self.count = 0

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes.values())

    def get_nodes(self):
        return [SimpleNamespace(node_id=node) for node in self.nodes.values()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._push(message) for message in messages]

    @property
    def rounds(self) -> dict[int, list[str]]:
        """Names of the clients asked to train, by round."""
        asked: dict[int, list[str]] = {}
        for name in sorted(self.sent):
            for message in self.sent[name]:
                asked.setdefault(PACKED.open(message.content)[1]["round"], []).append(name)
        return asked

    def _push(self, message: Message) -> str:
        self.count += 1
        message.metadata.__dict__["_message_id"] = number = f"message-{self.count}"
        name = self.names[message.metadata.dst_node_id]
        if message.metadata.message_type == "query":
            answer = RecordDict({"identity": ConfigRecord({"name": name})})
        else:
            self.sent[name].append(message)
            answer = self.clients[name](message)
        if answer is not None:
            self.replies[number] = Message(answer, reply_to=message)
        return number

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(number) for number in message_ids if number in self.replies]

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        raise NotImplementedError

    def set_run(self, run) -> None:
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError


def good(step: float, count: float = 10, **metrics: float) -> Reply:
    """A client that adds `step` to every tensor that it uploads."""

    def reply(message: Message) -> RecordDict:
        adapter, task = PACKED.open(message.content)
        trained = adapter.select(task["uploads"]).map(lambda value: value + step)
        return PACKED.reply(trained, {"num-examples": count, **metrics}, task["round"])

    return reply


def spoiled(change: Callable[[AdapterState], AdapterState], **overrides) -> Reply:
    """A client whose otherwise good upload is passed through `change`."""

    def reply(message: Message) -> RecordDict:
        adapter, task = PACKED.open(message.content)
        upload = change(adapter.select(task["uploads"]).map(lambda value: value + 1.0))
        return PACKED.reply(upload, overrides.get("metrics", {"num-examples": 10.0}), overrides.get("round", task["round"]))

    return reply


def raw(**records) -> Reply:
    """A client that answers with exactly these records."""
    return lambda message: RecordDict(records)


def with_value(value: float) -> Callable[[AdapterState], AdapterState]:
    def change(adapter: AdapterState) -> AdapterState:
        spoiled_tensor = adapter["q/B"].clone()
        spoiled_tensor[1, 1] = value
        return adapter.replace({"q/B": spoiled_tensor})

    return change


def run(clients: dict[str, Reply], strategy: FederatedStrategy | None = None, *, start: AdapterState = START, **rules):
    """Final state, events and grid of a run over scripted clients."""
    grid, events = ScriptedGrid(clients), []
    rules = Rules(**{"rounds": 1, "clients": len(clients), **rules})
    server = (strategy or FedIT()).run(grid, ServerState(start), rules, record=events.append)
    return server, events, grid


# What a good round does ----------------------------------------------------------------------------------------------


def test_the_mean_is_weighted_by_examples():
    server, _, _ = run({"a": good(1.0, 10), "b": good(4.0, 30)})
    expected = (10 * 1.0 + 30 * 4.0) / 40  # 3.25
    assert server.round == 1
    torch.testing.assert_close(server.adapter["q/B"], torch.full((3, 2), expected))
    torch.testing.assert_close(server.adapter["q/A"], torch.full((2, 4), 1 + expected))


def test_uniform_weighting_ignores_the_counts():
    strategy = FedIT()
    strategy.weighting = "uniform"
    server, _, _ = run({"a": good(1.0, 10), "b": good(4.0, 30)}, strategy)
    torch.testing.assert_close(server.adapter["q/B"], torch.full((3, 2), 2.5))


def test_rounds_build_on_each_other_and_carry_their_number():
    server, events, grid = run({"a": good(1.0)}, rounds=3)
    torch.testing.assert_close(server.adapter["q/B"], torch.full((3, 2), 3.0))
    tasks = [PACKED.open(message.content)[1] for message in grid.sent["a"]]
    assert [task["round"] for task in tasks] == [1, 2, 3]
    assert tasks[0]["trains"] == ["A", "B", "head"] and tasks[0]["uploads"] == ["A", "B", "head"] and tasks[0]["keeps"] == []
    assert [event["round"] for event in events if event["event"] == "round"] == [1, 2, 3]


def test_a_run_goes_on_from_the_round_of_its_state():
    grid = ScriptedGrid({"a": good(1.0), "b": good(2.0), "c": good(4.0)})
    rules = Rules(rounds=4, clients=3, clients_per_round=2, seed=5)
    whole = FedIT().run(grid, ServerState(START), rules)
    again = ScriptedGrid(grid.clients)
    half = FedIT().run(again, ServerState(START), replace(rules, rounds=2))
    rest = FedIT().run(again, half, rules)
    assert rest.round == 4 and again.rounds == grid.rounds
    assert rest.adapter.sha256() == whole.adapter.sha256()


def test_the_event_tells_clients_traffic_and_mean_metrics():
    _, events, _ = run({"a": good(1.0, 10, train_loss=1.0), "b": good(1.0, 30, train_loss=2.0, extra=9.0)})
    (event,) = events
    assert (event["event"], event["round"], event["clients"], event["quarantined"]) == ("round", 1, ["a", "b"], {})
    assert event["train_loss"] == pytest.approx((10 * 1.0 + 30 * 2.0) / 40)
    assert "extra" not in event  # not every client sent it
    assert event["bytes_down"] == event["bytes_up"] == 2 * START.nbytes


class Staged(FedIT):
    """B only, and a marker so that the order of the steps shows."""

    trains = ("B",)

    def __init__(self, calls: list) -> None:
        self.calls = calls

    def before_round(self, server):
        self.calls.append(("before_round", server.round))
        return server

    def aggregate(self, server, updates):
        self.calls.append(("aggregate", server.round, [update.client for update in updates]))
        return super().aggregate(server, updates)


def test_evaluate_record_and_after_round_are_called_in_order():
    calls: list = []
    strategy = Staged(calls)
    grid = ScriptedGrid({"b": good(1.0), "a": good(1.0)})

    def evaluate(server):
        calls.append(("evaluate", server.round))
        return {"accuracy": 0.5 + server.round}

    strategy.run(grid, ServerState(START), Rules(rounds=3, clients=2, evaluate_every=2), evaluate=evaluate,
                 record=lambda event: calls.append(("record", event["round"], event.get("accuracy"))),
                 after_round=lambda server: calls.append(("after_round", server.round)))
    assert calls == [
        ("before_round", 0), ("aggregate", 0, ["a", "b"]), ("record", 1, None), ("after_round", 1),
        ("before_round", 1), ("aggregate", 1, ["a", "b"]), ("evaluate", 2), ("record", 2, 2.5), ("after_round", 2),
        ("before_round", 2), ("aggregate", 2, ["a", "b"]), ("evaluate", 3), ("record", 3, 3.5), ("after_round", 3),
    ]


def test_only_trained_roles_are_expected_and_changed():
    server, _, _ = run({"a": good(1.0)}, Staged([]))
    assert torch.equal(server.adapter["q/A"], START["q/A"])
    torch.testing.assert_close(server.adapter["q/B"], torch.ones(3, 2))


# The choice of clients -----------------------------------------------------------------------------------------------


def picks(nodes: dict[str, int], seed: int, rounds: int = 6) -> dict[int, list[str]]:
    grid = ScriptedGrid({name: good(1.0) for name in nodes}, nodes)
    FedIT().run(grid, ServerState(START), Rules(rounds=rounds, seed=seed, clients=len(nodes), clients_per_round=2))
    return grid.rounds


def test_the_choice_is_seeded_and_does_not_depend_on_node_ids_or_order():
    names = [f"site-{index}" for index in range(5)]
    ids = {name: 10 + index for index, name in enumerate(names)}
    other = {name: (7919 * (index + 3)) % 1000 for index, name in reversed(list(enumerate(names)))}
    first = picks(ids, seed=1)
    assert first == picks(other, seed=1)
    assert first != picks(ids, seed=2)
    assert list(map(len, first.values())) == [2] * 6
    assert len({tuple(chosen) for chosen in first.values()}) > 1  # not the same pair every round


def test_every_client_is_chosen_about_equally_often():
    names = [f"c{index}" for index in range(6)]
    rules = Rules(rounds=1, clients_per_round=2, seed=3)
    counts = dict.fromkeys(names, 0)
    for number in range(1, 601):
        for name in choose(names, rules, number):
            counts[name] += 1
    # 600 draws of 2 of 6: mean 200, sd about 11.5
    assert all(150 < count < 250 for count in counts.values())
    assert choose(names, Rules(rounds=1), 1) == names  # null asks all


def test_two_nodes_of_one_name_are_refused():
    grid = ScriptedGrid({"a": good(1.0), "b": good(1.0)})
    grid.names = dict.fromkeys(grid.names, "a")
    with pytest.raises(RunError, match="2 nodes have only 1 different names"):
        FedIT().run(grid, ServerState(START), Rules(rounds=1, clients=2))


def test_too_few_nodes_is_an_error_not_an_endless_wait(monkeypatch):
    monkeypatch.setattr(wire, "JOIN_DEADLINE_S", 0.1)
    with pytest.raises(RunError, match="1 of 3 clients joined"):
        FedIT().run(ScriptedGrid({"a": good(1.0)}), ServerState(START), Rules(rounds=1, clients=3))


# Bad replies ---------------------------------------------------------------------------------------------------------


def truncated(message: Message) -> RecordDict:
    adapter, task = PACKED.open(message.content)
    reply = PACKED.reply(adapter.select(task["uploads"]), {"num-examples": 10.0}, task["round"])
    reply["arrays"] = ArrayRecord({"adapter": Array(pack(adapter)[0][:-3])})
    return reply


BAD = {
    "missing key": (spoiled(lambda state: state.without(("B",))), "missing q/B"),
    "extra key": (spoiled(lambda state: state.replace({"q/C": torch.ones(1)})), "unexpected q/C"),
    "empty": (spoiled(lambda state: AdapterState({}, state.sites)), "missing q/A, q/B"),
    "misshapen": (spoiled(lambda state: state.replace({"q/B": torch.ones(3, 1)})), r"q/B has shape [3, 1], expected [3, 2]"),
    "transposed": (spoiled(lambda state: state.replace({"q/B": torch.ones(2, 3)})), r"q/B has shape [2, 3], expected [3, 2]"),
    "wrong dtype": (spoiled(lambda state: state.map(lambda value: value.double())), "dtype torch.float64"),
    "nan": (spoiled(with_value(math.nan)), "q/B has NaN or inf"),
    "inf": (spoiled(with_value(math.inf)), "q/B has NaN or inf"),
    "weight 0": (spoiled(lambda state: state, metrics={"num-examples": 0.0}), "num-examples is 0"),
    "weight negative": (spoiled(lambda state: state, metrics={"num-examples": -5.0}), "num-examples is -5"),
    "weight nan": (spoiled(lambda state: state, metrics={"num-examples": math.nan}), "num-examples is nan"),
    "weight inf": (spoiled(lambda state: state, metrics={"num-examples": math.inf}), "num-examples is inf"),
    "weight missing": (spoiled(lambda state: state, metrics={"train_loss": 1.0}), "no num-examples"),
    "stale": (spoiled(lambda state: state, round=0), "stale: an update of round 0, not 1"),
    "far": (spoiled(lambda state: state.map(lambda value: value + 1e4)), "run.max_update_norm"),
    "client error": (lambda message: Error(2, "CUDA out of memory"), "client error: CUDA out of memory"),
    "silent": (lambda message: None, "no reply before the deadline"),
    "no records": (raw(), "num-examples"),
    "no arrays": (raw(metrics=MetricRecord({"num-examples": 10})), "unreadable arrays"),
    "no manifest": (raw(metrics=MetricRecord({"num-examples": 10}), config=ConfigRecord({"task": "{}"}),
                        arrays=ArrayRecord({"adapter": Array(np.zeros(3, np.float32))})), "unreadable arrays"),
    "task is no mapping": (raw(metrics=MetricRecord({"num-examples": 10}), arrays=ArrayRecord({"adapter": Array(pack(START)[0])}),
                               config=ConfigRecord({"task": "3", "manifest": pack(START)[1]})), ""),
    "truncated array": (truncated, "unreadable arrays"),
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
        FedIT().run(ScriptedGrid({"a": BAD["nan"][0]}), ServerState(START), Rules(rounds=2, clients=1),
                    record=events.append, after_round=states.append)
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
    server = FedIT().run(Lossy({"a": good(2.0), "b": good(9.0)}), ServerState(START), Rules(rounds=1, clients=2, deadline_s=60),
                         record=events.append)
    assert time.monotonic() - began < 10
    assert events[0]["client"] == "b" and "no reply" in events[0]["reason"]
    torch.testing.assert_close(server.adapter["q/B"], torch.full((3, 2), 2.0))


# Evaluation on clients -----------------------------------------------------------------------------------------------


def test_client_evaluation_is_weighted_by_records():
    def client(step: float, count: float, accuracy: float) -> Reply:
        train = good(step)

        def reply(message: Message) -> RecordDict | Error:
            if message.metadata.message_type == "train":
                return train(message)
            if accuracy < 0:
                return Error(2, "no held-out records")
            return RecordDict({"metrics": MetricRecord({"num-examples": count, "accuracy": accuracy, "loss": 1.0})})

        return reply

    clients = {"a": client(1.0, 10, 1.0), "b": client(1.0, 30, 0.0), "c": client(1.0, 30, -1.0)}
    _, events, _ = run(clients, evaluate_clients=True)
    failed, evaluated, done = events
    assert failed["event"] == "evaluation_failed" and failed["client"] == "c" and "no held-out" in failed["reason"]
    assert list(evaluated["clients"]) == ["a", "b"]
    assert done["client_accuracy"] == pytest.approx(0.25) and done["client_loss"] == pytest.approx(1.0)


# In a stock Flower app -----------------------------------------------------------------------------------------------

NAMES = {"base_model.model.q.lora_A.weight": torch.ones(2, 4), "base_model.model.q.lora_B.weight": torch.zeros(3, 2)}


def initial_arrays() -> ArrayRecord:
    return ArrayRecord({name: Array(value.numpy()) for name, value in NAMES.items()})


def stock(step: dict[str, float], count: int = 10) -> Reply:
    """A stock client: loads arrays by name, adds step[factor], returns all of them."""

    def reply(message: Message) -> RecordDict:
        arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
        moved = {name: Array(value + np.float32(step.get(name.split(".")[-2], 0.0))) for name, value in arrays.items()}
        return RecordDict({"arrays": ArrayRecord(moved), "metrics": MetricRecord({"num-examples": count, "train_loss": 2.0})})

    return reply


def test_start_runs_in_a_stock_flower_app():
    clients = {"1": stock({"lora_A": 1.0, "lora_B": 1.0}, 10), "2": stock({"lora_A": 4.0, "lora_B": 4.0}, 30)}
    grid = ScriptedGrid(clients, {"1": 1, "2": 2})
    seen = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append((number, float(arrays["base_model.model.q.lora_B.weight"].numpy()[0, 0])))
        return MetricRecord({"accuracy": 0.1 * number})

    result = FedIT().start(grid, initial_arrays(), num_rounds=2, timeout=5, train_config=ConfigRecord({"lr": 0.1}),
                           evaluate_fn=evaluate)
    assert seen == [(0, 0.0), (1, 3.25), (2, 6.5)]
    assert set(result.arrays) == set(NAMES)
    np.testing.assert_allclose(result.arrays["base_model.model.q.lora_A.weight"].numpy(), np.full((2, 4), 7.5), rtol=1e-6)
    assert result.train_metrics_clientapp[2]["train_loss"] == 2.0
    assert result.evaluate_metrics_serverapp[2]["accuracy"] == pytest.approx(0.2)
    config = grid.sent["1"][1].content["config"]
    assert config["server-round"] == 2 and config["lr"] == 0.1


class FrozenA(FedIT):
    """B only."""

    trains = ("B", "head")


def test_start_quarantines_a_client_that_trained_a_frozen_factor(caplog):
    clients = {"1": stock({"lora_B": 1.0}), "2": stock({"lora_A": 1.0, "lora_B": 9.0})}
    result = FrozenA().start(ScriptedGrid(clients, {"1": 1, "2": 2}), initial_arrays(), num_rounds=1, timeout=5)
    assert np.array_equal(result.arrays["base_model.model.q.lora_A.weight"].numpy(), np.ones((2, 4), np.float32))
    assert np.array_equal(result.arrays["base_model.model.q.lora_B.weight"].numpy(), np.ones((3, 2), np.float32))
    assert "lora_A.weight was trained, but clients train only B" in caplog.text


@pytest.mark.parametrize("attribute", [{"changes_base": True}, {"keeps": ("B",)}])
def test_start_refuses_what_named_weights_cannot_say(attribute):
    strategy = type("Other", (FedIT,), attribute)()
    with pytest.raises(RunError, match="stock Flower app cannot apply it"):
        strategy.start(ScriptedGrid({"1": stock({})}), initial_arrays(), num_rounds=1)


@pytest.mark.parametrize("method", ["configure_train", "aggregate_train"])
def test_flowers_own_loop_is_refused(method):
    arguments = (1, initial_arrays(), ConfigRecord(), None) if method == "configure_train" else (1, [])
    with pytest.raises(RunError, match="run their own round"):
        getattr(FedIT(), method)(*arguments)
