"""InfLoRA: the rows of a task's A are fixed beforehand, outside the input space of old tasks; only B trains.

Liang & Li, arXiv 2404.00228. Per layer, x its inputs, G = sum x x^T over the records of a task, M [n, D] orthonormal,
the input space of all earlier tasks, s = alpha / r:

    before task t:  A_t = the r leading eigenvectors of (I - M M^T) G_t (I - M M^T), so that A_t M = 0
    training:       W_t = W + s (B_1 A_1 + ... + B_t A_t), only B_t moves; so W_t x = W_{t-1} x for x in span(M)
    after task t:   H = (I - M M^T) G_t (I - M M^T) with eigenvalues l_i; M <- [M, the first k eigenvectors of H], k the
                    smallest with (tr G_t - tr H + l_1 + ... + l_k) / tr G_t >= threshold

M is in `memory["bases"]` as `layer/M`. Where M fills the inputs nothing can be learned any more: `saturation()` is D/n,
and above 0.9 a warning is logged. Rows of A without a direction (the rank of H is below r) are zero, and stay so.

Deviations from the authors' code: DualGPM stores the complement of M where that is smaller; here M itself is kept (the
updates are the same). The threshold is constant; the authors raise it linearly to 1 over the tasks. Rows of A have norm
1, not 1/sqrt(3); give `alpha` accordingly. The shares are of G's eigenvalues (as in GPM); theirs of their squares, and
after the first task they keep one direction fewer than reaches the threshold (5 or 6 where ours are 10 to 12, for
random inputs of 32 dimensions and a threshold of 0.95). They take the left singular vectors of (I - M M^T) G, outside M
too, where ours are eigenvectors of the two-sided product (the two spans of rank 8 overlap by 88 % there). M is
orthonormalised again after it grew. B is the paper's A and A its B.

    >>> import torch
    >>> gram, M = torch.diag(torch.tensor([5.0, 3.0, 2.0]).double()), torch.eye(3)[:, :1]
    >>> rows(gram, M, 1).abs().tolist()                      # the best direction outside M
    [[0.0, 1.0, 0.0]]
    >>> grown(gram, M, 0.7).shape, grown(gram, M, 0.9).shape   # 0.5 is there; 0.8 with the second direction; then 1
    (torch.Size([3, 2]), torch.Size([3, 3]))
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedpeft.config import LEARNER, option
from fedpeft.continual.body import Body, make_leaf
from fedpeft.continual.model import Change
from fedpeft.continual.parts import lora
from fedpeft.data.encode import Encoded

NOTHING = 1e-8  # of tr G: what an eigenvalue must exceed to be a direction and not rounding (M is float32)


class InfLoRA(Body):
    """A LoRA for each task that does not see the inputs of earlier ones."""

    paper = "Liang & Li 2024, arXiv 2404.00228"
    needs = ("boundaries", "statistics")
    stays_central = ""
    renews = adds_up = surveys = True

    @dataclass
    class Config:
        r: int = option(8, "rank of each task's LoRA; else adapter.r", low=1, only=LEARNER)
        alpha: float = option(8.0, "scale of the LoRAs: alpha / r; else adapter.alpha", above=0, only=LEARNER)
        threshold: float = option(0.95, "share of the inputs' energy that is protected after a task", above=0, high=1)

    @classmethod
    def fixed_roles(cls, config: Any) -> tuple[str, ...]:
        return ("A",)

    def begin_task(self) -> None:
        lora.put_by(self)
        self.parameters = {}  # the new task's inputs are those under the finished adapters
        gram = self.survey()
        for layer in self.model.layers:
            m, n = self.model.base.shape(layer)
            M = self.memory["bases"].setdefault(f"{layer}/M", torch.zeros(n, 0))
            self.parameters[f"{layer}/A"] = make_leaf(rows(gram[f"{layer}/G"], M, self.config.r))
            self.parameters[f"{layer}/B"] = make_leaf(torch.zeros(m, self.config.r))

    def change(self) -> Change:
        return lora.sum_tasks(self, self.config.alpha / self.config.r)

    def statistics(self, data: Encoded) -> dict[str, Tensor]:
        """`layer/G` [n, n]: sums of x x^T over all tokens, in float64."""
        change = self.change()
        grams = {
            f"{layer}/G": torch.zeros(n, n).double()
            for layer, (_, n) in ((layer, self.model.base.shape(layer)) for layer in self.model.layers)
        }
        for inputs, _ in self.each_batch(data):
            for layer, x in self.model.observe(inputs, change).items():
                grams[f"{layer}/G"] += x.double().T @ x.double()
        return grams

    def end_task(self, statistics: dict[str, Tensor]) -> None:
        bases = self.memory["bases"]
        for layer in self.model.layers:
            bases[f"{layer}/M"] = grown(statistics[f"{layer}/G"], bases[f"{layer}/M"], self.config.threshold)
        full = [layer for layer, share in self.saturation().items() if share > 0.9]
        if full:
            logging.getLogger("fedpeft").warning(
                "inflora: after task %d the protected inputs fill over 90 %% of %s; little more can be learned there. "
                "Lower the threshold or adapt other layers.",
                self.index,
                ", ".join(full),
            )

    def saturation(self) -> dict[str, float]:
        """Share D/n of each layer's input space that is protected."""
        bases = self.memory["bases"]
        return {layer: bases[f"{layer}/M"].shape[1] / self.model.base.shape(layer)[1] for layer in self.model.layers}


def rows(gram: Tensor, M: Tensor, r: int) -> Tensor:
    """A [r, n], float32: the r leading directions of the inputs outside span(M), orthonormal; zero where there is none.

    Args:
        gram: sum of x x^T, [n, n].
        M: [n, D], orthonormal columns.
    """
    values, vectors = _eigen_outside(gram, M)
    A = torch.zeros(r, gram.shape[0])
    found = min(r, int((values > NOTHING * gram.trace()).sum()))
    A[:found] = vectors[:, :found].T.float()
    return A


def grown(gram: Tensor, M: Tensor, threshold: float) -> Tensor:
    """M with the fewest further directions so that its span has a share `threshold` of the energy tr(gram)."""
    values, vectors = _eigen_outside(gram, M)
    total = gram.trace()
    shares = 1 - (values.sum() - torch.cat([values.new_zeros(1), values.cumsum(0)])) / total.clamp(min=1e-300)
    # The share is a sum in float64: one that reaches the threshold may come out a rounding below it.
    wanted = int((shares < threshold - 1e-12).sum())
    wanted = min(wanted, int((values > NOTHING * total).sum()))
    basis: Tensor = torch.linalg.qr(torch.cat([M.double(), vectors[:, :wanted]], dim=1))[0]
    return basis.float()


def _eigen_outside(gram: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending and not negative, and eigenvectors [n, n] of the Gram matrix outside span(M)."""
    M = M.double()
    left = gram - M @ (M.T @ gram)
    # From both sides, so that what is left is symmetric and has eigenvectors outside of M.
    left = left - (left @ M) @ M.T
    # `eigh` reads one triangle only; the mean gives both the same say in rounding.
    values, vectors = torch.linalg.eigh((left + left.T) / 2)
    return values.flip(0).clamp(min=0), vectors.flip(1)
