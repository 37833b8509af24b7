"""Bodies that train full weights, LoRAs or norms in place: their equations against hand-sized numbers."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from fedpeft import config as configs
from fedpeft.continual import stream as streams
from fedpeft.continual.body import Body, TrainConfig, make_leaf
from fedpeft.continual.learner import Learner
from fedpeft.continual.parts import forms
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from support.full_weight_parts import (
    BODIES,
    CASES,
    WIDTH,
    bare,
    drawn,
    flat,
    learner,
    made,
    plastic,
    records,
    three_tasks,
)

# Every body -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_run_that_goes_on_from_a_file_equals_one_that_was_never_stopped(name, number, tmp_path):
    whole, saved = learner(name, BODIES[name][number]), []
    whole.save = lambda path: saved.append(copy.deepcopy(whole.state()))
    whole.run(tmp_path / "none", every=1)
    places = [(state["task"], state["step"]) for state in saved]
    expected = whole.state()
    expected.pop("ledger")  # seconds
    for place in ((0, 2), (0, 6), (1, 0), (1, 3)):  # in mid-task, before and after a task's end
        torch.save(saved[places.index(place)], tmp_path / "state")
        rest = learner(name, BODIES[name][number])
        rest.resume(tmp_path / "state")
        found = rest.run().state()
        found.pop("ledger")
        assert flat(found) == flat(expected), place


@pytest.mark.parametrize(("name", "number"), CASES)
def test_the_base_stays_runs_repeat_and_rows_do_not_depend_on_each_other(name, number):
    run = learner(name, BODIES[name][number])
    before = {key: value.clone() for key, value in run.model.base.backbone.state_dict().items()}
    start = run.run(stop=1).body.parameters
    start = {key: value.detach().clone() for key, value in start.items()}
    run.run()
    assert any(not torch.equal(value, start[key]) for key, value in run.body.parameters.items())
    assert all(torch.equal(value, before[key]) for key, value in run.model.base.backbone.state_dict().items())
    again = learner(name, BODIES[name][number]).run()
    assert run.right == again.right
    assert all(torch.equal(value, again.body.parameters[key]) for key, value in run.body.parameters.items())
    inputs = records([0, 1, 2, 3, 4, 5]).inputs
    together = run.scores("linear", inputs)
    alone = torch.cat([run.scores("linear", {"x": inputs["x"][row : row + 1]}) for row in range(6)])
    assert torch.allclose(together, alone, atol=1e-5)


# EWC and LwF ----------------------------------------------------------------------------------------------------------


def test_ewc_importance_and_pull():
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1])
    body = made("ewc", bare(), Encoded({"x": x}, labels), lam=4.0, decay=0.5)
    V = torch.tensor([[1.0, 0.0], [0.5, -1.0]])
    body.classifier.weight.data, body.classifier.bias.data = V, torch.tensor([0.1, 0.0])
    W = torch.tensor([[0.2, 0.0], [0.1, -0.3]])
    body.parameters["0/W"].data = W.clone()
    assert body.penalty({"x": x}, labels, x, body.classifier) is None
    squares = torch.zeros(2, 2)
    for row, label in zip(x, labels, strict=True):  # dL/dW = V^T (p - y) x^T
        p = (V @ ((torch.eye(2) + W) @ row) + torch.tensor([0.1, 0.0])).softmax(0)
        squares += torch.outer(V.T @ (p - torch.eye(2)[label]), row) ** 2
    found = body.statistics(body.records())
    assert torch.allclose(found["0/W/F"].float(), squares, rtol=1e-4)
    body.end_task(found)
    F = body.memory["statistics"]["0/W/F"]
    assert torch.allclose(F, squares / squares.mean(), rtol=1e-4) and float(F.mean()) == pytest.approx(1)
    moved = torch.tensor([[0.5, 0.0], [0.0, -0.1]])
    body.parameters["0/W"].data = W + moved
    penalty = body.penalty({"x": x}, labels, x, body.classifier)
    assert penalty.item() == pytest.approx(float(2.0 * (squares / squares.mean() * moved**2).sum()), rel=1e-4)
    body.end_task({"0/W/F": torch.tensor([[4.0, 0.0], [0.0, 0.0]], dtype=torch.float64)})
    assert torch.allclose(body.memory["statistics"]["0/W/F"], F / 2 + torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(body.memory["adapters"]["0/W/anchor"], W + moved)


def test_ewc_of_no_gradient_pulls_nowhere():
    body = made("ewc", bare(), records([0, 0], 2), classes=(0,))  # one class: every prediction is certain
    body.end_task(body.statistics(body.records()))
    assert not body.memory["statistics"]["0/W/F"].any()


def test_ewc_holds_where_it_pulls_hard():
    free, held = (learner("ewc", {"lam": lam}).run() for lam in (0.0, 1e5))
    first = learner("ewc", {"lam": 0.0}).run(stop=6).body.parameters["0/W"]
    plain = learner("sequential", {}).run().body.parameters["0/W"]
    assert torch.equal(free.body.parameters["0/W"], plain)
    important = held.body.memory["statistics"]["0/W/F"] > 1
    far, near = ((run.body.parameters["0/W"] - first)[important].norm() for run in (free, held))
    assert near < far / 2


def test_lwf_keeps_old_scores_and_nothing_else():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    data = Encoded({"x": x}, torch.tensor([0, 1]))
    body = made("lwf", bare(classes=3), data, lam=2.0, temperature=2.0)
    body.classifier.weight.data = torch.tensor([[2.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
    body.classifier.bias.data.zero_()
    assert body.penalty(data.inputs, data.labels, x, body.classifier) is None
    body.end_task({})
    assert body.penalty(data.inputs, data.labels, x, body.classifier).item() == pytest.approx(0, abs=1e-6)
    body.feed(1, streams.Task("task-1", (2,), data, data), [0, 1, 2])
    body.start()
    body.classifier.weight.data[:2] = 0  # new scores are even, the old were (2, 0) and (0, 2): softmax of (1, 0)
    p = 1 / (1 + math.exp(-1))
    kl = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    new = x.clone().requires_grad_(True)
    penalty = body.penalty(data.inputs, data.labels, new, body.classifier)
    assert penalty.item() == pytest.approx(2.0 * 4.0 * kl, rel=1e-5)
    body.classifier.weight.data[2] = -7  # a new class has no part in it
    assert body.penalty(data.inputs, data.labels, x, body.classifier).item() == pytest.approx(penalty.item())
    body.parameters["0/W"].data[0, 0] += 5  # nor has the present body in the old scores
    assert body.penalty(data.inputs, data.labels, x, body.classifier).item() == pytest.approx(penalty.item())
    gradient = torch.autograd.grad(body.penalty(data.inputs, data.labels, x, body.classifier), body.classifier.weight)
    assert gradient[0][:2].abs().sum() > 0 and not gradient[0][2].any()


# Replay ---------------------------------------------------------------------------------------------------------------


def test_the_reservoir_holds_every_record_with_the_same_probability():
    def held(seed: int) -> list[int]:
        body: Body = configs.method(
            "bodies", "er", {"capacity": 5}, "body", model=bare(), seed=seed, train=TrainConfig()
        )
        for index, rows in enumerate((range(0, 3), range(3, 12), range(12, 20))):
            data = Encoded({"x": torch.zeros(len(rows), 2)}, torch.tensor(list(rows)))
            body.feed(index, streams.Task("", (0,), data, data), [0])
            body.end_task({})
            assert len(body.memory["raw"]["labels"]) == min(5, rows.stop)
        return body.memory["raw"]["labels"].tolist()

    runs = [held(seed) for seed in range(400)]
    assert all(len(set(labels)) == 5 for labels in runs)
    late = np.mean([label >= 12 for labels in runs for label in labels])
    assert late == pytest.approx(8 / 20, abs=0.04)
    share = np.bincount(np.concatenate(runs), minlength=20) / 400
    assert np.abs(share - 0.25).max() < 4.5 * math.sqrt(0.25 * 0.75 / 400)


def test_a_batch_is_the_new_records_and_then_old_ones_from_the_memory():
    data = records([0, 1] * 6)
    body = made("er", plastic(), data, capacity=6, replay=3)
    _, labels = body.batch(1)
    assert labels.tolist() == data.labels[torch.tensor(body.order(1))].tolist()
    body.end_task({})
    new = records([2, 3] * 6, seed=1)
    body.feed(1, streams.Task("task-1", (2, 3), new, new), [0, 1, 2, 3])
    body.start()
    drawn_rows = set()
    for number in range(3):
        inputs, labels = body.batch(number)
        assert torch.equal(inputs["x"][:4], new.inputs["x"][torch.tensor(body.order(number))])
        assert len(labels) == 7 and set(labels[4:].tolist()) <= {0, 1}
        kept = [tuple(row) for row in body.memory["raw"]["inputs"]["x"].tolist()]
        old = [tuple(row) for row in inputs["x"][4:].tolist()]
        assert len(set(old)) == 3 and set(old) <= set(kept)
        drawn_rows |= set(old)
    assert len(drawn_rows) > 3


def test_joint_trains_on_all_records_so_far_once_an_epoch():
    run = learner("joint", {})
    run.run(stop=7)
    body, tasks = run.body, run.stream.tasks
    assert body.per_epoch() == 5 and body.steps() == 10 and len(body.records()) == 20
    rows = torch.cat([body.batch(number)[0]["x"] for number in range(5)]).tolist()
    assert sorted(rows) == sorted(torch.cat([task.train.inputs["x"] for task in tasks[:2]]).tolist())
    run.run()
    assert run.ledger[-1]["stored_bytes"]["raw"] == 30 * (4 * WIDTH + 8)


def test_replay_and_joint_training_remember_more_than_going_on_does():
    def first(name: str) -> int:
        train = TrainConfig(epochs=10, batch_size=4, lr=0.02, head_lr=0.05)
        return Learner(three_tasks(), plastic(), name, {"masked": {}}, train, 0).run().right["masked"][-1][0]

    plain, replay, joint = first("sequential"), first("er"), first("joint")
    assert plain <= 1 and replay >= plain + 3 and joint >= plain + 3


# CLASSP and first-session adaptation ----------------------------------------------------------------------------------


def test_classp_by_hand_over_two_steps():
    body = made("classp", bare(), records([0, 1], 2), lr=0.5, threshold=0.25, power=1.0, eps=1.0)
    for G in ([[1.0, 0.5], [-2.0, 0.1]], [[3.0, 0.6], [0.0, 0.0]]):
        body.parameters["0/W"].grad = torch.tensor(G)
        body.step()
    a = body.memory["statistics"]["0/W/a"]
    assert torch.allclose(a, torch.tensor([[4.0, 0.6], [2.0, 0.0]]))  # .5^2 is not above .25
    W = torch.tensor([[-0.5 * (1 / 2 + 3 / 5), -0.5 * 0.6 / 1.6], [0.5 * 2 / 3, 0.0]])
    assert torch.allclose(body.parameters["0/W"], W)
    body.feed(1, body.current(), [0, 1])
    body.start()
    assert torch.equal(body.memory["statistics"]["0/W/a"], a)


def test_classp_is_adagrad_without_threshold_at_power_two():
    body = made("classp", bare(), records([0, 1], 2), lr=0.1, threshold=0.0, power=2.0, eps=1e-12)
    other = make_leaf(torch.zeros(2, 2))
    adagrad = torch.optim.Adagrad([other], lr=0.1)
    for t in range(5):
        body.parameters["0/W"].grad, other.grad = drawn(2, 2, seed=t), drawn(2, 2, seed=t)
        body.step()
        adagrad.step()
    assert torch.allclose(body.parameters["0/W"], other, atol=1e-5)


@pytest.mark.parametrize("form", ["full", "lora", "film"])
def test_first_session_adaptation_learns_in_the_first_task_only(form):
    run = learner("fsa", {"form": form})
    run.run(stop=1)
    start = {key: value.detach().clone() for key, value in run.body.parameters.items()}
    run.run(stop=5)
    first = {key: value.detach().clone() for key, value in run.body.parameters.items()}
    weight = run.classifier.weight.detach().clone()
    assert any(not torch.equal(first[key], start[key]) for key in start)
    run.run()
    assert all(torch.equal(value, first[key]) for key, value in run.body.parameters.items())
    assert not torch.equal(run.classifier.weight, weight)
    roles = {"full": {"W"}, "lora": {"A", "B"}, "film": {"g", "b"}}[form]
    assert {key.rpartition("/")[2] for key in first} == roles


def test_film_is_what_training_the_norms_own_gain_and_shift_is():
    model = plastic()
    norm = model.base.layer("1")
    norm.weight.data, norm.bias.data = drawn(WIDTH, seed=2), drawn(WIDTH, seed=3)
    g, b = drawn(WIDTH, seed=4), drawn(WIDTH, seed=5)
    x = {"x": drawn(7, WIDTH)}
    found = model.features(x, forms.change(model, {"1/g": g, "1/b": b}))
    norm.weight.data, norm.bias.data = (1 + g) * norm.weight, (1 + g) * norm.bias + b
    assert torch.allclose(found, model.features(x), atol=1e-5) and forms.norms(model) == {"1": WIDTH}
    y = drawn(2, 3, 4, 4)
    moved = forms.modulate(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 5.0]), True)(y, y)
    assert torch.equal(moved[:, 0], y[:, 0]) and torch.equal(moved[:, 1], 2 * y[:, 1])
    assert torch.equal(moved[:, 2], y[:, 2] + 5)


def test_film_needs_a_norm():
    with pytest.raises(InputError, match=r"body.form=film: Sequential has no normalisation layers"):
        made("fsa", bare(), records([0, 1], 2), form="film")
