"""SALT: leading singular values are scaled and shifted, the rest gets a low-rank change. Elsayed et al. 2025, arXiv
2503.16055.

    W = U S V^T,   W' = W + s (U_q diag(a * S_q + b) V_q^T + U_p X Y V_p^T),   q = adapter.r leading, p the others
    a_0 = b_0 = 0,   X_0 ~ 0.01 N(0, 1),   Y_0 = 0

a, b [q], X [p, k] and Y [k, p] train; `adapter.options.rank` is k. `train: values` trains a and b alone: a change is
then linear in them, and an average exact. X Y is a product, and biased as LoRA's is.

Deviations: a is what the scale differs from one by. Y begins at zero, where the authors' code draws it and so begins
beside the base. Their relu over all of S + a S + b and S_p + X Y is left out: it would cut every negative entry of X Y,
and leave a change that is of no rank. Their penalty on the size of both changes is weight decay's work here.

U and V are sent, all of both unless only values train: twice the size of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.adapters.factored import Factored, Tensors, singular_factors
from fedpeft.adapters.grouped import Values
from fedpeft.config import option


class SALT(Factored):
    """Leading singular values scale and shift, the subspace of the others has a LoRA of its own."""

    paper = "Elsayed et al. 2025, arXiv 2503.16055"
    averages = ("a", "b", "X", "Y")

    @dataclass
    class Config:
        rank: int = option(4, "of the change in the subspace of the other singular values", low=1)
        train: str = option("all", "all, or the values alone: then averages are exact", choices=("all", "values"))

    def start(self, weight: Tensor, r: int, scale: float, generator: torch.Generator) -> Tensors:
        """Zeros, but for X; the bases, leading ones first."""
        U, S, V = singular_factors(weight)
        found = {"a": torch.zeros(r), "b": torch.zeros(r), "S": S[:r]}
        if self.config.train == "values":
            return {**found, "U": U[:, :r], "V": V[:r]}
        rest, rank = len(S) - r, self.config.rank
        X = 0.01 * torch.randn(rest, rank, generator=generator)
        return {**found, "X": X, "Y": torch.zeros(rank, rest), "U": U, "V": V}

    def least(self, weight: Tensor) -> int:
        """One less than there are, where others train too."""
        return super().least(weight) - int(self.config.train == "all")

    @classmethod
    def fold(cls, own: Values, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """U_q diag(a S + b) beside U_p X, and V_q over Y V_p."""
        q = own["S"].shape[-1]
        B, A = own["U"][..., :q] * cls._change(own), own["V"][..., :q, :]
        if "X" in own:
            B = torch.cat([B, own["U"][..., q:] @ own["X"]], dim=-1)
            A = torch.cat([A, own["Y"] @ own["V"][..., q:, :]], dim=-2)
        return B, A

    @classmethod
    def product(cls, x: Tensor, own: Values, shape: tuple[int, int]) -> Tensor:
        """Through both bases once: they are everybody's."""
        q = own["S"].shape[-1]
        inner = x @ own["V"].mT
        changed = inner[..., :q] * cls._change(own)
        if "X" in own:
            changed = torch.cat([changed, (inner[..., q:] @ own["Y"].mT) @ own["X"].mT], dim=-1)
        return changed @ own["U"].mT

    @classmethod
    def _change(cls, own: Values) -> Tensor:
        return (own["a"] * own["S"] + own["b"]).unsqueeze(-2)
