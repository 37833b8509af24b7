"""A client accepts its own strategy's task and tensors only; everything else is refused by name."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch

from fedpeft.clients.asked import LARGEST, Own
from fedpeft.clients.policy import Refused
from fedpeft.config import Config, DataConfig, StrategyConfig
from fedpeft.foreign import BadMessage
from fedpeft.strategies.instructions import Drawn, Instructions, Lesson
from support import instructed
from support import small_models as small


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.adapted(small.save("bert", tmp_path_factory.mktemp("models") / "bert"), "bert")


@pytest.fixture(scope="module")
def state(model):
    return small.randomised(model)


def own(state, **strategy):
    return Own(Config(strategy=StrategyConfig(**strategy), data=DataConfig(clients=1)), state, None)


def honest(mine, done=0):
    server = replace(mine.start, round=done)
    return mine.strategy.broadcast(server, "a"), mine.strategy.instructions(server)


def refusal(mine, received, task):
    with pytest.raises(Refused) as caught:
        mine.accept("a", received, task, 0)
    return str(caught.value)


@pytest.mark.parametrize(
    "strategy",
    [
        {},
        {"name": "fedsa"},
        {"name": "rolora"},
        {"name": "fedsvd"},
        {"name": "fedex"},
        {"name": "fedsvd", "options": {"transport": "dense"}},
        {"name": "ffa_lora", "options": {"transport": "seed"}},
        {"wrap": ["scaffold"]},
        {"name": "fedprox"},
        {"name": "rolora", "wrap": ["scaffold"]},
        {"wrap": ["median"]},
        {"wrap": ["atp"]},
    ],
)
def test_what_the_own_strategy_sends_is_accepted_as_it_is(strategy, state):
    mine = own(state, **strategy)
    for done in range(3):
        received, task = honest(mine, done)
        accepted = mine.accept("a", received, task, done)
        assert accepted.sha256() == received.sha256() and accepted.sites == state.sites
        evaluated = mine.accept("a", received, replace(task, round=done), done)
        assert evaluated.sha256() == received.sha256()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": ["A"]}, "task: 'train' is not known. Did you mean 'trains'"),
        ({"prox_mu": 1e30}, "task: 'prox_mu' is not known"),
        ({"scaffold": True}, "task: 'scaffold' is not known"),
        ({"atp": {"eta": 0.1}}, "task: 'atp' is not known"),
        ({"trains": ["A", "R"]}, "task.trains=['A', 'R']: under strategy fedprox it may have A, B, head, each once"),
        ({"trains": "A"}, "task.trains='A': it must be a list of roles"),
        ({"trains": []}, "it may not be empty"),
        ({"trains": ["A", "A"]}, "each once"),
        ({"uploads": ["control"]}, "task.uploads=['control']"),
        ({"trains": ["A"], "uploads": ["B"]}, "task.uploads=['B']"),
        ({"keeps": ["B"]}, "task.keeps=['B']"),
        ({"uploads": [["A"]]}, "it must be a list of roles"),
        ({"x\x1b[31m" * 500: 1}, "is not known"),
    ],
)
def test_a_task_that_is_not_the_own_strategys_is_refused_by_name(change, words, state):
    mine = own(state, name="fedprox")
    received, task = honest(mine)
    with pytest.raises((Refused, BadMessage)) as caught:
        mine.accept("a", received, instructed.changed(task, **change), 0)
    said = str(caught.value)
    assert words in said and len(said) <= 2048 and "\x1b" not in said


def test_what_is_missing_in_a_task_is_named(state):
    mine = own(state)
    received, task = honest(mine)
    for key in ("trains", "uploads"):
        assert f"task.{key}=[]: it may not be empty" in refusal(mine, received, replace(task, **{key: ()}))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, "task.round="),
        ({"round": True}, "task.round=True"),
        ({"round": -1}, "task.round=-1"),
        ({"round": "1"}, "task.round='1'"),
        ({"round": 10**12}, f"task.round={10**12}"),
        ({"round": None}, "task.round=None"),
        ([], "task=[]: it must be a mapping of round, trains"),
        (None, "task=None: it must be a mapping of round, trains"),
        (3, "task=3: it must be a mapping of round, trains"),
    ],
)
def test_instructions_without_a_round_are_no_instructions(wrong, words):
    with pytest.raises(BadMessage) as caught:
        Instructions.from_json(wrong)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"static": ["A"]}, "task.static=['A']: it must be a mapping of roles, sha256"),
        ({"static": {"roles": ["A"], "sha256": "0"}}, "task.static.sha256='0'"),
        ({"static": {"roles": "A", "sha256": "0" * 64}}, "task.static.roles='A'"),
        ({"learn": [1]}, "task.learn=[1]: it must be a mapping of task, classes"),
        ({"learn": {"task": 0}}, "task.learn="),
        (
            {"learn": {"task": 0, "replay": False, "groups": [[0.5]], "classes": [0], "seen": [0], "compete": [0]}},
            "task.learn.groups=[0.5]",
        ),
        ({"learn": {"tasks": 0}}, "task.learn: 'tasks' is not known. Did you mean 'task'"),
        ({"sums": 3}, "task.sums=3"),
        ({"sums": ["head"]}, "task.sums="),
        ({"view": "../x"}, "task.view='../x'"),
        ({"view": 3}, "task.view=3"),
        ({"keeps": None}, "task.keeps=None"),
    ],
)
def test_values_of_another_kind_are_named_with_their_key(change, words):
    with pytest.raises(BadMessage) as caught:
        instructed.changed(Instructions(1), **change)
    assert words in str(caught.value)


def test_instructions_come_back_from_json_as_they_were():
    lesson = Lesson(1, (2, 3), (0, 1, 2, 3), (2, 3), True, ((0, 1), (2, 3)))
    told = Instructions(4, ("A",), ("A",), ("B",), Drawn(("A",), "0" * 64), lesson, "head", "online")
    assert Instructions.from_json(json.loads(json.dumps(told.to_json()))) == told
    assert all(getattr(told, item.name) != item.default for item in fields(told)), "a field that nobody looked at"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.nan, "not a number or above"),
        (torch.inf, "not a number or above"),
        (1e30, "not a number or above"),
        (-2 * LARGEST, "not a number or above"),
    ],
)
@pytest.mark.parametrize("role", ["A", "B", "head", "control"])
def test_values_that_no_training_comes_near_are_refused(role, value, words, state):
    mine = own(state, wrap=["scaffold"])
    received, task = honest(mine)
    key, tensor = next(
        (key, tensor.clone())
        for key, tensor in (*received.tensors.items(), *received.extra.items())
        if key.startswith("control:") == (role == "control") and role in ("control", received.role(key))
    )
    tensor.view(-1)[-1] = value
    changed = received.beside({key: tensor}) if role == "control" else received.replace({key: tensor})
    said = refusal(mine, changed, task)
    assert key in said and words in said


@pytest.mark.parametrize("change", ["flat", "short", "empty", "scalar", "half", "whole numbers", "missing"])
def test_tensors_of_another_form_are_refused_by_name(change, state):
    mine = own(state)
    received, task = honest(mine)
    key = next(iter(received.select(("A",)).tensors))
    value = received[key]
    changed = {
        "flat": value.flatten(),
        "short": value[:1],
        "empty": torch.zeros(0),
        "scalar": torch.zeros(()),
        "half": value.half(),
        "whole numbers": value.long(),
    }
    tensors = {**received.tensors, key: changed.get(change)}
    if change == "missing":
        del tensors[key]
    said = refusal(mine, replace(received, tensors=tensors), task)
    assert (
        key in said
        and ("missing" if change == "missing" else "dtype" if change in ("half", "whole numbers") else "shape") in said
    )


@pytest.mark.parametrize("name", ["residual_B", "residual_A", "M", "R", "C"])
def test_tensors_of_another_strategys_roles_are_refused_by_name(name, state):
    mine = own(state)
    received, task = honest(mine)
    key = f"{state.lora_sites()[0]}/{name}"
    said = refusal(mine, received.replace({key: torch.ones(4, 4)}), task)
    assert f"{key}: strategy fedit sends no such tensor" in said
    for extra in ("control:x/A", "rates:x/A", "mean:features", "", "../../x/A"):
        assert "sends no such tensor" in refusal(mine, received.replace({extra: torch.ones(1)}), task)
        assert "sends no such tensor beside" in refusal(mine, received.beside({extra: torch.ones(1)}), task)


def test_what_travels_beside_the_adapter_is_what_the_own_strategy_sends_there(state):
    mine = own(state, wrap=["scaffold"])
    received, task = honest(mine)
    key = next(iter(received.extra))
    value = received.extra[key]
    for wrong, words in ((value[:1], "has shape"), (value.half(), "dtype"), (None, "is missing")):
        extra = {name: tensor for name, tensor in received.extra.items() if name != key}
        said = refusal(mine, replace(received, extra=extra if wrong is None else {**extra, key: wrong}), task)
        assert key in said and words in said
    plain = own(state)
    assert "beside the adapter" in refusal(plain, received, honest(plain)[1])


def test_a_residual_comes_in_pairs_of_the_sites_shape_and_within_bounds(model, state):
    mine = own(state, name="fedex")
    received, task = honest(mine)
    good = small.with_residual(received)
    assert mine.accept("a", good, task, 0).sha256() == good.sha256()
    site = state.lora_sites()[0]
    B, A = (good[f"{site}/residual_{role}"] for role in "BA")
    for wrong in (
        {"B": B.T.contiguous()},
        {"B": B[:, :0], "A": A[:0]},
        {"B": B[:, :2]},
        {"B": torch.zeros(())},
        {"B": B.repeat(1, 9), "A": A.repeat(9, 1)},
    ):
        told = good.replace({f"{site}/residual_{role}": value for role, value in wrong.items()})
        assert f"{site}/residual_" in refusal(mine, told, task)
    assert "1e+09" in refusal(mine, good.replace({f"{site}/residual_A": A * 1e30}), task)
    alone = replace(good, tensors={key: value for key, value in good.tensors.items() if key != f"{site}/residual_A"})
    assert "both or neither" in refusal(mine, alone, task)


def test_sums_are_asked_for_with_their_own_keys(state):
    mine = own(state)
    task = Instructions(1, sums="head", view="online")
    assert mine.accept_sums(state, task).sha256() == state.sha256()
    for wrong, words in (
        ({"sums": "all"}, "task.sums='all'"),
        ({"view": "../../x"}, "task.view"),
        ({"view": None}, "task.view"),
        ({"trains": ["A"]}, "task.trains"),
        ({"sums": None}, "task.sums="),
    ):
        with pytest.raises((Refused, BadMessage)) as caught:
            mine.accept_sums(state, instructed.changed(task, **wrong))
        assert words in str(caught.value)
