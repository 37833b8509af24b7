"""How far each update went beside the others, who is named for it, and what robust rules say that they did to whom."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from fedpeft.state import AdaptedLayer, AdapterState, ServerState, Update
from fedpeft.strategies import round_facts
from fedpeft.strategies.wrappers.client_dp import ClientDP
from support.handmade import make
from support.scripted import START, good, run

pytestmark = pytest.mark.usefixtures("flower_run")
SITES = {"q": AdaptedLayer("lora", (3, 4))}


def updates_of(moves: dict[str, np.ndarray]) -> tuple[dict[str, AdapterState], list[Update]]:
    """Clients that were sent ones and moved by these [2, 4] values of A."""
    sent = AdapterState({"q/A": torch.ones(2, 4)}, SITES)
    return dict.fromkeys(moves, sent), [
        Update(name, 1.0, AdapterState({"q/A": torch.ones(2, 4) + torch.tensor(move, dtype=torch.float32)}, SITES))
        for name, move in moves.items()
    ]


def random_moves(count: int, **more: np.ndarray) -> dict[str, np.ndarray]:
    draws = np.random.default_rng(0)
    return {**{f"c{index}": draws.normal(size=(2, 4)) for index in range(count)}, **more}


def test_norms_and_distances_to_the_median_are_those_of_numpy():
    moves = random_moves(5, loud=np.full((2, 4), 500.0))
    facts = round_facts.of_single(*updates_of(moves), ["A"])
    stacked = np.stack([move.ravel() for move in moves.values()])
    assert list(facts["update_norms"].values()) == pytest.approx(np.linalg.norm(stacked, axis=1).tolist(), rel=1e-4)
    wanted = np.linalg.norm(stacked - np.median(stacked, axis=0), axis=1)
    assert list(facts["update_distances"].values()) == pytest.approx(wanted.tolist(), rel=1e-4)
    others = np.median(np.linalg.norm(stacked[:5], axis=1))
    assert facts["far_updates"] == {"loud": pytest.approx(500 * 8**0.5 / others, rel=1e-4)}


def test_a_turned_update_has_a_common_norm_and_stands_out_by_its_distance():
    one = np.linspace(1, 2, 8).reshape(2, 4)
    facts = round_facts.of_single(*updates_of({"a": one, "b": 1.01 * one, "c": 0.99 * one, "turned": -one}), ["A"])
    assert facts["far_updates"] == {}
    distances = facts["update_distances"]
    assert distances["turned"] > 50 * max(distances[name] for name in "abc")


def test_columns_taken_in_pieces_give_the_same_distances(monkeypatch):
    sent, updates = updates_of(random_moves(6))
    whole = round_facts.of_single(sent, updates, ["A"])
    monkeypatch.setattr(round_facts, "VALUES", 18)  # three columns of six clients
    assert round_facts.of_single(sent, updates, ["A"]) == whole


@pytest.mark.parametrize(
    ("norms", "named"),
    [
        ({"a": 1.0, "b": 1.0, "c": 9.9}, {}),
        ({"a": 1.0, "b": 1.0, "c": 10.1}, {"c": 10.1}),
        ({"a": 1.0, "b": 1000.0}, {"b": 1000.0}),  # of two, the others' median is the other
        ({"a": 0.0, "b": 0.0, "c": 0.5}, {"c": None}),
        ({"a": 0.0, "b": 0.0}, {}),
        ({"a": 5.0}, {}),
        ({"a": 1.0, "b": 1.0, "c": 1.0, "d": 50.0, "e": 80.0}, {"d": 50.0, "e": 80.0}),
    ],
)
def test_who_is_far_is_measured_against_the_others(norms, named):
    assert round_facts.far(norms) == named


def test_unequal_shapes_have_norms_and_no_distances():
    sent, updates = updates_of(random_moves(2))
    small = AdapterState({"q/A": torch.zeros(1, 4)}, SITES)
    sent["small"] = AdapterState({"q/A": torch.ones(1, 4)}, SITES)
    facts = round_facts.of_single(sent, [*updates, Update("small", 1.0, small)], ["A"])
    assert facts["update_distances"] == {} and facts["update_norms"]["small"] == 2.0


def test_the_round_records_and_names_a_loud_client_once(caplog):
    clients = {"a": good(1.0), "b": good(1.1), "c": good(0.9), "loud": good(4000.0)}
    with caplog.at_level(logging.WARNING, logger="fedpeft"):
        _, events, _ = run(clients, rounds=2)
    rounds = [event for event in events if event["event"] == "round"]
    assert all(list(event["far_updates"]) == ["loud"] and "treated" not in event for event in rounds)
    assert rounds[0]["update_norms"]["a"] == pytest.approx(START.parameters**0.5, rel=1e-4)
    lines = [record.message for record in caplog.records if "loud" in record.message]
    assert len(lines) == 1 and "is 4000 times as long as the others' median" in lines[0]


def treated(wrap: str, moves: dict[str, np.ndarray], **options: float) -> dict[str, str]:
    strategy, (_, updates) = make("ffa_lora", wrap, **options), updates_of(moves)
    updates = [Update(one.client, 1.0, AdapterState({"q/B": one.adapter["q/A"]}, SITES)) for one in updates]
    start = {"q/A": torch.ones(4, 4), "q/B": torch.ones(2, 4)}
    strategy.aggregate(ServerState(AdapterState(start, SITES)), updates)
    return strategy.treatments()


@pytest.mark.parametrize(
    ("wrap", "options", "words"),
    [
        ("trimmed_mean", {"fraction": 0.2}, "trimmed in 100 % of its values"),
        ("median", {}, "trimmed in 100 % of its values"),
        ("norm_clip", {"bound": 20.0}, "clipped to 1.41 % of its length"),
        ("krum", {"keep": 5}, "not selected"),
    ],
)
def test_robust_rules_name_whom_they_left_out(wrap, options, words):
    draws = np.random.default_rng(0).normal(size=(6, 2, 4))
    found = treated(
        wrap, {**{f"c{index}": move for index, move in enumerate(draws)}, "loud": np.full((2, 4), 500.0)}, **options
    )
    assert found["loud"] == words
    if wrap != "median":  # which uses one value of seven: others may hardly count either
        assert len(found) == (2 if wrap == "krum" else 1)


def test_values_that_all_clients_share_are_cut_from_nobody():
    moves = {f"c{index}": np.r_[np.zeros(7), index].reshape(2, 4) for index in range(5)}
    assert treated("trimmed_mean", moves, fraction=0.2) == {
        "c0": "trimmed in 100 % of its values",
        "c4": "trimmed in 100 % of its values",
    }
    assert treated("trimmed_mean", dict.fromkeys("abcde", np.ones((2, 4))), fraction=0.2) == {}
    assert treated("trimmed_mean", {"a": np.ones((2, 4)), "b": np.zeros((2, 4))}, fraction=0.2) == {}  # nothing cut


def test_a_server_that_must_not_say_what_it_sees_says_nothing():
    sent, updates = updates_of(random_moves(3))
    assert ClientDP.facts(None, None, sent, updates) == {}
    assert round_facts.of_single(sent, [Update("all clients", 1.0, updates[0].adapter)], ["A"]) == {}
    assert round_facts.told(1, {}, {"c0": "not selected"}, set()) == {}


def test_a_median_leaves_its_values_in_their_order():
    for shape in ((5,), (6,), (6, 3), (5, 2, 2)):
        values = torch.randn(shape, dtype=torch.float64)
        before = values.clone()
        ordered = values.sort(dim=0).values
        middle = (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2
        assert torch.equal(round_facts.coordinate_median(values), middle) and torch.equal(values, before)
