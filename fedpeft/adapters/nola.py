"""NOLA: LoRA's factors as sums of random ones. Koohpayegani et al. 2023, arXiv 2310.02556.

    W' = W + s B A,   A = A_0 + sum_k a_k A_k,   B = sum_k b_k B_k
    A_0 Kaiming-uniform; A_k, B_k ~ U(-1, 1) / sqrt(K)

Only a and b [K] train and travel, whatever the rank and the width are. The random factors are made anew from a number
that every client draws from the run's seed, and are in no message and in no state.

dW is bilinear in (a, b): an average of both is biased. `train: beta` trains b alone, from a drawn A: then it is exact.

The equations and starts are those of the authors' code for GPT; their code for images begins with a_k = b_k = 1 / K,
which is no start from the base.

Deviations: K is `adapter.options.basis`, 64 a factor here where the paper has 1024 for large models.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fedpeft.adapters.factored import Factored, Tensors, draw_kaiming
from fedpeft.adapters.grouped import Values
from fedpeft.config import option


class NOLA(Factored):
    """Coefficients of random factors train, whatever the rank is."""

    paper = "Koohpayegani et al. 2023, arXiv 2310.02556"
    averages = ("a", "b")
    drawn = ("key",)

    @dataclass
    class Config:
        basis: int = option(64, "random factors of each of A and B", low=1)
        train: str = option("both", "a and b, or b alone: then averages are exact", choices=("both", "beta"))

    def start(self, weight: Tensor, r: int, scale: float, generator: torch.Generator) -> Tensors:
        """Zeros, and the number that the random factors are made of, with the rank."""
        number = torch.randint(2**20, (1,), generator=generator)  # whole numbers that float32 holds
        K = self.config.basis
        found = {"b": torch.zeros(K), "key": torch.tensor([float(number), float(r), float(K)])}
        return found | ({"a": torch.zeros(K)} if self.config.train == "both" else {})

    @classmethod
    def fold(cls, own: Values, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The sums."""
        first, As, Bs = (value.to(own["b"]) for value in make_basis(*map(int, own["key"].tolist()), *shape))
        A = first if "a" not in own else first + (own["a"] @ As.flatten(1)).unflatten(-1, first.shape)
        return (own["b"] @ Bs.flatten(1)).unflatten(-1, Bs.shape[1:]), A


# One for each layer: every pass asks for it again.
@lru_cache(maxsize=256)
def make_basis(number: int, r: int, count: int, out: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """A_0 [r, in], A_k [K, r, in] and B_k [K, out, r], in float32 on the CPU."""
    generator = torch.Generator().manual_seed(number)
    As, Bs = ((2 * torch.rand(count, *shape, generator=generator) - 1) / count**0.5 for shape in ((r, width), (out, r)))
    return draw_kaiming(r, width, generator), As, Bs
