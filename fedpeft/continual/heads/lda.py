"""Linear discriminant head: class means and one shared covariance from sums, so exact over tasks and over owners.

Panos et al. (first-session adaptation), arXiv 2303.13199; the classical rule:

    n_c, s_c = counts and feature sums of class c,   G = sum_i f_i f_i^T,   N = sum_c n_c
    mu_c = s_c / n_c,   S = (G - sum_c n_c mu_c mu_c^T) / N + ridge I
    score_c = mu_c^T S^-1 f - mu_c^T S^-1 mu_c / 2     (+ log n_c / N with `prior`)

Deviations: the authors' code takes the total covariance of all features (about the origin of the grand mean) plus I;
`covariance: total` gives that, `within` the within-class scatter of the textbook rule. The ridge is relative: it is
multiplied by the mean of the diagonal of S, so that it means the same at every feature scale. Theirs divides by N - 1
where ours has N: with a relative ridge that is one factor on all scores, and changes no answer without `prior`. All in
float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.config import option
from fedpeft.continual.body import Classifier, only_classes
from fedpeft.continual.head import Head


class LDA(Head):
    """Linear discriminant analysis from additive statistics."""

    takes_noise = True
    paper = "Panos et al. 2023, arXiv 2303.13199"

    @dataclass
    class Config:
        covariance: str = option(
            "within", "scatter within classes, or total covariance of all features", choices=("within", "total")
        )
        ridge: float = option(1e-2, "added to the diagonal, in units of its mean", above=0)
        prior: bool = option(False, "add the log share of each class")

    def statistics(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        features = features.double()
        one_hot = torch.nn.functional.one_hot(labels, self.classes).double()
        return {"count": one_hot.sum(0), "sum": one_hot.T @ features, "gram": features.T @ features}

    def solve(self) -> None:
        count, total = self.sums["count"], self.sums["sum"]
        mean = total / count.clamp(min=1)[:, None]
        if self.config.covariance == "within":
            spread = mean.T @ (mean * count[:, None])
        else:
            grand = total.sum(0) / count.sum()
            spread = count.sum() * torch.outer(grand, grand)
        covariance = (self.sums["gram"] - spread) / count.sum()
        self.known = [label for label in self.seen if count[label] > 0]
        # Eigenvalues, not a solve: noised sums are neither symmetric nor positive.
        values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
        scale = values.mean().clamp(min=1e-12)
        values = values.clamp(min=0) + self.config.ridge * scale  # noise in the sums may make some negative
        self.weight = mean @ (vectors / values) @ vectors.T
        self.bias = -0.5 * (self.weight * mean).sum(1)
        if self.config.prior:
            self.bias = self.bias + (count / count.sum()).clamp(min=1e-300).log()

    def scores(self, features: Tensor, classifier: Classifier | None) -> Tensor:
        return only_classes(features.double() @ self.weight.T + self.bias, self.known)
