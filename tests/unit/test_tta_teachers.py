"""Memories, mean teachers and methods that are trained on source data do what their equations imply."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedpeft import seeds
from fedpeft.data.encode import Encoded
from fedpeft.tta.deployed import batch_statistics, deploy
from fedpeft.tta.method import make
from fedpeft.tta.methods import itta, lsa, memo, petal, roid, rotta, t3a
from fedpeft.tta.parts import scores, teacher
from support import tta_parts as parts


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# RoTTA ----------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1.3)), max_size=60))
def test_rotta_memory_keeps_its_capacity_and_quotas(offers):
    items: list[rotta.Item] = []
    for label, uncertainty in offers:
        items = rotta.offer(items, {"label": label, "uncertainty": uncertainty, "age": 0}, capacity=8, classes=4)
        assert len(items) <= 8
        assert all(sum(item["label"] == k for item in items) <= 2 for k in range(4))


@pytest.mark.parametrize(("capacity", "classes"), [(64, 36), (64, 64), (64, 100), (8, 3), (7, 2)])
def test_rotta_memory_fills_whatever_the_number_of_classes(capacity, classes):
    items: list[rotta.Item] = []
    for turn in range(6 * classes):
        item = {"label": turn % classes, "uncertainty": 0.5, "age": 0}
        items = rotta.offer(items, item, capacity, classes)
    assert len(items) == capacity
    assert max(Counter(item["label"] for item in items).values()) <= math.ceil(capacity / classes)


def test_rotta_replaces_old_and_uncertain_entries():
    old = [{"label": 0, "uncertainty": 0.1, "age": 90}, {"label": 0, "uncertainty": 0.1, "age": 0}]
    kept = rotta.offer(old, {"label": 0, "uncertainty": 0.1, "age": 0}, capacity=4, classes=2)
    assert [item["age"] for item in kept] == [1, 1]
    kept = rotta.offer(old[1:] * 2, {"label": 0, "uncertainty": 0.6, "age": 0}, capacity=4, classes=2)
    assert [item["uncertainty"] for item in kept] == [0.1, 0.1], "a worse newcomer is turned away"


def test_rotta_moves_its_statistics_slowly():
    model = parts.conv()
    method = parts.method("rotta", model, capacity=7, update_every=7, lr=0.0, bn_alpha=0.05)
    norm, batch = model.norms["blocks.0.1"], parts.images(7)
    inputs = model.modules["blocks.0.0"](batch["pixel_values"]).detach()
    method.step(batch)
    held = torch.cat([item["input"]["pixel_values"] for item in method.memory["items"]])
    inputs = model.modules["blocks.0.0"](held).detach()
    expected = 0.95 * norm.running_mean + 0.05 * inputs.mean((0, 2, 3))
    assert torch.allclose(method.memory["moving"]["blocks.0.1"][0], expected, atol=1e-5)
    assert not torch.allclose(expected, norm.running_mean, atol=1e-3)


# MEMO, T3A ------------------------------------------------------------------------------------------------------------


def test_memo_with_one_plain_view_is_tents_loss_and_forgets():
    logits = random(1, 5)
    assert torch.isclose(memo.marginal_entropy(logits), scores.entropy(logits)[0])
    two = random(2, 5)
    assert torch.isclose(memo.marginal_entropy(two), scores.entropy_of(two.softmax(-1).mean(0)))
    method = parts.method("memo", parts.conv(), lr=0.1, augment="identity")
    first = method.step(parts.images(2))[0]
    method.step(parts.images(2, 9))
    assert torch.equal(method.predict(parts.images(2)), first)
    plain = make("source", parts.conv()).predict(parts.images(2))
    assert bool((scores.entropy_of(first) < scores.entropy_of(plain)).all())


def test_memo_answers_under_the_statistics_it_was_told_to_mix():
    images = {"pixel_values": 3 * parts.images(1)["pixel_values"] + 1}
    still = parts.method("memo", parts.conv(), lr=0.0, bn_alpha=0.5, views=2)
    norms = parts.method("bn_adapt", parts.conv(), bn_alpha=0.5)
    mixed = norms.forward(images, {}, batch_statistics(0.5)).prediction
    assert torch.allclose(still.predict(images), mixed, atol=1e-6)
    plain = make("source", parts.conv()).predict(images)
    assert not torch.allclose(mixed, plain, atol=1e-3)
    assert torch.allclose(parts.method("memo", parts.conv(), lr=0.0, views=2).predict(images), plain, atol=1e-6)


def test_t3a_keeps_the_most_certain_supports_of_each_class():
    labels, entropy = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([0.3, 0.9, 0.1, 0.2, 0.2])
    assert t3a.most_certain(labels, entropy, 1).tolist() == [2, 3]
    assert t3a.most_certain(labels, entropy, 2).tolist() == [1, 2, 3, 4]
    method = parts.method("t3a", parts.conv(), supports=4)
    weight = parts.Net().head.weight
    assert torch.equal(method.memory["supports"], weight)
    prototypes = t3a.prototypes(method.memory["supports"], method.memory["labels"], 3)
    assert torch.allclose(prototypes, F.normalize(weight, dim=-1), atol=1e-6)
    parts.play(method, parts.stream(6))
    counts = torch.bincount(method.memory["labels"], minlength=3)
    assert int(counts.max()) == 4 and int(counts.min()) >= 1, "a class never seen keeps its head row"


# CoTTA, PETAL ---------------------------------------------------------------------------------------------------------


def test_cotta_teacher_is_the_moving_average_of_students():
    model = parts.conv()
    method = parts.method("cotta", model, restore=0.0, ema=0.7, lr=0.05)
    start, students = method.memory["student"], []
    for batch in parts.stream(4):
        method.step(batch)
        students.append(method.memory["student"])
    for name, value in method.memory["teacher"].items():
        expected = 0.7**4 * start[name] + 0.3 * sum(
            0.7 ** (3 - t) * student[name] for t, student in enumerate(students)
        )
        assert torch.allclose(value, expected, atol=1e-6)


def test_cotta_restored_wholly_keeps_the_student_but_not_the_teacher():
    model = parts.conv()
    after = parts.method("cotta", model, restore=1.0, ema=0.5, lr=0.05)
    before = parts.method("cotta", model, restore=1.0, ema=0.5, lr=0.05, restore_order="before")
    for method in (after, before):
        parts.play(method, parts.stream(3))
        assert all(torch.equal(value, model.tensor(name)) for name, value in method.memory["student"].items())
    assert any(not torch.allclose(value, model.tensor(name)) for name, value in after.memory["teacher"].items())
    assert all(torch.allclose(value, model.tensor(name)) for name, value in before.memory["teacher"].items())


def test_cotta_restores_the_share_it_should():
    student, anchor = {"w": torch.ones(200, 100)}, {"w": torch.zeros(200, 100)}
    for p in (0.0, 0.1, 0.7):
        new = teacher.restore_at_random(student, anchor, p, torch.Generator().manual_seed(0), True)
        share = float((new["w"] == 0).float().mean())
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 20000) + 1e-9


def test_lora_is_restored_by_whole_components():
    names = ("q.lora_A.default.weight", "q.lora_B.default.weight")
    student = {names[0]: torch.ones(8, 5), names[1]: torch.ones(6, 8)}
    anchor = {name: torch.zeros_like(value) for name, value in student.items()}
    new = teacher.restore_at_random(student, anchor, 0.5, torch.Generator().manual_seed(1), True)
    assert torch.equal(new[names[0]][:, 0], new[names[1]][0]) and 0 < float(new[names[0]][:, 0].sum()) < 8
    assert torch.equal(new[names[0]], new[names[0]][:, :1].expand(8, 5))
    apart = teacher.restore_at_random(student, anchor, 0.5, torch.Generator().manual_seed(1), False)
    assert not torch.equal(apart[names[0]], apart[names[0]][:, :1].expand(8, 5))


@pytest.mark.parametrize(("threshold", "forwards"), [(0.0, 3), (1.1, 7)])
def test_cotta_averages_views_only_where_the_anchor_is_uncertain(threshold, forwards):
    method = parts.method("cotta", parts.conv(), threshold=threshold, views=5)
    method.step(parts.images())
    assert method.cost["forwards"] == forwards  # anchor, student, and one or five of the teacher


def test_cotta_that_averages_is_the_augmentation_average_at_first():
    model, batch = parts.conv(), parts.images()
    average = make("aug_average", model, {"views": 3}, seed=3)
    assert torch.allclose(
        parts.method("cotta", model, threshold=1.1, views=3).predict(batch), average.predict(batch), atol=1e-6
    )


def test_petal_restores_the_smallest_with_ties_at_random():
    values = {"a": torch.tensor([0.0, 3.0, 0.0, 1.0]), "b": torch.tensor([[0.0, 2.0], [torch.nan, 5.0]])}
    for share in (0.0, 0.3, 0.6, 1.0):
        masks = petal.smallest(values, share, torch.Generator().manual_seed(0), False)
        assert sum(int(mask.sum()) for mask in masks.values()) == int(share * 7)
        assert not masks["b"][1, 0], "an entry that was not used does not count"
    picks = {
        tuple(
            torch.cat(
                [
                    mask.flatten()
                    for mask in petal.smallest(values, 0.3, torch.Generator().manual_seed(seed), False).values()
                ]
            )
            .nonzero()
            .squeeze(-1)
            .tolist()
        )
        for seed in range(30)
    }
    assert picks == {(0, 2), (0, 4), (2, 4)}
    masks = petal.smallest(values, 0.5, torch.Generator(), True)
    assert [int(mask.sum()) for mask in masks.values()] == [2, 1] and masks["a"].tolist() == [True, False, True, False]


def test_petal_prior_and_restore():
    model = parts.conv()
    method = parts.method("petal", model, prior_weight=2.0, snapshot_lr=0.05)
    mean, variance = method.prepared["mean"], method.prepared["variance"]
    assert all(bool((value >= 0).all()) for value in variance.values())
    assert any(not torch.equal(value, model.tensor(name)) for name, value in mean.items())
    assert parts.same(method.memory["student"], mean) and parts.same(method.memory["teacher"], mean)
    name = "head.weight"
    gradient = method._penalty_gradient(name, mean[name] + 0.5)
    assert torch.allclose(gradient, 2.0 * 0.5 / (variance[name] + 1e-6), rtol=1e-3)
    assert not method._penalty_gradient(name, mean[name]).any()
    data = {key: random(*value.shape, seed=4) for key, value in mean.items()}
    student = {key: value + 1 for key, value in mean.items()}
    restored = method._restored(student, data, data)
    back = {key: restored[key] == mean[key] for key in mean}
    total = sum(value.numel() for value in mean.values())
    assert sum(int(value.sum()) for value in back.values()) == int(0.2 * total)
    low = max(float(data[key].square()[back[key]].max()) for key in mean if back[key].any())
    high = min(float(data[key].square()[~back[key]].min()) for key in mean if (~back[key]).any())
    assert low <= high


def test_petal_without_prior_and_with_random_restore_is_cotta_from_its_mean():
    model = parts.conv()
    options = {"restore": 0.1, "lr": 1e-2, "threshold": 0.9, "views": 2}
    p = parts.method("petal", model, prior_weight=0.0, rule="random", **options)
    moved = parts.Net()
    with torch.no_grad():
        for name, value in p.prepared["mean"].items():
            moved.get_parameter(name).copy_(value)
    c = parts.method("cotta", deploy(moved, head="head"), **options)
    batches = parts.stream(4)
    assert torch.allclose(parts.play(p, batches), parts.play(c, batches), atol=1e-6)


# Label shift adapter, ITTA, ROID --------------------------------------------------------------------------------------


def test_lsa_starts_as_its_base_and_learns_the_shift():
    """Without training it is the base; trained on a long tail, it gives rare classes more under the inverted prior."""
    model, batch = parts.conv(), parts.images()
    fresh = parts.method("lsa", model, steps=0)
    assert torch.allclose(fresh.predict(batch), make("bn_adapt", model).predict(batch), atol=1e-6)
    draws = torch.Generator().manual_seed(0)
    labels = torch.multinomial(torch.tensor([0.8, 0.15, 0.05]), 400, True, generator=draws)
    x = F.one_hot(labels, 3).float() + 0.7 * torch.randn(400, 3, generator=draws)
    net = nn.Sequential(nn.Linear(3, 3))
    net[0].weight.data, net[0].bias.data = 3 * torch.eye(3), torch.tensor([0.8, 0.15, 0.05]).log()
    deployed = deploy(net, head="0", forward=lambda batch: net(batch["x"]))
    method = make("lsa", deployed, {"base": "source", "steps": 400, "lr": 0.01}, 0, Encoded({"x": x}, labels))
    prior = method.prepared["prior"]
    shares = {}
    for d in (1.0, -1.0):
        method.memory["target"] = scores.on_simplex(prior**d)
        shares[d] = method.predict({"x": x}).mean(0)
    assert abs(float(shares[1.0][0]) - 0.8) < 0.12
    assert float(shares[-1.0][2]) > 2 * float(shares[1.0][2])


def test_lsa_loss_is_plain_cross_entropy_at_the_source_and_the_best_bias_is_the_log_ratio():
    prior, labels = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0, 0, 1, 2])
    z = random(4, 3)
    same = scores.on_simplex(prior**1.0)
    assert torch.isclose(F.cross_entropy(z + prior.log() - same.log(), labels), F.cross_entropy(z, labels))
    target = scores.on_simplex(prior**-0.5)
    logits, bias = prior.log().expand(1000, 3), nn.Parameter(torch.zeros(3))
    drawn = torch.repeat_interleave(torch.arange(3), torch.tensor([700, 200, 100]))
    optimizer = torch.optim.Adam([bias], 0.05)
    for _ in range(400):
        optimizer.zero_grad()
        F.cross_entropy(logits + bias + prior.log() - target.log(), drawn).backward()
        optimizer.step()
    expected = target.log() - prior.log()
    assert torch.allclose(bias.detach() - bias.detach().mean(), expected - expected.mean(), atol=0.02)
    network = lsa.fresh_network(4, 3, 5, torch.Generator())
    assert torch.equal(lsa.adapted(z, random(4, 5), random(3, 5), network, -0.7), z)


def test_itta_starts_as_nothing_and_changes_its_own_tensors_only():
    model, batch = parts.conv(), parts.images()
    method = parts.method("itta", model)
    prepared = {key: value.clone() for key, value in method.prepared["f"].items()}
    assert torch.equal(method.predict(batch), make("source", model).predict(batch))
    assert set(method.memory["student"]) == {f"blocks.{block}/{role}" for block in (0, 1) for role in "wb"}
    method.step(batch)
    assert any(bool((value != (key[-1] == "w")).any()) for key, value in method.memory["student"].items())
    assert parts.same(prepared, method.prepared["f"])
    method.reset()
    assert all(bool((value == (key[-1] == "w")).all()) for key, value in method.memory["student"].items())


def test_itta_alignment_ignores_the_scale_of_either_gradient():
    w = nn.Parameter(random(6))
    one, two = (w**3).sum(), (w.sin() * torch.arange(6.0)).sum()
    value = itta.alignment(one, two, [w])
    assert torch.isclose(value, itta.alignment(7 * one, 0.01 * two, [w]), rtol=1e-4)
    assert float(itta.alignment(two, two, [w])) < 1e-10 < float(value)
    f = {"w": random(3, 4), "b": random(3, 4, seed=2)}
    assert float(itta.consistency(f, torch.zeros(5, 4))) == 0 < float(itta.consistency(f, random(5, 4)))


def test_mix_style_mixes_statistics_and_leaves_one_sample_alone():
    draws = seeds.numpy_generator(0, "x")
    hidden = random(4, 3, 5, 5)
    mixed = itta.mix_style(hidden, draws)
    means, before = mixed.mean((2, 3)), hidden.mean((2, 3))
    assert bool((means >= before.min(0).values - 1e-5).all()) and bool((means <= before.max(0).values + 1e-5).all())
    assert not torch.allclose(means, before, atol=1e-3)
    assert torch.allclose(itta.mix_style(hidden[:1], draws), hidden[:1], atol=1e-5)
    tokens = random(4, 6, 3)
    assert itta.mix_style(tokens, draws).shape == tokens.shape


def test_roid_by_hand():
    p = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
    prior, smooth = torch.tensor([0.6, 0.4]), 0.5 / 0.6
    wanted = p * (prior + smooth) / (1 + 2 * smooth)
    assert torch.allclose(roid.corrected(p), wanted / wanted.sum(-1, keepdim=True))
    z = torch.tensor([[2.0, 0.0]])
    q = z.softmax(-1)[0]
    assert torch.isclose(roid.soft_likelihood_ratio(z)[0], -(q * (q / (1 - q)).log()).sum())
    weights, kept = roid.sample_weights(p, torch.tensor([1.0, 0.0]), 1 / 3)
    assert kept.tolist() == [False, True]
    assert torch.isclose(weights[1], torch.tensor(1.0))  # most diverse, least certain: exp(1 * 0)


def test_roid_without_memory_of_its_step_is_the_source():
    model = parts.conv()
    method = parts.method("roid", model, mu=0.0, lr=0.1)
    parts.play(method, parts.stream(3))
    assert all(torch.equal(value, model.tensor(name)) for name, value in method.memory["student"].items())
    free = parts.method("roid", model, mu=1.0, lr=0.1)
    parts.play(free, parts.stream(3))
    assert any(not torch.equal(value, model.tensor(name)) for name, value in free.memory["student"].items())


def test_rdumb_with_period_one_is_episodic():
    model = parts.conv()
    options = {"base": "tent", "base_options": {"lr": 0.1}}
    episodic = make("rdumb", model, {**options, "period": 1})
    batches = parts.stream(4)
    plain = torch.cat([make("bn_adapt", model).predict(batch) for batch in batches])
    assert torch.allclose(parts.play(episodic, batches), plain, atol=1e-6)
    long = make("rdumb", model, {**options, "period": 3})
    tent = make("tent", model, options["base_options"])
    apart = parts.play(long, batches), parts.play(tent, batches)
    assert torch.equal(apart[0][:21], apart[1][:21]) and not torch.allclose(apart[0][21:], apart[1][21:])
