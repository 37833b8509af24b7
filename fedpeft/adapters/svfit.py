"""SVFit and CLIP-SVD: the singular values of the frozen weight train. Sun et al. 2024, arXiv 2409.05926; Koleilat et
al. 2025, arXiv 2509.03740.

    W = U S V^T,   W' = W + s U_r diag(d) V_r^T,   d_0 = 0;   U_r, V_r: the r leading singular vectors, frozen

d [r] is what the singular values move by. A change is linear in d: an average of clients' adapters is exact.

`adapter.options.energy` chooses the r of each layer in the place of adapter.r: the smallest whose squared singular
values are that share of all. SVFit's is 0.99, and 1 is CLIP-SVD, all min(out, in) of them, whatever the layers' shapes.

U and V are sent, not drawn: which of the signs a machine chooses, and what singular values that are nearly equal mix,
is no function of the weight.

Deviations: s = alpha / adapter.r in front of d, which is 1 in the papers (adapter.alpha=adapter.r). SVFit's abstract
says "over 99 % of the matrix's information"; that it is of the squares is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.adapters.factored import Factored, Tensors, singular_factors
from fedpeft.adapters.grouped import Values
from fedpeft.config import option


class SVFit(Factored):
    """Singular values of each frozen weight train."""

    paper = "Sun et al. 2024, arXiv 2409.05926; all of them: CLIP-SVD, Koleilat et al. 2025, arXiv 2509.03740"
    averages = ("d",)

    @dataclass
    class Config:
        energy: float | None = option(
            None,
            "share of the squared singular values that train, in the place of adapter.r; 1 is all",
            above=0,
            high=1,
        )

    def start(self, weight: Tensor, r: int, scale: float, generator: torch.Generator) -> Tensors:
        """d zero, the leading singular vectors."""
        U, S, V = singular_factors(weight)
        if self.config.energy is not None:
            r = count_leading(S, self.config.energy)
        return {"d": torch.zeros(r), "U": U[:, :r], "V": V[:r]}

    def least(self, weight: Tensor) -> int:
        """As many as there are; any where adapter.r does not say how many."""
        return super().least(weight) if self.config.energy is None else weight.numel()

    @classmethod
    def fold(cls, own: Values, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """U diag(d), and V."""
        return own["U"] * own["d"].unsqueeze(-2), own["V"]

    @classmethod
    def product(cls, x: Tensor, own: Values, shape: tuple[int, int]) -> Tensor:
        """U (d * V x): factors that are everybody's stay one product."""
        return (x @ own["V"].mT * own["d"].unsqueeze(-2)) @ own["U"].mT


def count_leading(S: Tensor, energy: float) -> int:
    """The smallest number of singular values [k], largest first, whose squares are this share of all.

    >>> count_leading(torch.tensor([3.0, 1.0, 0.1]), 0.8), count_leading(torch.tensor([3.0, 1.0, 0.1]), 1.0)
    (1, 3)
    """
    shares = S.double().square().cumsum(0) / S.double().square().sum()
    return len(S) if energy == 1 else int((shares < energy).sum()) + 1
