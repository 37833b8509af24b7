"""SVFit and CLIP-SVD: the singular values of the frozen weight train. Arxiv 2409.05926; 2509.03740.

    W = U S V^T,   W' = W + s U_r diag(d) V_r^T,   d_0 = 0;   U_r, V_r: the r leading singular vectors, frozen

d [r] is what the singular values move by. A change is linear in d: an average of clients' adapters is exact. SVFit
takes r so that most of the energy stays, CLIP-SVD all of them (adapter.r = min(out, in)).

U and V are sent, not drawn: which of the signs a machine chooses, and what singular values that are nearly equal mix,
is no function of the weight.

Deviations: s = alpha / r in front of d, which is 1 in the papers (adapter.alpha=adapter.r).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedpeft.adapters.factored import Factored, Tensors, singular_factors
from fedpeft.adapters.grouped import Values


class SVFit(Factored):
    """Singular values of each frozen weight train."""

    paper = "Sun et al. 2024, arXiv 2409.05926; all of them: CLIP-SVD, arXiv 2509.03740"
    averages = ("d",)

    def start(self, weight: Tensor, r: int, scale: float, generator: torch.Generator) -> Tensors:
        """d zero, the leading singular vectors."""
        U, _, V = singular_factors(weight)
        return {"d": torch.zeros(r), "U": U[:, :r], "V": V[:r]}

    @classmethod
    def fold(cls, own: Values, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """U diag(d), and V."""
        return own["U"] * own["d"].unsqueeze(-2), own["V"]

    @classmethod
    def product(cls, x: Tensor, own: Values, shape: tuple[int, int]) -> Tensor:
        """U (d * V x): factors that are everybody's stay one product."""
        return (x @ own["V"].mT * own["d"].unsqueeze(-2)) @ own["U"].mT
