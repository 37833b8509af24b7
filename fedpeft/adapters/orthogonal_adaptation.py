"""Orthogonal Adaptation: a LoRA whose A is a slot of one orthogonal basis, frozen. Po et al. 2023, arXiv 2312.02432.

    W' = W + s B A_i,   A_i: rows i r ... (i + 1) r - 1 of an orthogonal matrix of each layer, frozen;   B_0 = 0

`adapter.options.slot` is i. Only B trains: a change is linear in it, and an average of clients' adapters is exact. Runs
with one `run.seed` have one basis. In different slots A_i A_j^T = 0, so what one of them has learned says nothing where
another reads: `fedpeft merge RUN RUN --method orthogonal_adaptation` adds them up, and refuses runs that share a slot.
A layer of width n has floor(n / r) slots.

The basis is made block by block by a QR of Gaussian rows, of which slot i needs the first i + 1.

Deviations: the paper fixes the B of dW = A B^T; peft's A is that B^T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.adapters.factored import Factored, Tensors
from fedpeft.adapters.grouped import Values
from fedpeft.config import option


class OrthogonalAdaptation(Factored):
    """LoRA with a frozen A that is a slot of an orthogonal basis, so that runs in other slots add up."""

    paper = "Po et al. 2023, arXiv 2312.02432"
    averages = ("B",)
    drawn = ("A",)

    @dataclass
    class Config:
        slot: int = option(0, "which r rows of the basis A is; runs that are to be merged take one each", low=0)

    def start(self, weight: Tensor, r: int, scale: float, generator: torch.Generator) -> Tensors:
        """B zero, A with orthonormal rows."""
        out, width = weight.shape
        # Block by block, as one draw of more numbers need not begin with those of a draw of fewer.
        blocks = [torch.randn(width, r, generator=generator, dtype=torch.float64) for _ in range(self.config.slot + 1)]
        return {"B": torch.zeros(out, r), "A": orthonormalise_last(blocks).float()}

    def least(self, weight: Tensor) -> int:
        """What leaves room for this slot and those before it."""
        width: int = weight.shape[1]
        return width // int(self.config.slot + 1)

    @classmethod
    def fold(cls, own: Values, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """As they are."""
        return own["B"], own["A"]


def orthonormalise_last(blocks: list[Tensor]) -> Tensor:
    """The last of some blocks of columns [width, r] as rows [r, width], orthonormal and orthogonal to those before."""
    Q, R = torch.linalg.qr(torch.cat(blocks, dim=1))
    last: Tensor = (Q * R.diagonal().sign())[:, -blocks[-1].shape[1] :]
    return last.T.contiguous()
