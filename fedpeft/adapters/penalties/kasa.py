"""KaSA's penalty: small singular values between factors that are near orthonormal. Wang et al., arXiv 2412.06071.

    R = mean over layers of  beta || d ||^2 + gamma (|| A A^T - I ||_F + || B^T B - I ||_F)

for dW = s B diag(d) A, which `adapter=sorsa` is. beta and gamma are those of the authors' code.

Deviations: the r x r products, as peft has them, where the authors' code takes the wide ones, A^T A - I, whose
distance is at least sqrt(in - r) whatever A is. The norm is smooth at zero (`base.lack_orthonormality`). KaSA's own
start, which drops the smallest singular values of W for good, is peft's `kasa_config`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fedpeft.adapters.grouped import Values
from fedpeft.adapters.penalties.base import OverFactors, lack_orthonormality
from fedpeft.config import option


class KaSAPenalty(OverFactors):
    """Singular values stay small, and the factors around them near orthonormal."""

    paper = "Wang et al. 2024, arXiv 2412.06071"
    roles = ("A", "B", "d")

    @dataclass
    class Config:
        beta: float = option(1e-4, "weight of the squared singular values", low=0)
        gamma: float = option(1e-3, "weight of both distances from orthonormal", low=0)

    def value(self, own: Values, weight: Callable[[], Tensor]) -> Tensor:
        """Both terms."""
        of_A, of_B = lack_orthonormality(own)
        total: Tensor = self.config.beta * own["d"].square().sum(-1) + self.config.gamma * (of_A + of_B)
        return total
