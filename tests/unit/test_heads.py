"""Closed-form heads: sums over owners give the head of all records, whatever the order; solutions against slow ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft.continual.body import Classifier
from fedpeft.continual.head import Head
from fedpeft.continual.heads.aligned import Aligned
from fedpeft.continual.heads.lda import LDA
from fedpeft.continual.heads.ncm import NCM
from fedpeft.continual.heads.ranpac import RIDGES, RanPAC

C, D, N = 5, 12, 400
UNUSED = Classifier(C, D, 0, 1e-3)
HEADS = {
    "ncm": lambda: NCM(C, D, 0),
    "ncm cosine": lambda: NCM(C, D, 0, distance="cosine"),
    "lda": lambda: LDA(C, D, 0),
    "ranpac": lambda: RanPAC(C, D, 0, features=60),
    "ranpac fixed": lambda: RanPAC(C, D, 0, features=60, ridge=0.1),
    "aligned": lambda: Aligned(C, D, 0),
}


def data(seed: int = 0, noise: float = 1.0, count: int = N) -> tuple[Tensor, Tensor]:
    """Correlated Gaussian classes, float32 as features are: the means differ least where the spread is greatest."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(D, D)) * np.geomspace(3, 0.2, D)
    means = np.random.default_rng(98).normal(size=(C, D))
    labels = rng.integers(0, C, count)
    features = means[labels] + noise * rng.normal(size=(count, D)) @ mix.T
    return torch.from_numpy(features.astype(np.float32)), torch.from_numpy(labels)


def fitted(head: Head, parts: list[tuple[Tensor, Tensor]], seen: list[int] | None = None) -> Head:
    for features, labels in parts:
        head.update(head.statistics(features, labels), list(range(C)) if seen is None else seen)
    return head


@pytest.mark.parametrize("name", HEADS)
def test_owners_in_any_order_give_the_head_of_all_records(name):
    features, labels = data()
    fresh, _ = data(seed=1, count=50)
    whole = fitted(HEADS[name](), [(features, labels)])
    order = np.random.default_rng(3).permutation(N)
    parts = [(features[part], labels[part]) for part in np.split(order, [30, 31, 250])]
    split = fitted(HEADS[name](), parts)
    for key, value in whole.sums.items():
        assert (split.sums[key] - value).abs().max() <= 1e-9 * max(1.0, value.abs().max().item()), key
        assert value.dtype == torch.float64
    together = HEADS[name]()
    sums = [together.statistics(*part) for part in parts]
    together.update({key: sum(found[key] for found in sums[1:]) + sums[0][key] for key in sums[0]}, list(range(C)))
    for other in (split, together):
        assert (other.scores(fresh, UNUSED) - whole.scores(fresh, UNUSED)).abs().max() <= 1e-6


@pytest.mark.parametrize("name", HEADS)
def test_order_of_tasks_changes_nothing(name):
    features, labels = data()
    tasks = [(features[labels == label], labels[labels == label]) for label in range(C)]
    fresh, _ = data(seed=1, count=50)
    forward, backward = fitted(HEADS[name](), tasks), fitted(HEADS[name](), tasks[::-1])
    assert (forward.scores(fresh, UNUSED) - backward.scores(fresh, UNUSED)).abs().max() <= 1e-6


@pytest.mark.parametrize("name", HEADS)
def test_it_learns_and_a_row_is_scored_alone(name):
    head = fitted(HEADS[name](), [data(count=1500)])
    fresh, labels = data(seed=1)
    scores = head.scores(fresh, UNUSED)
    assert (scores.argmax(1) == labels).float().mean() > 0.4
    alone = torch.cat([head.scores(row[None], UNUSED) for row in fresh[:20]])
    assert torch.allclose(alone, scores[:20], atol=1e-9)


@pytest.mark.parametrize("name", [name for name in HEADS if name != "lda"])
def test_classes_without_a_record_cannot_be_answered(name):
    features, labels = data()
    some = (labels == 1) | (labels == 3)
    head = fitted(HEADS[name](), [(features[some], labels[some])], seen=[1, 2, 3])
    scores = head.scores(features, UNUSED)
    assert scores[:, [0, 2, 4]].eq(float("-inf")).all() and scores[:, [1, 3]].isfinite().all()


@pytest.mark.parametrize("name", HEADS)
def test_state_comes_back_bit_for_bit(name):
    features, labels = data()
    head = fitted(HEADS[name](), [(features, labels)])
    other = HEADS[name]()
    other.load(head.state())
    assert torch.equal(other.scores(features, UNUSED), head.scores(features, UNUSED))


def test_ncm_by_hand():
    head = NCM(3, 2, 0)
    head.update(head.statistics(torch.tensor([[0.0, 0], [2, 0], [5, 4], [9, 9]]), torch.tensor([0, 0, 1, 2])), [0, 1])
    found = head.scores(torch.tensor([[3.0, 1.0]]), UNUSED)[0].tolist()
    assert found == [1 * 3 - 0.5, 5 * 3 + 4 * 1 - 41 / 2, float("-inf")]
    cosine = NCM(3, 2, 0, distance="cosine")
    cosine.update(cosine.statistics(torch.tensor([[1.0, 0], [0, 10]]), torch.tensor([0, 1])), [0, 1])
    assert cosine.scores(torch.tensor([[3.0, 4.0]]), UNUSED)[0, :2].tolist() == pytest.approx([0.6, 0.8])


def test_ranpac_is_the_ridge_solution_in_numpy():
    features, labels = data()
    head = fitted(RanPAC(C, D, 0, features=60, ridge=0.1), [(features, labels)])
    h = np.maximum(features.double().numpy() @ head.drawn[0].numpy(), 0)
    gram = h.T @ h
    expected = np.linalg.solve(gram + 0.1 * np.trace(gram) / 60 * np.eye(60), h.T @ np.eye(C)[labels.numpy()])
    assert np.abs(head.solution.numpy() - expected).max() < 1e-9


@pytest.mark.parametrize("noise", [0.3, 1.0, 5.0])
def test_ranpac_takes_the_ridge_that_is_best_on_the_held_out_rows(noise):
    """Slowly: fit on the other rows, sum squared errors row by row."""
    features, labels = data(noise=noise)
    head = fitted(RanPAC(C, D, 0, features=60), [(features, labels)])
    held = head.held_out(features).numpy()
    h = np.maximum(features.double().numpy() @ head.drawn[0].numpy(), 0)
    y = np.eye(C)[labels.numpy()]
    errors = []
    for ridge in RIDGES:
        gram = h[~held].T @ h[~held]
        weights = np.linalg.solve(gram + ridge * np.trace(gram) / 60 * np.eye(60), h[~held].T @ y[~held])
        errors.append(((h[held] @ weights - y[held]) ** 2).sum())
    assert head.ridge == RIDGES[int(np.argmin(errors))]


def test_ranpac_wants_a_stronger_ridge_for_fewer_records():
    few, many = (fitted(RanPAC(C, D, 0, features=300), [data(count=count)]) for count in (80, 6000))
    assert few.ridge > 5 * many.ridge


def test_ranpac_holds_out_a_fifth_of_every_class_by_the_row_alone():
    features, labels = data(count=5000)
    head = RanPAC(C, D, 0, features=10)
    held = head.held_out(features)
    order = torch.from_numpy(np.random.default_rng(0).permutation(5000))
    assert torch.equal(head.held_out(features[order]), held[order])
    assert torch.equal(head.held_out(3 * features.double()), head.held_out(features))
    for label in range(C):
        assert 0.15 < held[labels == label].float().mean() < 0.25


def test_aligned_keeps_the_classes_covariances():
    features, labels = data()
    head = fitted(Aligned(C, D, 0, ridge=1e-9, samples=20000, epochs=1), [(features, labels)])
    rows = features[labels == 2].double()
    mean, covariance = head.gaussian(2)
    assert torch.allclose(mean, rows.mean(0)) and torch.allclose(covariance, rows.T.cov(correction=0), atol=1e-6)
    drawn = head.samples(2)
    assert torch.equal(drawn, head.samples(2)) and not torch.equal(drawn[:50] - mean, head.samples(1)[:50] - mean)
    assert (drawn.T.cov() - covariance).norm() / covariance.norm() < 0.05


def test_aligned_uses_the_covariance_that_a_nearest_mean_ignores():
    train, (fresh, labels) = data(count=1500), data(seed=1, count=1500)
    right = {
        name: (fitted(HEADS[name](), [train]).scores(fresh, UNUSED).argmax(1) == labels).float().mean()
        for name in ("ncm", "aligned")
    }
    assert right["aligned"] > right["ncm"] + 0.1
