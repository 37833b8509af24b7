"""PaCA: some columns of the frozen weight train. Woo et al. 2025, arXiv 2503.01905.

    W' = W + s D E_J,   J: r input columns drawn once for all,   E_J [r, in] its rows of the identity,   D_0 = 0

The backward pass needs x at r places only, and a merged model has no extra product. A change is linear in D [out, r]:
an average of clients' adapters is exact.

Deviations: D is the difference from the frozen columns, where the paper trains P = W_J; s is 1 there. Only weight
decay tells them apart, which draws to the frozen columns here and to zero there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedpeft.adapters.factored import Factored, Tensors
from fedpeft.adapters.grouped import Values


class PaCA(Factored):
    """Some input columns of each frozen weight train."""

    paper = "Woo et al. 2025, arXiv 2503.01905"
    averages = ("D",)
    drawn = ("J",)

    def start(self, weight: Tensor, r: int, scale: float, generator: torch.Generator) -> Tensors:
        """D zero, J without repetition and sorted."""
        columns = torch.randperm(weight.shape[1], generator=generator)[:r].sort().values
        return {"D": torch.zeros(weight.shape[0], r), "J": columns.float()}  # numbers, as all of a state

    def least(self, weight: Tensor) -> int:
        """As many as there are columns."""
        return weight.shape[1]

    @classmethod
    def fold(cls, own: Values, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """D, and rows of the identity."""
        return own["D"], torch.nn.functional.one_hot(own["J"].long(), shape[1]).to(own["D"])

    @classmethod
    def product(cls, x: Tensor, own: Values, shape: tuple[int, int]) -> Tensor:
        """D x_J: no product with the rows of the identity."""
        return x[..., own["J"].long()] @ own["D"].mT
