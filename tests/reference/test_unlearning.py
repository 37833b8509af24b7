"""Unlearning's equations against slow, obvious ones in float64: hinge, Fisher, FILA, negation, attack, distance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedpeft.adapters.adapted import build
from fedpeft.clients.train import per_sample_loss
from fedpeft.config import AdapterConfig, ModelConfig
from fedpeft.data.encode import Encoded
from fedpeft.objectives.base import IGNORE
from fedpeft.unlearning.measures import distance_of, head_distance, membership_attack
from fedpeft.unlearning.methods.loku import SMALL, fisher_information, inverted_hinge, split_fila
from fedpeft.unlearning.methods.negation import negate_task
from support.methods import adapter


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def change(state, site):
    return state.sites[site].scaling * state[f"{site}/B"].double() @ state[f"{site}/A"].double()


def hinge_by_hand(scores, target):
    chances = [math.exp(value) for value in scores]
    chances = [value / sum(chances) for value in chances]
    others = [value for place, value in enumerate(chances) if place != target]
    return max(0.0, 1 + chances[target] - max(others))


def test_the_inverted_hinge_of_classes_and_of_tokens():
    scores, targets = 3 * randn(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    wanted = [hinge_by_hand(row.tolist(), int(target)) for row, target in zip(scores, targets, strict=True)]
    assert inverted_hinge(scores, targets).tolist() == pytest.approx(wanted, rel=1e-12)
    texts, labels = 3 * randn(2, 4, 5, seed=1), torch.tensor([[1, IGNORE, 3, IGNORE], [0, 2, 2, 4]])
    found = inverted_hinge(texts, labels).tolist()
    for row, text, mine in zip(found, texts, labels, strict=True):
        known = [place for place in range(4) if mine[place] != IGNORE]
        each = [hinge_by_hand(text[place].tolist(), int(mine[place])) for place in known]
        assert row == pytest.approx(sum(each) / len(each), rel=1e-12)


def test_a_step_down_the_hinge_lowers_the_right_answer_and_raises_the_next_one():
    scores = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(inverted_hinge(scores, torch.tensor([0])).sum(), scores)
    after = (scores - slope).softmax(-1).detach()[0] - scores.softmax(-1).detach()[0]
    assert after[0] < -0.05 and after[1] > 0.05 and abs(after[2]) < after[1] / 2


def test_fila_is_the_best_approximation_of_rows_weighted_by_the_fisher_ratio():
    weight, forget, retain = randn(7, 5), randn(7, 5, seed=1).square(), randn(7, 5, seed=2).square()
    rank, scaling = 2, 1.7
    B, A = split_fila(weight, forget, retain, rank, scaling)
    assert B.dtype == A.dtype == torch.float64 and B.shape == (7, 2) and A.shape == (2, 5)
    d = torch.tensor([math.sqrt(sum(float(forget[i, j] / (retain[i, j] + 1e-5)) for j in range(5))) for i in range(7)])
    U, S, Vt = torch.linalg.svd(torch.diag(d.double()) @ weight)
    best = torch.diag(1 / (d.double() + SMALL)) @ (U[:, :rank] @ torch.diag(S[:rank]) @ Vt[:rank])
    torch.testing.assert_close(scaling * B @ A, best, rtol=1e-5, atol=1e-6)
    # Balanced, as sqrt S on both sides; and better where it counts than the plain best approximation.
    torch.testing.assert_close(A @ A.T, torch.diag(S[:rank] / scaling), rtol=1e-6, atol=1e-7)
    u, s, vt = torch.linalg.svd(weight)
    plain = u[:, :rank] * s[:rank] @ vt[:rank]
    error = [(d.double()[:, None] * (weight - near)).norm() for near in (scaling * B @ A, plain)]
    assert error[0] < 0.99 * error[1]


def test_fila_of_a_weight_with_fewer_rows_than_the_rank_is_the_weight():
    weight = randn(2, 6)
    B, A = split_fila(weight, torch.ones(2, 6), torch.ones(2, 6), 4, 0.5)
    assert B.shape == (2, 4) and A.shape == (4, 6)
    torch.testing.assert_close(0.5 * B @ A, weight, rtol=1e-4, atol=1e-4)


def test_fisher_information_is_the_mean_of_squared_gradients_record_by_record():
    model = build(ModelConfig(name="tiny-vit"), AdapterConfig(r=2, target_modules=["all-linear"]), 3, 0)
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    data = Encoded({"pixel_values": images}, torch.tensor([0, 2, 1, 1]))
    found = fisher_information(model, data)
    assert set(found) == set(model.form.lora_sites())
    site = sorted(found)[0]
    weight = model.base.layer(site).weight
    wanted = torch.zeros_like(weight, dtype=torch.float64)
    for number in range(4):
        inputs, labels = data.batch(np.array([number]))
        weight.requires_grad_(True)
        (slope,) = torch.autograd.grad(per_sample_loss(model, inputs, labels).sum(), weight)
        wanted += slope.double() ** 2 / 4
        weight.requires_grad_(False)
    torch.testing.assert_close(found[site], wanted, rtol=1e-5, atol=1e-14)
    assert float(found[site].max()) > 0 and not any(value.requires_grad for value in model.base.backbone.parameters())


def test_negation_subtracts_the_change_and_nothing_else():
    run, start, tuned = (adapter(slot, torch.float64) for slot in range(3))
    found = negate_task(run, start, tuned, 0.3)
    for site in ("a.q", "a.v"):
        wanted = change(run, site) - 0.3 * (change(tuned, site) - change(start, site))
        torch.testing.assert_close(change(found, site), wanted, rtol=1e-12, atol=1e-12)
    wanted = run["head/bias"] - 0.3 * (tuned["head/bias"] - start["head/bias"])
    torch.testing.assert_close(found["head/bias"], wanted, rtol=1e-12, atol=1e-12)
    same = negate_task(run, start, start, 0.3)
    torch.testing.assert_close(change(same, "a.q"), change(run, "a.q"), rtol=1e-12, atol=1e-12)


def attack_by_hand(members, others, weights):
    pairs = [(w, (m < o) + (m == o) / 2) for m in members for o, w in zip(others, weights, strict=True)]
    auc = sum(w * hit for w, hit in pairs) / sum(w for w, _ in pairs)
    best = 0.0
    for cut in [*members, *others]:
        right = sum(m <= cut for m in members) / len(members)
        false = sum(w for o, w in zip(others, weights, strict=True) if o <= cut) / sum(weights)
        best = max(best, right - false)
    return auc, best


def test_the_attack_is_every_pair_and_every_threshold():
    rng = np.random.default_rng(0)
    members, others = rng.integers(0, 9, 30) / 4, rng.integers(2, 12, 50) / 4  # with ties
    weights = rng.integers(0, 4, 50).astype(float)
    assert membership_attack(members, others, weights) == pytest.approx(
        attack_by_hand(members, others, weights), rel=1e-12
    )
    assert membership_attack(members, members, np.ones(30)) == pytest.approx((0.5, 0.0))
    assert membership_attack(members, np.full(3, np.nan), np.ones(3)) == pytest.approx((np.nan, np.nan), nan_ok=True)
    assert membership_attack(np.array([np.nan, 0.0]), np.array([np.nan, 1.0]), np.ones(2)) == (1.0, 1.0)


def test_distances_are_those_of_dense_products():
    one, other = adapter(0), adapter(1)
    far = sum(float((change(one, site) - change(other, site)).square().sum()) for site in ("a.q", "a.v"))
    size = sum(float(change(other, site).square().sum()) for site in ("a.q", "a.v"))
    assert distance_of(one, other) == pytest.approx(math.sqrt(far / size), rel=1e-6)
    assert distance_of(one, one) < 1e-7
    bias, wanted = one["head/bias"], other["head/bias"]
    assert head_distance(one, other) == pytest.approx(float((bias - wanted).norm() / wanted.norm()), rel=1e-6)
