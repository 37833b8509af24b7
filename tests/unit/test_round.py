"""The round of strategies/base.py against a grid of scripted clients: who is chosen, what is computed, and when."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict

from fedpeft import packing
from fedpeft.clients import app
from fedpeft.errors import RunError
from fedpeft.state import Rules, RunContext, ServerState
from fedpeft.strategies import wire
from fedpeft.strategies.base import choose_clients
from fedpeft.strategies.instructions import Instructions
from fedpeft.strategies.rules.fedit import FedIT
from fedpeft.strategies.wire import PACKED
from support.scripted import START, Reply, ScriptedGrid, good, run

pytestmark = pytest.mark.usefixtures("flower_run")

# What a good round does ----------------------------------------------------------------------------------------------


def test_the_mean_is_weighted_by_examples():
    server, _, _ = run({"a": good(1.0, 10), "b": good(4.0, 30)})
    expected = (10 * 1.0 + 30 * 4.0) / 40  # 3.25
    assert server.round == 1
    torch.testing.assert_close(server.adapter["q/B"], torch.full((3, 2), expected))
    torch.testing.assert_close(server.adapter["q/A"], torch.full((2, 4), 1 + expected))


def test_uniform_weighting_ignores_the_counts():
    strategy = FedIT(context=RunContext(weighting="uniform"))
    server, _, _ = run({"a": good(1.0, 10), "b": good(4.0, 30)}, strategy)
    torch.testing.assert_close(server.adapter["q/B"], torch.full((3, 2), 2.5))


def test_rounds_build_on_each_other_and_carry_their_number():
    server, events, grid = run({"a": good(1.0)}, rounds=3)
    torch.testing.assert_close(server.adapter["q/B"], torch.full((3, 2), 3.0))
    roles = ("A", "B", "head")
    assert [PACKED.open(message.content)[1] for message in grid.sent["a"]] == [
        Instructions(number, trains=roles, uploads=roles) for number in (1, 2, 3)
    ]
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
    """What only some sent is the mean of theirs; no client says what the event says of the round or the model."""
    alone = {"extra": 9.0, "accuracy": 1.0, "round": 7.0, "quarantined": 3.0}
    _, events, _ = run({"a": good(1.0, 10, train_loss=1.0), "b": good(1.0, 30, train_loss=2.0, **alone)})
    (event,) = events
    assert (event["event"], event["round"], event["clients"], event["quarantined"]) == ("round", 1, ["a", "b"], {})
    assert event["train_loss"] == pytest.approx((10 * 1.0 + 30 * 2.0) / 40)
    assert (event["train_extra"], event["train_accuracy"]) == (9.0, 1.0) and "accuracy" not in event
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

    strategy.run(
        grid,
        ServerState(START),
        Rules(rounds=3, clients=2, evaluate_every=2),
        evaluate=evaluate,
        record=lambda event: calls.append(("record", event["round"], event.get("accuracy"))),
        after_round=lambda server: calls.append(("after_round", server.round)),
    )
    assert calls == [
        ("before_round", 0),
        ("aggregate", 0, ["a", "b"]),
        ("record", 1, None),
        ("after_round", 1),
        ("before_round", 1),
        ("aggregate", 1, ["a", "b"]),
        ("evaluate", 2),
        ("record", 2, 2.5),
        ("after_round", 2),
        ("before_round", 2),
        ("aggregate", 2, ["a", "b"]),
        ("evaluate", 3),
        ("record", 3, 3.5),
        ("after_round", 3),
    ]


def test_rounds_called_one_by_one_are_evaluated_as_in_one_call():
    rules, evaluated = Rules(rounds=5, clients=2, evaluate_every=3), []
    grid = ScriptedGrid({"a": good(1.0), "b": good(2.0)})

    def evaluate(server):
        evaluated.append(server.round)
        return {"accuracy": 0.5}

    whole = FedIT().run(grid, ServerState(START), rules, evaluate=evaluate)
    server = ServerState(START)
    for number in range(1, 6):
        server = FedIT().run(grid, server, rules, stop=number, evaluate=evaluate)
        assert server.round == number
    assert evaluated == [3, 5, 3, 5] and server.adapter.sha256() == whole.adapter.sha256()


def test_only_trained_roles_are_expected_and_changed():
    server, _, _ = run({"a": good(1.0)}, Staged([]))
    assert torch.equal(server.adapter["q/A"], START["q/A"])
    torch.testing.assert_close(server.adapter["q/B"], torch.ones(3, 2))


# The choice of clients -----------------------------------------------------------------------------------------------


def test_what_clients_are_sent_alike_is_packed_once_and_each_has_records_of_its_own(monkeypatch):
    calls = []
    monkeypatch.setattr(wire, "pack_state", lambda state: calls.append(state) or packing.pack_state(state))
    other = replace(START, sites={name: replace(site, scaling=9.0) for name, site in START.sites.items()})
    moved = START.map(lambda value: value + 1)
    sent = {"a": START, "b": START.select(["A", "B", "head"]), "c": other, "d": moved}
    made = wire.contents(PACKED, sent, Instructions(1))
    assert len(calls) == 3  # a and b are the same tensors; c is scaled otherwise, d has other values
    assert made["a"] == made["b"] == PACKED.content(START, Instructions(1)) != made["d"]
    assert all(PACKED.open(made[name])[0].sites == state.sites for name, state in sent.items())
    assert app.identity_of(made["a"]) == app.identity_of(made["b"])
    assert len({app.identity_of(content) for content in made.values()}) == 3
    made["a"].config_records["config"]["task"] = "{}"
    assert made["b"] == PACKED.content(START, Instructions(1))
    assert app.identity_of(made["a"]) != app.identity_of(made["b"])


def test_an_array_that_says_that_its_bytes_are_others_is_not_the_same_message():
    content = PACKED.content(START, Instructions(1))
    array = content.array_records["arrays"]["adapter"]
    changed = RecordDict(
        {**content, "arrays": ArrayRecord({"adapter": Array("int32", array.shape, array.stype, array.data)})}
    )
    assert app.identity_of(content) != app.identity_of(changed)


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
        for name in choose_clients(names, rules, number):
            counts[name] += 1
    # 600 draws of 2 of 6: mean 200, sd about 11.5
    assert all(150 < count < 250 for count in counts.values())
    assert choose_clients(names, Rules(rounds=1), 1) == names  # null asks all


def test_two_nodes_of_one_name_are_refused():
    grid = ScriptedGrid({"a": good(1.0), "b": good(1.0)})
    grid.names = dict.fromkeys(grid.names, "a")
    with pytest.raises(RunError, match="nodes 100 and 101 both say that they are a"):
        FedIT().run(grid, ServerState(START), Rules(rounds=1, clients=2))


def test_too_few_nodes_is_an_error_not_an_endless_wait(monkeypatch):
    monkeypatch.setattr(wire, "JOIN_DEADLINE_S", 0.1)
    with pytest.raises(RunError, match="1 of 3 clients joined"):
        FedIT().run(ScriptedGrid({"a": good(1.0)}), ServerState(START), Rules(rounds=1, clients=3))


# Evaluation on clients -----------------------------------------------------------------------------------------------


def test_client_evaluation_is_weighted_by_records(monkeypatch):
    def client(step: float, count: float, accuracy: float) -> Reply:
        train = good(step)

        def reply(message: Message) -> RecordDict | Error:
            if message.metadata.message_type == "train":
                return train(message)
            if accuracy < 0:
                return Error(2, "no held-out records")
            defined = {"f1": 0.5} if accuracy else {}
            scores = {"num-examples": count, "accuracy": accuracy, "loss": 1.0, **defined}
            return RecordDict({"metrics": MetricRecord(scores)})

        return reply

    clients = {"a": client(1.0, 10, 1.0), "b": client(1.0, 30, 0.0), "c": client(1.0, 30, -1.0)}
    packed = []
    monkeypatch.setattr(wire, "pack_state", lambda state: packed.append(state) or packing.pack_state(state))
    _, events, _ = run(clients, evaluate_clients=True)
    assert len(packed) == 2 + 3  # once to train and once to evaluate, not once for each of three; and their replies
    failed, evaluated, done = events
    assert failed["event"] == "evaluation_failed" and failed["client"] == "c" and "no held-out" in failed["reason"]
    assert list(evaluated["clients"]) == ["a", "b"]
    assert done["client_accuracy"] == pytest.approx(0.25) and done["client_loss"] == pytest.approx(1.0)
    assert done["client_f1"] == 0.5  # of the one whose records define it
