"""Ridge regression on random features of the features: one linear solve from additive sums.

McDonnell et al., RanPAC, arXiv 2307.02251:

    h = ReLU(W_rand^T f),   W_rand [D, M] ~ N(0, 1), never trained
    G = sum_i h_i h_i^T,   Q = sum_i h_i y_i^T  (y one-hot)
    scores = h^T (G + lambda I)^-1 Q

The ridge: the sums are kept in two folds, a fifth of the records and the rest. For each lambda the solution of the rest
has on the fifth the squared error

    n - 2 tr(W^T Q_held) + tr(W^T G_held W),   n the records held out

and the smallest decides; the final solution is of both. As in the authors' code training records decide and no test
record does; two things differ. The fold is a function of the record's own features (not of its place in a loader, so
it is the same for every order and every owner, and a copy falls where its original does), and the error is over all
tasks so far, not over the last one's split. lambda is relative: decades of the mean of G's diagonal, so that it means
the same at every scale (authors: 1e-8 to 1e8, M = 10,000). A tie, and too few records to hold out, give the strongest.

    >>> import torch
    >>> head = RanPAC(3, 2, 0, features=50, ridge=0.01)
    >>> features, labels = torch.eye(3)[:, :2].repeat(4, 1), torch.arange(3).repeat(4)
    >>> head.update(head.statistics(features, labels), [0, 1, 2])
    >>> head.solution.shape, head.ridge
    (torch.Size([50, 3]), 0.01)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft import seeds
from fedpeft.config import option
from fedpeft.continual.body import Classifier, only_classes
from fedpeft.continual.head import Head

FOLDS = ("fit", "held")
HELD = 0.2
WAVES = 1000.0  # periods of the fold rule over the unit sphere: many, so that it cuts through every class alike
RIDGES = tuple(10.0**exponent for exponent in range(2, -7, -1))


class RanPAC(Head):
    """Random projection, ReLU, ridge regression.

    Attributes:
        ridge: what was chosen, or given, in units of the mean of G's diagonal.
        solution: weights [M, C].
    """

    paper = "McDonnell et al. 2023, arXiv 2307.02251"

    @dataclass
    class Config:
        features: int = option(1000, "random features M; the sums have 2 M^2 numbers", low=1)
        ridge: float | None = option(
            None, "in units of the mean of G's diagonal; chosen on held-out records when null", above=0
        )

    def __init__(self, classes: int, width: int, seed: int, **options: Any) -> None:
        super().__init__(classes, width, seed, **options)
        self.ridge = 0.0

    @cached_property
    def drawn(self) -> tuple[Tensor, Tensor]:
        """The projection [width, M], and the unit vector [width] of `held_out`: not drawn to check a config."""
        draw = seeds.torch_generator(self.seed, "ranpac")
        projection = torch.randn(self.width, self.config.features, generator=draw, dtype=torch.float64)
        return projection, F.normalize(torch.randn(self.width, generator=draw, dtype=torch.float64), dim=0)

    def statistics(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        features = features.double()
        hidden, one_hot = self._project_features(features), F.one_hot(labels, self.classes).double()
        held = self.held_out(features)
        found: dict[str, Tensor] = {}
        for name, rows in zip(FOLDS, (~held, held), strict=True):
            h, y = hidden[rows], one_hot[rows]
            found |= {f"{name}/gram": h.T @ h, f"{name}/cross": h.T @ y, f"{name}/count": y.sum(0)}
        return found

    def held_out(self, features: Tensor) -> Tensor:
        """Which rows [N] belong to the fold that chooses the ridge: a pseudo-random fifth, by the row alone."""
        angle = F.normalize(features.double(), dim=1) @ self.drawn[1]
        return (angle * WAVES) % 1 < HELD

    def solve(self) -> None:
        count = self.sums["fit/count"] + self.sums["held/count"]
        self.known = [label for label in self.seen if count[label] > 0]
        gram = self.sums["fit/gram"] + self.sums["held/gram"]
        cross = self.sums["fit/cross"] + self.sums["held/cross"]
        self.ridge = self.config.ridge or self._choose_ridge()
        self.solution = _solve_ridge(gram, cross, self.ridge)

    def scores(self, features: Tensor, classifier: Classifier | None) -> Tensor:
        return only_classes(self._project_features(features.double()) @ self.solution, self.known)

    def _project_features(self, features: Tensor) -> Tensor:
        return (features @ self.drawn[0]).relu()

    def _choose_ridge(self) -> float:
        """The ridge with the smallest squared error on the held-out fold."""
        gram, cross = self.sums["held/gram"], self.sums["held/cross"]
        errors = []
        for ridge in RIDGES:
            weights = _solve_ridge(self.sums["fit/gram"], self.sums["fit/cross"], ridge)
            # Without n, which is the same for all.
            errors.append(float(((gram @ weights - 2 * cross) * weights).sum()))
        # The strongest is first in the list, so that it wins a tie.
        return RIDGES[errors.index(min(errors))]


def _solve_ridge(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """(G + ridge mean(diag G) I)^-1 Q."""
    scale = gram.diagonal().mean().clamp(min=1e-12)
    factor = torch.linalg.cholesky(gram + ridge * scale * torch.eye(len(gram), dtype=gram.dtype))
    return torch.cholesky_solve(cross, factor)
