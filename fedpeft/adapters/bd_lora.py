"""BD-LoRA: one factor of LoRA is block-diagonal. Wang et al. 2025, arXiv 2510.23346.

    W' = W + s blockdiag(B_1, ..., B_n) A,   A [r, in],   B_j [out / n, r / n]

Each n-th of the outputs hangs on an n-th of the ranks, so that serving on n devices needs no exchange between them, and
a client sends r in + r out / n values a layer. `adapter.options.blocks` is n.

Deviations: B has the blocks in every layer; the paper's have them in B or in A by how a layer is split over devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.adapters.factored import Factored, Tensors, draw_kaiming
from fedpeft.adapters.grouped import Values
from fedpeft.config import option
from fedpeft.errors import InputError


class BDLoRA(Factored):
    """LoRA whose B is block-diagonal."""

    paper = "Wang et al. 2025, arXiv 2510.23346"
    averages = ("A", "B")

    @dataclass
    class Config:
        blocks: int = option(2, "blocks of B; divides adapter.r and the outputs of every layer", low=1)

    def start(self, weight: Tensor, r: int, scale: float, generator: torch.Generator) -> Tensors:
        """A Kaiming-uniform, the blocks of B [n, out / n, r / n] zero."""
        n, out = self.config.blocks, weight.shape[0]
        if r % n or out % n:
            raise InputError(f"adapter.blocks={n} does not divide adapter.r={r} and the {out} outputs of a layer.")
        return {"A": draw_kaiming(r, weight.shape[1], generator), "B": torch.zeros(n, out // n, r // n)}

    @classmethod
    def fold(cls, own: Values, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The blocks in their places, and A."""
        return torch.block_diag(*own["B"]), own["A"]

    @classmethod
    def product(cls, x: Tensor, own: Values, shape: tuple[int, int]) -> Tensor:
        """Each block with its ranks."""
        blocks = own["B"]
        inner = (x @ own["A"].mT).unflatten(-1, (blocks.shape[-3], -1)).transpose(-2, -3)  # [..., blocks, rows, ranks]
        outputs: Tensor = (inner @ blocks.mT).transpose(-2, -3).flatten(-2)
        return outputs
