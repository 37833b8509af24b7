"""LoCA: a few coefficients of the cosine transform of a change train. Du et al., ICLR 2025, arXiv 2502.06820.

    W' = W + s C^T F D = W + s sum_k a_k c_{p_k} d_{q_k}^T,   a_0 = 0

C [out, out] and D [in, in] are the orthonormal DCT-II, c_p and d_q their rows, and F has the coefficients a_k at n
places (p_k, q_k). adapter.r is n (1000 in the paper), whatever the rank of the change is, and all that a client sends.
A change is linear in a: an average of clients' adapters is exact.

Deviations: the places are drawn once, without repetition and the same for all. The paper moves them in the first tenth
of the steps, by differences of neighbouring coefficients: clients would move theirs elsewhere, and an average of
coefficients of other frequencies means nothing. s = alpha / n, which is 1 there (adapter.alpha=adapter.r).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from fedpeft.adapters.factored import Factored, Tensors
from fedpeft.adapters.grouped import Values


class LoCA(Factored):
    """Coefficients of a cosine transform train, at places that are drawn once."""

    paper = "Du et al. 2025, arXiv 2502.06820"
    averages = ("a",)
    drawn = ("key",)

    def start(self, weight: Tensor, r: int, scale: float, generator: torch.Generator) -> Tensors:
        """Zeros, and the number that the places are drawn from."""
        number = torch.randint(2**20, (1,), generator=generator)  # whole numbers that float32 holds
        return {"a": torch.zeros(r), "key": number.float()}

    def least(self, weight: Tensor) -> int:
        """As many as there are coefficients."""
        return weight.numel()

    @classmethod
    def fold(cls, own: Values, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The sums over what has one column q, C^T F there, and those rows of D."""
        left, right, columns = cls._find_basis(own, shape)
        first, place = columns.unique(return_inverse=True)
        B = left.new_zeros(shape[0], len(first)).index_add(1, place, left.T * own["a"])
        A = right.new_zeros(len(first), shape[1]).index_copy(0, place, right)
        return B, A

    @classmethod
    def product(cls, x: Tensor, own: Values, shape: tuple[int, int]) -> Tensor:
        """C^T (a * D x), of the rows that have a coefficient."""
        left, right, _ = cls._find_basis(own, shape)
        outputs: Tensor = (x @ right.T * own["a"].unsqueeze(-2)) @ left
        return outputs

    @classmethod
    def _find_basis(cls, own: Values, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        left, right, columns = make_basis(int(own["key"]), own["a"].shape[-1], *shape)
        return left.to(own["a"]), right.to(own["a"]), columns.to(own["a"].device)


# One for each layer: every pass asks for it again.
@lru_cache(maxsize=256)
def make_basis(number: int, n: int, out: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """c_p [n, out] and d_q [n, in] of the n places that a number stands for, and the q [n]; in float32 on the CPU."""
    generator = torch.Generator().manual_seed(number)
    places = torch.randperm(out * width, generator=generator)[:n]
    return make_cosines(places // width, out), make_cosines(places % width, width), places % width


def make_cosines(rows: Tensor, size: int) -> Tensor:
    """Rows [n, size] of the orthonormal DCT-II, by their numbers [n].

    >>> whole = make_cosines(torch.arange(5), 5)
    >>> torch.allclose(whole @ whole.T, torch.eye(5), atol=1e-6)
    True
    """
    frequencies, middles = rows.double(), torch.arange(size, dtype=torch.float64) + 0.5
    waves = torch.cos(math.pi / size * frequencies[:, None] * middles) * math.sqrt(2 / size)
    return torch.where(rows[:, None] == 0, math.sqrt(1 / size), waves).float()
