"""SoMA: the minor part of the frozen weight's SVD trains. Yun et al. 2025, arXiv 2412.04077.

    W = U S V^T,   W' = (W - s B_0 A_0) + s B A,   B_0 = U_{-r} sqrt(S_{-r} / s),   A_0 = sqrt(S_{-r} / s) V_{-r}

the r smallest singular values: what a pretrained model has least of is what a task may change. The start is taken off
the base, so that the untrained model is the base. An average is biased as PiSSA's is. The paper's first version calls
it SoRA.

Deviations: the first blocks are not left out by itself (adapter.target_modules names layers), weight decay is what
client.weight_decay says, and the biases of the layers, which train in the authors' code by default, are frozen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedpeft.adapters.factored import Factored, Tensors, singular_factors
from fedpeft.adapters.grouped import Values


class SoMA(Factored):
    """LoRA that begins as the smallest singular components of each frozen weight."""

    paper = "Yun et al. 2025, arXiv 2412.04077"
    averages = ("A", "B")
    moves = True

    def start(self, weight: Tensor, r: int, scale: float, generator: torch.Generator) -> Tensors:
        """The last components, each root to one factor."""
        U, S, V = singular_factors(weight)
        root = (S[-r:] / scale).sqrt()
        return {"A": root[:, None] * V[-r:], "B": U[:, -r:] * root}

    @classmethod
    def fold(cls, own: Values, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """As they are."""
        return own["B"], own["A"]
