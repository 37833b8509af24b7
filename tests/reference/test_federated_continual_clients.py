"""A client's half of a sequence of tasks in float64: replay, what competes in the loss, sums for heads, sketches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedpeft import registry
from fedpeft.clients.cohort.engine import Job, train_cohort
from fedpeft.clients.sequence import BOUND, head_sums, mark_task, mix_replay, private_head_sums, records_of_task
from fedpeft.clients.train import per_sample_loss, train
from fedpeft.config import ClientConfig
from fedpeft.data.encode import Encoded
from fedpeft.errors import RunError
from fedpeft.privacy.gradients import per_sample_gradients
from fedpeft.privacy.noise import Seeded
from fedpeft.state import AdapterState
from fedpeft.strategies.instructions import Instructions, Lesson
from fedpeft.strategies.sequence.coso import sketch_gradients
from support import small_models as small

# conpet_static --------------------------------------------------------------------------------------------------------


def images(count, seed=0, labels=None):
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 1, 8, 8, generator=draw, dtype=torch.float64)
    return Encoded(
        {"pixel_values": pixels},
        torch.randint(0, small.LABELS, (count,), generator=draw) if labels is None else torch.as_tensor(labels),
    )


def numbered(labels):
    """Records that know their number."""
    return Encoded({"number": torch.arange(len(labels))}, torch.as_tensor(labels))


def task_of(groups, task, replay=True, number=1):
    classes, seen = tuple(groups[task]), tuple(label for group in groups[: task + 1] for label in group)
    return Instructions(
        number, learn=Lesson(task, classes, seen, classes, replay, tuple(map(tuple, groups[: task + 1])))
    )


LABELS = [0] * 40 + [1] * 10 + [2] * 5 + [3] * 45  # task 0: classes 0 and 1, of 50; task 1: class 2, of 5; task 2: 45
GROUPS = [[0, 1], [2], [3]]


@pytest.mark.parametrize("size, steps", [(8, 25), (7, 30)])
def test_replayed_batches_are_half_new_and_half_old(size, steps):
    config = ClientConfig(batch_size=size, local_steps=steps, local_epochs=None)
    data, fresh = numbered(LABELS), -(-size // 2)
    mixed = mix_replay(data, task_of(GROUPS, 2), config, seed=4)
    assert len(mixed) == size * steps
    new = []
    for batch in mixed.labels.split(size):
        assert int((batch == 3).sum()) == fresh
    for start in range(0, len(mixed), size):
        part = mixed.view(np.arange(start, start + size))
        new += part.inputs["number"][part.labels == 3].tolist()
    passes = [new[start : start + 45] for start in range(0, len(new) - 44, 45)]
    assert len(passes) >= 2 and all(sorted(one) == list(range(55, 100)) for one in passes) and passes[0] != passes[1]
    again = [mix_replay(data, task_of(GROUPS, 2), config, seed=seed).inputs["number"] for seed in (4, 5)]
    assert torch.equal(again[0], mixed.inputs["number"]) and not torch.equal(again[1], mixed.inputs["number"])


def test_old_records_are_drawn_by_task_and_then_within_it():
    """Chi-squared on 8000 draws, 1 degree of freedom for tasks and 54 for records: far below 6 sigma, far above for a
    draw over records (which would take task 1 in 1 of 11 cases)."""
    config = ClientConfig(batch_size=16, local_steps=1000, local_epochs=None)
    mixed = mix_replay(numbered(LABELS), task_of(GROUPS, 2), config, seed=0)
    old = mixed.inputs["number"][mixed.labels != 3].numpy()
    assert len(old) == 8000
    tasks = np.array([(old < 50).sum(), (old >= 50).sum()])
    assert ((tasks - 4000) ** 2 / 4000).sum() < 20
    expected = np.where(np.arange(55) < 50, 80, 800)
    assert ((np.bincount(old, minlength=55) - expected) ** 2 / expected).sum() < 54 + 6 * np.sqrt(2 * 54)


def test_nothing_is_replayed_without_a_past():
    config, data = ClientConfig(batch_size=8, local_steps=2, local_epochs=None), numbered(LABELS)
    assert mix_replay(data, task_of(GROUPS, 0), config, 0) is None
    assert mix_replay(data, task_of(GROUPS, 2, replay=False), config, 0) is None
    assert mix_replay(data, Instructions(1), config, 0) is None
    assert mix_replay(numbered([3] * 9), task_of(GROUPS, 2), config, 0) is None
    assert set(records_of_task(data, task_of(GROUPS, 2), "c").labels.tolist()) == {3}
    with pytest.raises(RunError, match="c has no records of task 1"):
        records_of_task(numbered([0, 3]), task_of(GROUPS, 1), "c")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_in_order_is_the_loop_by_hand(build, optimizer):
    model, config = build("vit"), ClientConfig(optimizer=optimizer, lr=0.05, batch_size=4, local_steps=9)
    starts, data = [small.randomised(model, seed, 0.3) for seed in (1, 2)], [images(12, 1), images(10, 2)]
    ends = []
    for start, own in zip(starts, data, strict=True):
        model.write(start)
        parameters = model.train_roles(["A", "B", "head"])
        make = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
        by_hand = make(list(parameters.values()), lr=0.05, weight_decay=0.0)
        for at in range(0, len(own), 4):
            by_hand.zero_grad()
            F.cross_entropy(
                model.base.forward({"pixel_values": own.inputs["pixel_values"][at : at + 4]}), own.labels[at : at + 4]
            ).backward()
            by_hand.step()
        by_hand.zero_grad()
        ends.append(model.state())
        model.write(start)
        steps, _ = train(model, own, ["A", "B", "head"], config, 0, in_order=True)
        assert steps == 3 and model.state().distance(ends[-1]) < 1e-12 < start.distance(ends[-1])
    jobs = [
        Job(start.tensors, own, seed, in_order=True) for seed, (start, own) in enumerate(zip(starts, data, strict=True))
    ]
    for done, end in zip(train_cohort(model, jobs, ["A", "B", "head"], config, 10**6), ends, strict=True):
        assert done.steps == 3 and AdapterState(done.after, end.sites).distance(end) < 1e-10


# What competes --------------------------------------------------------------------------------------------------------


def test_rows_of_classes_that_do_not_compete_stay_bit_for_bit(build):
    model = build("vit")
    start, data = small.randomised(model, 1, 0.3), images(12, labels=[0, 2] * 6)
    config = ClientConfig(optimizer="adamw", lr=0.05, batch_size=4, local_steps=3, local_epochs=None)
    for classes, still in [([0, 2], True), (None, False)]:
        for cohort in (False, True):
            model.write(start)
            with model.competing(classes):
                if cohort:
                    job = Job(start.tensors, data, 0)
                    ended = train_cohort(model, [job, job], ["B", "head"], config, 10**6)[0].after
                else:
                    train(model, data, ["B", "head"], config, 0)
                    ended = model.state().tensors
            assert model.compete is None
            for key in ("classifier/weight", "classifier/bias"):
                assert torch.equal(ended[key][1], start[key][1]) == still
                assert not torch.equal(ended[key][0], start[key][0])


def test_per_sample_gradients_under_the_mask_are_autograds_of_the_smaller_softmax(build):
    model = build("vit")
    model.write(small.randomised(model, 1, 0.3))
    data = images(5, labels=[0, 2, 2, 0, 2])
    parameters = model.train_roles(["A", "B", "head"])
    with model.competing([0, 2]):
        got, losses = per_sample_gradients(
            model.base.modules, parameters, lambda *batch: per_sample_loss(model, *batch), data.inputs, data.labels
        )
    for index in range(5):
        part = data.view(np.array([index]))
        loss = F.cross_entropy(model.base.forward(part.inputs)[:, [0, 2]], part.labels // 2)
        expected = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(parameters.values()))])
        torch.testing.assert_close(got[index], expected, atol=1e-12, rtol=0)
        assert float(losses[index]) == pytest.approx(loss.item(), abs=1e-12)


# Sums for heads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lda", "ncm", "ranpac"])
@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_a_record_moves_private_sums_by_at_most_the_bound(build, name, noise):
    model, data = build("vit"), images(9)
    model.write(small.randomised(model, 1, 0.3))
    made = registry.load("heads", name)(small.LABELS, small.WIDTH, 0)
    whole = private_head_sums(model, made, data, noise, Seeded(0, "sums"))
    for gone in (0, 8):
        fewer = private_head_sums(model, made, data.view(np.delete(np.arange(9), gone)), noise, Seeded(0, "sums"))
        moved = sum(float((whole[key] - fewer[key]).square().sum()) for key in whole) ** 0.5
        assert 1.0 <= moved <= BOUND + 1e-6
    if noise:
        quiet = private_head_sums(model, made, data, 0.0, Seeded(0, "sums"))
        drawn = torch.cat([(whole[key] - quiet[key]).flatten() for key in whole])
        assert float(drawn.std()) == pytest.approx(noise * BOUND, rel=0.25)
    elif name == "lda":
        plain = [
            torch.cat(parts)
            for parts in list(
                zip(*((found.double(), labels) for found, _, labels in model.features(data)), strict=True)
            )
        ]
        one = F.normalize(plain[0], dim=1)
        torch.testing.assert_close(whole["gram"], one.T @ one, atol=1e-6, rtol=0)  # features are float32
        assert float(whole["count"].sum()) == pytest.approx(9, abs=1e-5)


def test_a_record_that_is_not_finite_has_no_influence(build):
    """Else one record could turn all sums to NaN, which no noise hides."""
    model, data = build("vit"), images(6)
    model.write(small.randomised(model, 1, 0.3))
    made = registry.load("heads", "lda")(small.LABELS, small.WIDTH, 0)
    clean = private_head_sums(model, made, data.view(np.arange(5)), 0.0, Seeded(0, "sums"))
    data.inputs["pixel_values"][5] = float("nan")
    broken = private_head_sums(model, made, data, 0.0, Seeded(0, "sums"))
    for key, value in broken.items():
        torch.testing.assert_close(value, clean[key], atol=BOUND, rtol=0)


def test_sums_over_owners_are_those_of_all_records(build):
    model, data = build("vit"), images(300)
    model.write(small.randomised(model, 1, 0.3))
    made = registry.load("heads", "lda")(small.LABELS, small.WIDTH, 0)
    parts = [head_sums(model, made, data.view(part)) for part in np.split(np.arange(300), [7, 270])]
    for key, value in head_sums(model, made, data).items():
        torch.testing.assert_close(sum(part[key] for part in parts), value, atol=1e-5, rtol=0)


# Sketches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [True, False])
def test_a_client_sketches_the_gradients_of_full_weights(build, inputs):
    """With as many columns as directions nothing is lost: S S^T is the sum of G^T G (inputs) or G G^T over batches."""
    model, data = build("vit"), images(100)
    model.write(small.randomised(model))
    got = sketch_gradients(model, data, 32, inputs)
    for site in model.form.lora_sites():
        layer = model.base.layer(site)
        assert not layer.weight.requires_grad
        expected = torch.zeros(layer.weight.shape[1 if inputs else 0], dtype=torch.float64).diag()
        for start in (0, 64):
            part = data.view(np.arange(start, min(start + 64, 100)))
            layer.weight.requires_grad_(True)
            (G,) = torch.autograd.grad(F.cross_entropy(model.base.forward(part.inputs), part.labels), [layer.weight])
            layer.weight.requires_grad_(False)
            expected += G.T @ G if inputs else G @ G.T
        torch.testing.assert_close(got[site] @ got[site].T, expected, atol=1e-12, rtol=1e-8)


# Who took part --------------------------------------------------------------------------------------------------------


def test_a_client_knows_the_tasks_that_it_missed(caplog):
    caplog.set_level("INFO", logger="fedpeft")
    marks, missed = mark_task({}, task_of(GROUPS, 0), "site-1")
    assert (missed, caplog.text) == (0, "")
    marks, missed = mark_task(marks, task_of(GROUPS, 2), "site-1")
    assert missed == 1 and "site-1 missed task 1" in caplog.text
    caplog.clear()
    marks, missed = mark_task(marks, task_of(GROUPS, 2), "site-1")
    assert missed == 1 and not caplog.text and marks["task:joined"].tolist() == [0, 2]
    assert mark_task({}, Instructions(1), "site-1") == ({}, 0)
