"""Heads against their textbook form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft.continual.learner import Learner
from support import continual_parts as parts


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample(seed: int = 0) -> tuple[Tensor, Tensor]:
    labels = torch.arange(90) % 6
    return 2 * draw(6, 12, seed=seed)[labels] + draw(90, 12, seed=seed + 1), labels


def head_of(name: str, options: dict[str, Any]) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A head fitted on the sample, its scores there, features and labels."""
    features, labels = sample()
    made = Learner(parts.stream(), parts.model(), "frozen", {name: options}, parts.TrainConfig(), 0)
    head = made.heads[name]["online"]
    head.update(head.statistics(features, labels), list(range(6)))
    return head, head.scores(features, made.classifier), features.double(), labels


def fitted(name: str, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    return head_of(name, options)[1:]


def test_lda_is_scikit_learns():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    scores, features, labels = fitted("lda", {"ridge": 1e-12})
    reference = LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / 6] * 6).fit(features.numpy(), labels.numpy())
    theirs = torch.from_numpy(reference.decision_function(features.numpy()))
    gaps, expected = scores - scores[:, :1], theirs - theirs[:, :1]
    assert torch.allclose(gaps, expected, rtol=1e-5, atol=1e-5)


def test_total_covariance_is_that_of_all_features():
    """The first-session rule: S = Cov of all features + ridge, score = mu S^-1 f - mu S^-1 mu / 2."""
    scores, features, labels = fitted("lda", {"covariance": "total", "ridge": 0.1})
    covariance = torch.from_numpy(np.cov(features.numpy().T, bias=True))
    covariance = covariance + 0.1 * covariance.diagonal().mean() * torch.eye(12)
    mean = torch.stack([features[labels == c].mean(0) for c in range(6)])
    weight = torch.linalg.solve(covariance, mean.T).T
    assert torch.allclose(scores, features @ weight.T - 0.5 * (weight * mean).sum(1), atol=1e-8)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_ncm_is_the_nearest_mean(distance):
    scores, features, labels = fitted("ncm", {"distance": distance})
    mean = torch.stack([features[labels == c].mean(0) for c in range(6)])
    if distance == "euclidean":
        nearest = torch.cdist(features, mean).argmin(1)
    else:
        nearest = torch.cosine_similarity(features[:, None], mean[None], dim=-1).argmax(1)
    assert torch.equal(scores.argmax(1), nearest)


def test_ranpac_is_ridge_regression_on_random_features():
    """scores = h (H^T H + ridge I)^-1 H^T Y by least squares on stacked rows, the ridge in units of the mean square."""
    head, scores, features, labels = head_of("ranpac", {"features": 40, "ridge": 0.03})
    H, Y = (features @ head.drawn[0]).relu(), torch.nn.functional.one_hot(labels, 6).double()
    ridge = 0.03 * (H**2).sum(0).mean()
    stacked = torch.cat([H, ridge.sqrt() * torch.eye(40).double()]), torch.cat([Y, torch.zeros(40, 6)])
    assert torch.allclose(scores, H @ torch.linalg.lstsq(*stacked).solution, atol=1e-8)


def test_ranpac_chooses_its_ridge_on_the_records_it_holds_out():
    """Among all decades the one with the smallest squared error on held-out rows of a fit on the others."""
    head, _, features, labels = head_of("ranpac", {"features": 40})
    H, Y = (features @ head.drawn[0]).relu(), torch.nn.functional.one_hot(labels, 6).double()
    held = head.held_out(features)
    assert 5 <= int(held.sum()) <= 35

    def error(ridge: float) -> float:
        fit = H[~held]
        gram = fit.T @ fit
        weights = torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(40).double(), fit.T @ Y[~held])
        return float(((H[held] @ weights - Y[held]) ** 2).sum())

    errors = {10.0**exponent: error(10.0**exponent) for exponent in range(-6, 3)}
    assert errors[min(errors, key=lambda ridge: abs(ridge - head.ridge))] == pytest.approx(min(errors.values()))


def test_ranpac_draws_its_projection_from_the_seed_only():
    heads = [
        Learner(parts.stream(), parts.model(), "frozen", {"ranpac": {}}, parts.TrainConfig(), seed).heads["ranpac"][
            "online"
        ]
        for seed in (0, 0, 1)
    ]
    features, labels = sample()
    one, two, other = (head.statistics(features, labels) for head in heads)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_an_aligned_head_undoes_the_preference_for_new_classes():
    """A classifier trained task after task is not comparable over tasks; re-trained on class statistics it is fair.

    The body moves a hundred times slower than the classifier, as the method asks: statistics of old classes stay valid.
    """
    made = parts.run("sequential", ("linear", "aligned"), epochs=10, lr=1e-4)
    plain, aligned = (sum(made.right[name][-1]) for name in ("linear", "aligned"))
    assert aligned >= plain + 8
    biased = parts.learner("frozen", ("aligned",))
    features, labels = sample()
    with torch.no_grad():
        biased.classifier.bias[5] = 50.0
    head = biased.heads["aligned"]["online"]
    head.update(head.statistics(features, labels), list(range(6)))
    right = (head.scores(features, biased.classifier).argmax(1) == labels).float().mean()
    assert right > 0.9
