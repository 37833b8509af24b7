"""Nearest class mean: counts and sums of features, the fewest statistics that a head can do with.

Mensink et al., IEEE TPAMI 35(11), 2013; the prototype classifier of Zhou et al., arXiv 2303.07338:

    mu_c = s_c / n_c
    score_c = -||f - mu_c||^2 / 2 + ||f||^2 / 2 = mu_c^T f - ||mu_c||^2 / 2      euclidean
    score_c = f^T mu_c / (||f|| ||mu_c||)                                        cosine

All in float64. A class that no record was seen of cannot be answered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft.config import option
from fedpeft.continual.body import Classifier, only_classes
from fedpeft.continual.head import Head


class NCM(Head):
    """Nearest class mean from additive statistics."""

    takes_noise = True
    paper = "Mensink et al. 2013, IEEE TPAMI 35(11)"

    @dataclass
    class Config:
        distance: str = option("euclidean", "how near a mean is", choices=("euclidean", "cosine"))

    def statistics(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        one_hot = F.one_hot(labels, self.classes).double()
        return {"count": one_hot.sum(0), "sum": one_hot.T @ features.double()}

    def solve(self) -> None:
        self.known = [label for label in self.seen if self.sums["count"][label] > 0]
        # Of a class without records 0, not 0 / 0: it is not `known`, but its row is multiplied with like the others.
        mean = self.sums["sum"] / self.sums["count"].clamp(min=1)[:, None]
        if self.config.distance == "cosine":
            mean = F.normalize(mean, dim=1)
            self.bias = torch.zeros(self.classes, dtype=torch.float64)
        else:
            self.bias = -0.5 * (mean**2).sum(1)
        self.weight = mean

    def scores(self, features: Tensor, classifier: Classifier | None) -> Tensor:
        features = features.double()
        if self.config.distance == "cosine":
            features = F.normalize(features, dim=1)
        return only_classes(features @ self.weight.T + self.bias, self.known)
