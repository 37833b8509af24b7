"""Scaled SGD: each factor's gradient is divided by the other's Gram matrix. Zhang and Pilanci, arXiv 2402.02347.

    A -= lr (B^T B + d I)^-1 g_A,    B -= lr g_B (A A^T + d I)^-1

Both at the old values. The step of the product B A then does not hang on how it is split into factors. The head takes
plain steps; weight decay is decoupled. Where B is small (it starts at 0) so is what g_A is divided by, noise of DP-SGD
included: a larger `damping` bounds that.

Deviations: d is `damping`, and ten times what rounding leaves of an eigenvalue of zero: B may have a lower rank than r.
The paper's scaled AdamW is not offered.

    >>> import torch
    >>> from torch import nn
    >>> from fedpeft.clients.optimizers.base import Layout
    >>> from fedpeft.config import ClientConfig
    >>> weights = nn.Parameter(torch.tensor([[2.0, 4.0]]))  # of one client, A = 2 and B = 4
    >>> weights.grad = torch.tensor([[16.0, 4.0]])
    >>> layout = Layout({"q/A": torch.Size([1, 1]), "q/B": torch.Size([1, 1])}, {"q": 1.0})
    >>> Riemannian(damping=0.0).make([weights], ClientConfig(lr=1.0), layout).step()
    >>> weights.detach().round(decimals=5).tolist()
    [[1.0, 3.0]]
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedpeft.clients.optimizers.stacked import Gram, Moving, PairedSGD
from fedpeft.config import option


class Riemannian(PairedSGD):
    """SGD preconditioned by the other factor, so that a step of B A does not hang on its split."""

    paper = "Zhang and Pilanci 2024, arXiv 2402.02347"

    @dataclass
    class Config:
        damping: float = option(1e-6, "added to the diagonal of the Gram matrices: B may be 0", above=0)

    def directions(self, A: Moving, B: Moving, scale: float) -> tuple[Tensor, Tensor]:
        inner, outer = (Gram.of(matrix, self.config.damping) for matrix in (B.value.mT, A.value))
        return inner.solve(A.gradient), outer.solve(B.gradient.mT).mT
