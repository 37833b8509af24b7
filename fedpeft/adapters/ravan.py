"""RAVAN: several trained cores between frozen factors. Raje et al. 2025, arXiv 2506.05568.

    W' = W + s sum_h c_h B_h H_h A_h,   h = 1 ... heads;   B_h, A_h of rank r / heads x heads, frozen, orthonormal

At equal values sent, `heads` cores of (r x r) span heads r ranks. The factors of all heads together are orthonormal, so
that heads do not overlap. H_h starts at zero. What a client sends is c_h H_h: a change is linear in it, and an average
of clients' adapters is exact.

Deviations: c_h, which the paper trains beside H_h and folds into it before it is sent, is 1 and does not train. The
factors are drawn from the run's seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.adapters.factored import Factored, Tensors
from fedpeft.adapters.grouped import Values
from fedpeft.config import option


class RAVAN(Factored):
    """Several trained cores of r x r between frozen factors."""

    paper = "Raje et al. 2025, arXiv 2506.05568"
    averages = ("H",)
    drawn = ("A", "B")

    @dataclass
    class Config:
        heads: int = option(4, "cores of each layer; adapter.r times it is at most the layer's rank", low=1)

    def start(self, weight: Tensor, r: int, scale: float, generator: torch.Generator) -> Tensors:
        """H zero, A [heads r, in] with orthonormal rows, B [out, heads r] with orthonormal columns."""
        ranks = self.config.heads * r
        B, A = (
            torch.linalg.qr(torch.randn(size, ranks, generator=generator, dtype=torch.float64)).Q.float()
            for size in weight.shape
        )
        return {"H": torch.zeros(self.config.heads, r, r), "A": A.T.contiguous(), "B": B}

    def least(self, weight: Tensor) -> int:
        """What leaves room for all heads."""
        smallest: int = min(weight.shape)
        return smallest // int(self.config.heads)

    @classmethod
    def fold(cls, own: Values, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """B with the cores in the diagonal, and A."""
        return own["B"] @ torch.block_diag(*own["H"]), own["A"]

    @classmethod
    def product(cls, x: Tensor, own: Values, shape: tuple[int, int]) -> Tensor:
        """Each core with its ranks between products that are everybody's."""
        cores = own["H"]
        inner = (x @ own["A"].mT).unflatten(-1, (cores.shape[-3], -1)).transpose(-2, -3)
        through: Tensor = (inner @ cores.mT).transpose(-2, -3).flatten(-2)
        return through @ own["B"].mT
