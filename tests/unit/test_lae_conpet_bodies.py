"""LAE's experts, and both ConPETs: their equations against hand-sized numbers and slow references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedpeft.continual.bodies import conpet, lae
from fedpeft.continual.body import TrainConfig
from fedpeft.continual.model import low_rank
from fedpeft.continual.parts import replay
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from support.lora_parts import begun, learner, move, same, stepped

pytestmark = pytest.mark.usefixtures("seeded")

# LAE ------------------------------------------------------------------------------------------------------------------


def test_offline_expert_is_the_closed_form_average():
    """Also over the frozen steps: in task 2 it goes on towards the online expert, which stands still."""
    one = stepped(learner("lae", {"r": 2, "frozen_epochs": 1, "retention": 0.3}), tasks=1)
    assert set(one.body.views()) == {"online"} and not one.body.memory["adapters"]
    offline = {key: value.detach().double().clone() for key, value in one.body.parameters.items()}
    for task in (1, 2):
        start = {key: value.detach().double().clone() for key, value in one.body.parameters.items()}
        steps, frozen, trail = begun(one).body.steps(), one.body.per_epoch(), []
        for _ in range(steps):
            move(one, 1)
            trail.append({key: value.detach().double().clone() for key, value in one.body.parameters.items()})
        assert set(one.body.views()) == {"online", "offline"}
        assert all(same(trail[step], start) for step in range(frozen)) and not same(trail[frozen], start)
        a = 0.3 ** (1 / steps)
        for key in start:
            new = sum(a ** (steps - 1 - step) * (1 - a) * trail[step][key] for step in range(steps))
            expected = a**steps * offline[key] + new
            found = one.body.memory["adapters"][f"offline/{key}"].double()
            assert torch.allclose(found, expected, atol=1e-6), (task, key)
            offline[key] = found.clone()
        stepped(one, tasks=task + 1)


@pytest.mark.parametrize("retention", [0.0, 1.0])
def test_extremes_of_retention(retention):
    one = stepped(learner("lae", {"r": 2, "frozen_epochs": 0, "retention": retention}), tasks=1)
    first = {key: value.detach().clone() for key, value in one.body.parameters.items()}
    one.run()
    offline = {key.removeprefix("offline/"): value for key, value in one.body.memory["adapters"].items()}
    online = {key: value.detach() for key, value in one.body.parameters.items()}
    assert same(offline, online if retention == 0 else first) and not same(online, first)


def test_ensemble_takes_the_surer_view_and_keeps_unseen_out():
    scores = {"online": torch.tensor([[1.0, 0.0, -math.inf]]), "offline": torch.tensor([[0.0, 3.0, -math.inf]])}
    best = lae.both(scores)
    each = [value.softmax(-1) for value in scores.values()]
    assert best[0, :2].tolist() == [each[0][0, 0].item(), each[1][0, 1].item()] and best[0, 2] == -math.inf


def test_scale_is_learned_and_multiplies():
    body = stepped(learner("lae"), tasks=0, steps=3).body
    s = body.parameters["0/s"]
    assert s.shape == () and s.item() != 1.0
    x, y = torch.randn(4, 6), torch.randn(4, 7)
    expected = y + s * (x @ body.parameters["0/A"].T @ body.parameters["0/B"].T)
    assert torch.allclose(body.change()["0"](x, y), expected, atol=1e-6)


# Dynamic replay and static ConPET -------------------------------------------------------------------------------------


def test_draws_are_half_new_and_uniform_over_old_tasks():
    rng, count = np.random.default_rng(0), np.zeros(3)
    rows = np.zeros(40)
    for _ in range(400):
        drawn = replay.draw_replay(rng, [1000, 10, 40, 20], 16)
        assert (drawn.tasks[:8] == 3).all() and (drawn.tasks[8:] < 3).all()
        assert len(set(drawn.rows[:8].tolist())) == 8 and drawn.rows[:8].max() < 20
        count += np.bincount(drawn.tasks[8:], minlength=3)
        rows += np.bincount(drawn.rows[8:][drawn.tasks[8:] == 2], minlength=40)
    chi2 = ((count - count.mean()) ** 2 / count.mean()).sum()
    assert chi2 < 13.8  # 2 degrees of freedom, p = 0.001; drawing by size would give over 4000
    assert ((rows - rows.mean()) ** 2 / rows.mean()).sum() < 73.4  # 39 degrees of freedom
    assert len(replay.draw_replay(rng, [9, 2], 16).rows) == 16, "a small new task is drawn with replacement"
    with pytest.raises(InputError, match="batch_size=1"):
        replay.draw_replay(rng, [9, 9], 1)


def test_gather_keeps_the_order_and_cuts_texts():
    stores = [
        Encoded(
            {
                "input_ids": torch.arange(20).reshape(4, 5) + 100 * task,
                "attention_mask": torch.tensor([[1, 1, 1, 0, 0]] * 4),
            },
            torch.arange(4) + 10 * task,
        )
        for task in range(3)
    ]
    drawn = replay.Draw(np.array([2, 2, 0, 1, 0]), np.array([3, 0, 1, 2, 3]))
    inputs, labels = replay.gather(stores, drawn)
    assert labels.tolist() == [23, 20, 1, 12, 3]
    assert inputs["input_ids"].shape == (5, 3) and inputs["input_ids"][:, 0].tolist() == [215, 200, 5, 110, 15]


def test_static_conpet_batches_come_from_everything_stored():
    one = stepped(learner("conpet_static"), tasks=2, steps=1)
    body = one.body
    assert body.steps() == 2 * 4 and sorted(body.memory["raw"]) == ["0", "1"]
    everything = Encoded(
        {"x": torch.cat([task.train.inputs["x"] for task in one.stream.tasks])},
        torch.cat([task.train.labels for task in one.stream.tasks]),
    )
    old = set()
    for step in range(8):
        inputs, labels = body.batch(step)
        assert (labels[:4] >= 4).all() and (labels[4:] < 4).all()
        for x, label in zip(inputs["x"], labels, strict=True):
            place = (everything.inputs["x"] == x).all(1).nonzero().item()
            assert everything.labels[place] == label
        old |= set(labels[4:].tolist())
        assert torch.equal(body.batch(step)[1], labels)
    assert len(old) >= 3
    assert one.loss == "seen"


def test_static_conpet_keeps_what_sequential_loses():
    train = TrainConfig(epochs=15, batch_size=16, lr=0.02, head_lr=0.02)
    last = {}
    for name, options in (("conpet_static", {"r": 2, "batches": 6}), ("sequential", {"form": "lora", "r": 2})):
        last[name] = sum(learner(name, options, train).run().right["linear"][-1])
    assert last["conpet_static"] >= 50 > 40 >= last["sequential"]  # of 60


# Dynamic ConPET -------------------------------------------------------------------------------------------------------


def test_asked_experts():
    scores = torch.tensor([[0.1, 0.9, 0.5], [3.0, 2.0, 1.0]])
    assert conpet.asked(scores, 1).int().tolist() == [[0, 1, 0], [1, 0, 0]]
    assert conpet.asked(scores, 2).int().tolist() == [[0, 1, 1], [1, 1, 0]]
    forced = torch.tensor([0, 1])  # absent in the first row: the second pick (2) goes; present in the second row
    assert conpet.asked(scores, 2, forced).int().tolist() == [[1, 1, 0], [1, 1, 0]]
    assert conpet.asked(scores, 1, forced).int().tolist() == [[1, 0, 0], [0, 1, 0]]
    assert conpet.asked(scores, 9).all()


def test_union_of_experts_takes_the_best_where_classes_are_shared():
    logits = [torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 0.0]])]
    found = conpet.union(logits, [[0, 3], [3, 1]], torch.tensor([[True, True]]), 5)
    assert found.tolist() == [[1.0, 0.0, -100.0, 5.0, -100.0]]
    assert conpet.union(logits, [[0, 3], [3, 1]], torch.tensor([[False, True]]), 5)[0, 0] == -100


def expert_logits(body, inputs, name):
    part = {
        key.removeprefix(f"{name}/"): value
        for key, value in {**body.memory["adapters"], **body.parameters}.items()
        if key.startswith(f"{name}/")
    }
    view = {layer: low_rank(part[f"{layer}/B"], part[f"{layer}/A"], 8.0 / 2) for layer in ("0", "2")}
    return body.model.features(inputs, view) @ part["weight"].T + part["bias"]


def test_stages_train_the_selector_then_the_expert():
    one = stepped(learner("conpet"), tasks=2, steps=3)
    body = one.body
    assert {key.split("/")[0] for key in body.parameters} == {"selector"}
    assert body.parameters["selector/weight"].shape == (3, 5)
    kept = {key: value.clone() for key, value in body.memory["adapters"].items() if key.startswith("expert/")}
    inputs, labels = body.batch(3)
    expected = F.cross_entropy(expert_logits(body, inputs, "selector"), labels // 2)
    assert body.penalty(inputs, labels, None, one.classifier).item() == pytest.approx(expected.item(), rel=1e-5)
    move(one, body.steps() // 2 - 3)
    assert {key.split("/")[0] for key in body.parameters} == {"expert"}
    selector = {key: value.clone() for key, value in body.memory["adapters"].items() if key.startswith("selector/")}
    stepped(one, tasks=3)
    after = body.memory["adapters"]
    assert all(torch.equal(after[key], value) for key, value in {**kept, **selector}.items())
    assert sorted({"/".join(key.split("/")[:2]) for key in after if key.startswith("expert/")}) == [
        "expert/0",
        "expert/1",
        "expert/2",
    ]
    sizes = sum(value.numel() * 4 for value in after.values())
    assert body.stored()["adapters"] == sizes, "the newest expert counted twice"


def test_selector_goes_on_from_the_last_one():
    one = stepped(learner("conpet"), tasks=2)
    before = {key: value.clone() for key, value in one.body.memory["adapters"].items() if key.startswith("selector/")}
    begun(one)
    now = one.body.parameters
    assert torch.equal(now["selector/weight"][:2], before["selector/weight"])
    assert torch.equal(now["selector/0/B"], before["selector/0/B"]) and before["selector/0/B"].any()


@pytest.mark.parametrize("forcing", [True, False])
def test_expert_loss_is_the_union_with_old_experts_fixed(forcing):
    one = learner("conpet", {"r": 2, "batches": 4, "top": 2, "teacher_forcing": forcing})
    body = stepped(one, tasks=2, steps=10).body
    inputs, labels = body.batch(10)
    with torch.no_grad():
        picks = expert_logits(body, inputs, "selector").topk(2, 1).indices.tolist()
    logits = [expert_logits(body, inputs, f"expert/{task}") for task in range(3)]
    rows = []
    for n, (pick, label) in enumerate(zip(picks, labels.tolist(), strict=True)):
        if forcing and label // 2 not in pick:
            pick[-1] = label // 2
        row = [logits[task][n] if task in pick else torch.full((2,), -100.0) for task in range(3)]
        rows.append(torch.cat(row))
    expected = F.cross_entropy(torch.stack(rows), labels)
    assert body.penalty(inputs, labels, None, one.classifier).item() == pytest.approx(expected.item(), rel=1e-4)


def test_with_one_forced_expert_old_records_give_no_gradient():
    one = learner("conpet", {"r": 2, "batches": 4, "top": 1})
    body = stepped(one, tasks=1, steps=10).body
    inputs, labels = body.batch(10)
    leaves = list(body.parameters.values())
    found = torch.autograd.grad(body.penalty(inputs, labels, None, one.classifier), leaves)
    new = {"x": inputs["x"][:4]}
    local = F.cross_entropy(expert_logits(body, new, "expert/1"), labels[:4] - 2) / 2  # half of the batch
    expected = torch.autograd.grad(local, leaves)
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(found, expected, strict=True))
    assert float(expected[0].norm()) > 0


def test_cached_logits_are_fresh_ones_under_the_weights_hash():
    one = stepped(learner("conpet"), tasks=2, steps=9)
    body, cache = one.body, one.body.memory["statistics"]
    names = {conpet.weights_hash(body._part(f"expert/{expert}")): expert for expert in (0, 1)}
    assert set(cache) == {f"logits/{name}/{task}" for name in names for task in (0, 1, 2)}
    for key, found in cache.items():
        _, name, task = key.split("/")
        fresh = expert_logits(body, one.stream.tasks[int(task)].train.inputs, f"expert/{names[name]}")
        assert torch.allclose(found, fresh, atol=1e-5) and found.shape == (20, 2)
    other = {name: value + 1 for name, value in body._part("expert/0").items()}
    assert conpet.weights_hash(other) not in names


@pytest.mark.parametrize("top", [1, 2])
def test_prediction_asks_the_selector_and_its_choice_of_experts(top):
    one = learner("conpet", {"r": 2, "batches": 4, "top": top}).run()
    assert [row["passes_per_prediction"] for row in one.ledger] == [1, 1 + min(top, 2), 1 + top]
    inputs = one.stream.tasks[1].test.inputs
    scores = one.scores("linear", inputs)
    chosen = expert_logits(one.body, inputs, "selector").topk(top, 1).indices
    for n in range(len(scores)):
        row = {"x": inputs["x"][n : n + 1]}
        for task in range(3):
            found, own = scores[n, 2 * task : 2 * task + 2], expert_logits(one.body, row, f"expert/{task}")[0]
            assert torch.allclose(found, own if task in chosen[n] else torch.full((2,), -100.0), atol=1e-5)


def test_conpet_learns_all_tasks():
    train = TrainConfig(epochs=15, batch_size=16, lr=0.02, head_lr=0.02)
    one = learner("conpet", {"r": 2, "batches": 6}, train).run()
    assert sum(one.right["linear"][-1]) >= 50  # of 60
    steps = [one.body.steps()]
    one.body.index = 1
    assert one.body.steps() == steps[0] == 15 * 6 * 2
