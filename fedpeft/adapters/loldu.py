"""LoLDU: the diagonal of the frozen weight's triangular factors trains. Shi et al. 2024, arXiv 2410.13618.

    W = P L D U,   W' = W + s (P L)_r diag(d) U_r,   d_0 = 0;   (P L)_r: r first columns, U_r: r first rows, frozen

from a decomposition with row pivots, D the diagonal that makes both triangles unit. d [r] is what D's first r entries
move by. A change is linear in d: an average of clients' adapters is exact. Averages of the factors themselves would
mean nothing, as clients could have chosen other pivots: they do not train, and are sent, not drawn.

A pivot that is nearly zero (1e-6 of the largest) has a row that cannot be made unit; it stays as the decomposition has
it. That may be so from the rank of W on, and of the first r of a weight of full rank is none.

Deviations: the residual W - s (P L)_r D_r U_r that the authors freeze is left in W, and d is the difference from D_r:
the same change. Their scale in front, which trains too, is s here and fixed: with it a change is bilinear, and averages
are 10 % off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedpeft.adapters.factored import Factored, Tensors
from fedpeft.adapters.grouped import Values

SMALLEST = 1e-6  # of the largest pivot


class LoLDU(Factored):
    """The diagonal between triangular factors of each frozen weight trains."""

    paper = "Shi et al. 2024, arXiv 2410.13618"
    averages = ("d",)

    def start(self, weight: Tensor, r: int, scale: float, generator: torch.Generator) -> Tensors:
        """d zero, the first columns and rows of the factors."""
        P, L, U = torch.linalg.lu(weight.double())
        pivots = U.diagonal()[:r, None]
        unit = torch.where(pivots.abs() > SMALLEST * U.diagonal().abs().max(), pivots, 1.0)
        return {"d": torch.zeros(r), "L": (P @ L[:, :r]).float(), "U": (U[:r] / unit).float()}

    @classmethod
    def fold(cls, own: Values, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """L diag(d), and U."""
        return own["L"] * own["d"].unsqueeze(-2), own["U"]

    @classmethod
    def product(cls, x: Tensor, own: Values, shape: tuple[int, int]) -> Tensor:
        """L (d * U x): factors that are everybody's stay one product."""
        return (x @ own["U"].mT * own["d"].unsqueeze(-2)) @ own["L"].mT
