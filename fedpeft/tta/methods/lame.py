"""LAME: correct a batch's predictions so that neighbours in feature space agree; no weight changes.

Minimise over rows y_i on the simplex, p_i the base's predictions, w_ij affinities of its features:

    J(Y) = sum_i KL(y_i || p_i) - (lambda / 2) sum_ij w_ij y_i . y_j

by the concave-convex step, closed and parallel over rows, from Y = p (Boudiaf et al., arXiv 2201.05718):

    y_i  ∝  p_i exp(lambda sum_j w_ij y_j)

Written from these equations. For symmetric positive semi-definite W the steps never raise J. So the default affinity,
k nearest neighbours, is symmetrised, shifted by -lambda_min(W) I and scaled to row sums of at most k; `symmetric` and
`psd` false give the plain one. `rbf` is exp(-d^2 / 2 sigma^2), sigma the batch mean of the distance to the k-th nearest
(self counted), `linear` the cosine; RBF row sums grow with the batch, and it collapses where few classes meet a large
i.i.d. batch. Rows change together: `max_changed` gives the base's answer where a larger share of labels would change.

    >>> import torch
    >>> p = torch.tensor([[0.6, 0.4], [0.4, 0.6]])
    >>> Y, steps = solve(p, torch.zeros(2, 2), 1.0, 100, 1e-6)
    >>> bool(torch.allclose(Y, p)), steps
    (True, 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft.config import option
from fedpeft.tta.deployed import Batch
from fedpeft.tta.method import Outputs
from fedpeft.tta.parts import scores
from fedpeft.tta.parts.wrapped import WrappedMethod, WrapperConfig


@dataclass
class LAMEConfig(WrapperConfig):
    """Options of `lame`: the affinities w, and when the iteration ends or gives up."""

    affinity: str = option("knn", "affinity of features", choices=("knn", "rbf", "linear"))
    k: int = option(5, "neighbours", low=1)
    lambda_: float = option(1.0, "weight of the pairwise term", low=0)
    symmetric: bool = option(True, "knn: use (W + W') / 2")
    psd: bool = option(True, "knn: shift W to be positive semi-definite, row sums at most k; needs symmetric")
    max_iterations: int = option(100, "most steps", low=1)
    tolerance: float = option(1e-6, "stop when no entry of Y changes by more", above=0)
    max_changed: float = option(
        1.0, "share of labels that may change; above it the base's answer is given", low=0, high=1
    )


class LAME(WrappedMethod):
    """Laplacian-adjusted maximum likelihood: neighbours in the batch agree."""

    Config: ClassVar[Any] = LAMEConfig
    paper = "Boudiaf et al. 2022, arXiv 2201.05718"

    def __init__(self, model: Any, seed: int = 0, **options: Any) -> None:
        super().__init__(model, seed, **options)
        self.model.require_head()

    def _outputs(self, batch: Batch, learn: bool) -> Outputs:
        base, config = self.base._outputs(batch, learn), self.config
        probs = base.prediction
        assert base.features is not None  # there is a head
        W = affinity(config.affinity, base.features.detach(), config.k, config.symmetric, config.psd)
        Y, _ = solve(probs, W, config.lambda_, config.max_iterations, config.tolerance)
        changed = (Y.argmax(-1) != probs.argmax(-1)).float().mean()
        if float(changed) > config.max_changed:
            Y = probs
        return Outputs(base.logits, base.features, Y, {"base": base})

    def _update(self, batch: Batch, outputs: Outputs) -> str | None:
        return self._learn_base(batch, outputs.extra["base"])


def affinity(kind: str, features: Tensor, k: int, symmetric: bool = True, psd: bool = True) -> Tensor:
    """W [N, N] of L2-normalised features [N, D]."""
    f = F.normalize(features, dim=-1)
    if kind == "linear":
        return f @ f.T
    # By products, near neighbours would come out at distances of rounding.
    distance = torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist")
    rows = len(f)
    if kind == "rbf":
        sigma = distance.kthvalue(min(k, rows), dim=-1).values.mean().clamp(min=1e-12)
        return torch.exp(-distance.square() / (2 * sigma**2))
    W = torch.zeros_like(distance)
    if rows == 1:
        return W
    # Or each would be its own nearest neighbour.
    nearest = distance.fill_diagonal_(torch.inf).topk(min(k, rows - 1), largest=False).indices
    W.scatter_(1, nearest, 1.0)
    if symmetric:
        W = (W + W.T) / 2
    if symmetric and psd:
        # In double precision, or rounding could leave W short of semi-definite.
        W = W - min(0.0, float(torch.linalg.eigvalsh(W.double())[0])) * torch.eye(rows).to(W)
        # Never up: that would be a larger lambda.
        W = W * (k / W.sum(-1).max()).clamp(max=1)
    return W


def solve(probs: Tensor, W: Tensor, weight: float, max_iterations: int, tolerance: float) -> tuple[Tensor, int]:
    """Y [N, K] and the steps it took."""
    # p stays that of the base in all steps, and only Y moves.
    log_p, Y = scores.log(probs), probs
    steps = 0
    while steps < max_iterations:
        steps += 1
        new = (log_p + weight * W @ Y).softmax(-1)
        change, Y = float((new - Y).abs().max()), new
        if change < tolerance:
            break
    return Y, steps


def energy(Y: Tensor, probs: Tensor, W: Tensor, weight: float) -> float:
    """J(Y)."""
    return float((Y * (scores.log(Y) - scores.log(probs))).sum() - weight / 2 * (W * (Y @ Y.T)).sum())
