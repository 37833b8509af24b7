"""PEGO: what is learned stays away from what the base knows, and its parts from each other. Hu et al., ECCV 2024,
arXiv 2407.15085.

The ranks of a LoRA are a group of n LoRAs of r / n each, B A = sum_i B_i A_i, and

    R = lambda * mean over layers of  sum_i || W (B_i A_i)^T ||^2  +  sum_{i<j} || B_i A_i (B_j A_j)^T ||^2

The first term preserves: the input directions that A_i reads are to be those of which W makes little. The second
diversifies. Both are zero, with all slopes, where B is, as in an untrained LoRA.

No product of factors is made: with P = W A_i^T, || P B_i^T ||^2 = sum (P^T P) * (B_i^T B_i), of r x r, and likewise
the second.

Deviations: squared Frobenius norms, which the authors' code has as a comment, where it sums magnitudes: those need
the dense out x out products of every layer, step and client. The mean over layers, where the authors sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.adapters.grouped import Values
from fedpeft.adapters.penalties.base import OverFactors, say_name
from fedpeft.config import option
from fedpeft.errors import InputError


class PEGOPenalty(OverFactors):
    """Parts of an adapter stay orthogonal to the base weight and to each other."""

    paper = "Hu et al. 2024, arXiv 2407.15085"

    @dataclass
    class Config:
        lambda_: float = option(1e-3, "weight of both terms", above=0)
        groups: int = option(2, "parts that the ranks are split into; divides adapter.r", low=1)

    def require_fit(self, shapes: Mapping[str, torch.Size], site: str) -> None:
        """Whole parts."""
        super().require_fit(shapes, site)
        if shapes["A"][0] % self.config.groups:
            raise InputError(
                f"{say_name(self)}: adapter.penalty_options.groups={self.config.groups} does not divide the rank "
                f"{shapes['A'][0]} of {site}. Take a divisor of adapter.r."
            )

    def value(self, own: Values, weight: Callable[[], Tensor]) -> Tensor:
        """Both terms."""
        A, B, n = own["A"], own["B"], self.config.groups
        # Read anew in each step: a base in few bits is never in memory whole.
        W = weight().to(A.dtype)
        reached = (A @ W.mT).unflatten(-2, (n, -1))  # [..., n, r / n, out]
        parts = B.mT.unflatten(-2, (n, -1))
        grams = parts @ parts.mT  # [..., n, r / n, r / n]
        total = ((reached @ reached.mT) * grams).sum((-3, -2, -1))
        rows = A.unflatten(-2, (n, -1))
        for i in range(n):
            for j in range(i + 1, n):
                across = rows[..., i, :, :] @ rows[..., j, :, :].mT
                total = total + ((grams[..., i, :, :] @ across) * (across @ grams[..., j, :, :])).sum((-2, -1))
        weighted: Tensor = self.config.lambda_ * total
        return weighted
