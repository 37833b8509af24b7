"""SORSA: the leading part of the frozen weight's SVD trains as such. Cao 2024, arXiv 2409.00055.

    W = U S V^T,   W' = (W - s U_r diag(S_r) V_r^T) + s B diag(d) A,   B_0 = U_r, d_0 = S_r / s, A_0 = V_r

The start is taken off the base, so that the untrained model is the base.

The paper's penalty, which keeps B and A near orthonormal, is `adapter.penalty=sorsa`, here as with other adapters;
without it they move freely.

Deviations: d_0 = S_r / s, so that the part that trains is that of W whatever adapter.alpha is; the authors' code has
d_0 = S_r and takes s times it off the base, which is the same at their default, s = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedpeft.adapters.factored import Factored, Tensors, singular_factors
from fedpeft.adapters.grouped import Values


class SORSA(Factored):
    """Leading singular vectors and values of each frozen weight train."""

    paper = "Cao 2024, arXiv 2409.00055"
    averages = ("A", "B", "d")
    moves = True

    def start(self, weight: Tensor, r: int, scale: float, generator: torch.Generator) -> Tensors:
        """The leading triple."""
        U, S, V = singular_factors(weight)
        return {"A": V[:r], "B": U[:, :r], "d": S[:r] / scale}

    @classmethod
    def fold(cls, own: Values, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """B diag(d), and A."""
        return own["B"] * own["d"].unsqueeze(-2), own["A"]

    @classmethod
    def product(cls, x: Tensor, own: Values, shape: tuple[int, int]) -> Tensor:
        """B (d * A x)."""
        return (x @ own["A"].mT * own["d"].unsqueeze(-2)) @ own["B"].mT
