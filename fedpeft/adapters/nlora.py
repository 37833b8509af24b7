"""A trained core between factors: SLoRA, NLoRA and IntTune. Guo et al. 2025, arXiv 2502.14482.

    W' = W + s B N A,   B [out, r], N [r, r], A [r, in]

`train: all` trains all three, from `init: kaiming` (SLoRA: A and N Kaiming-uniform, B zero) or `init: block` (NLoRA:
A, B and N are the first rows, columns and their corner of W, as in the Nystroem method). `train: core` is IntTune: N
alone, r^2 values a layer, in which a change is linear, so an average of clients' adapters is exact; of all three it is
biased as LoRA's is, and a core more.

Deviations: a start that is not zero, which the public code leaves standing, is taken off the base, so that the
untrained model is the base. The pseudo-inverse of the corner, which is Nystroem's, is left out, as it is there (in a
comment). With `init: kaiming` and `train: core`, B is Kaiming-uniform and N zero, since with B zero nothing would
train.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedpeft.adapters.factored import Factored, Tensors, draw_kaiming
from fedpeft.adapters.grouped import Values
from fedpeft.config import option


class NLoRA(Factored):
    """A core of r x r, alone or with the factors around it."""

    paper = "Guo et al. 2025, arXiv 2502.14482"
    averages = ("N", "A", "B")
    drawn = ("fixed_A", "fixed_B")
    moves = True

    @dataclass
    class Config:
        init: str = option(
            "kaiming", "factors: Kaiming-uniform draws, or rows and columns of W", choices=("kaiming", "block")
        )
        train: str = option("all", "all three, or the core alone (IntTune)", choices=("all", "core"))

    def start(self, weight: Tensor, r: int, scale: float, generator: torch.Generator) -> Tensors:
        """A, B and N; what does not train is drawn."""
        if self.config.init == "block":
            A, B, N = weight[:r].clone(), weight[:, :r].clone(), weight[:r, :r].clone()
        else:
            A, N = draw_kaiming(r, weight.shape[1], generator), draw_kaiming(r, r, generator)
            B = torch.zeros(weight.shape[0], r)
            if self.config.train == "core":
                B, N = draw_kaiming(weight.shape[0], r, generator), torch.zeros(r, r)
        return {"N": N, **({"A": A, "B": B} if self.config.train == "all" else {"fixed_A": A, "fixed_B": B})}

    @classmethod
    def moving_start(cls, options: dict[str, Any]) -> str | None:
        """Rows and columns of W have a product."""
        return super().moving_start(options) if options["init"] == "block" else None

    @classmethod
    def fold(cls, own: Values, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """B N, and A."""
        A, B = cls._factors(own)
        return B @ own["N"], A

    @classmethod
    def product(cls, x: Tensor, own: Values, shape: tuple[int, int]) -> Tensor:
        """B (N (A x)): factors that are everybody's stay one product."""
        A, B = cls._factors(own)
        return ((x @ A.mT) @ own["N"].mT) @ B.mT

    @classmethod
    def _factors(cls, own: Values) -> tuple[Tensor, Tensor]:
        return (own["A"], own["B"]) if "A" in own else (own["fixed_A"], own["fixed_B"])
