"""SORSA's penalty: both factors stay near orthonormal. Cao 2024, arXiv 2409.00055.

    R = gamma * mean over all factors of  || A A^T - I ||_F,  || B^T B - I ||_F

as the authors' code has it (`calc_ortho`). It goes with `adapter=sorsa`, whose factors begin as singular vectors, and
with any adapter that has A and B.

Deviations: the norm is smooth at zero (`base.lack_orthonormality`). The authors divide gamma by the rate, so that a
step pulls by the same whatever the schedule is; here it is a weight of the loss, as all penalties' are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fedpeft.adapters.grouped import Values
from fedpeft.adapters.penalties.base import OverFactors, lack_orthonormality
from fedpeft.config import option


class SORSAPenalty(OverFactors):
    """The rows of A and the columns of B stay near orthonormal."""

    paper = "Cao 2024, arXiv 2409.00055"

    @dataclass
    class Config:
        gamma: float = option(0.1, "weight of the mean over factors", above=0)

    def value(self, own: Values, weight: Callable[[], Tensor]) -> Tensor:
        """Half the sum of both distances."""
        of_A, of_B = lack_orthonormality(own)
        total: Tensor = self.config.gamma / 2 * (of_A + of_B)
        return total
