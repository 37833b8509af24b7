"""LoRA-Pro, SGD form: factor gradients whose product step is nearest to that of the whole weight. arXiv 2407.18242.

    g_A* = (B^T B)^-1 g_A / s^2 + X A
    g_B* = (I - B (B^T B)^-1 B^T) g_B (A A^T)^-1 / s^2 - B X
    X solves  B^T B X + X A A^T = -(B^T B)^-1 g_A A^T / s^2

(s of s B A). X does not move the product; it makes the factors' gradients shortest in change. With G the gradient of
the whole weight, s B g_A* + s g_B* A is the projection of G on what a step of the factors can reach. Where B = 0, at
the start, g_A* = g_A (it is zero) and g_B* = g_B (A A^T)^-1 / s^2. The head takes plain steps; weight decay is
decoupled. Where B is small what it is divided by is small, noise of DP-SGD included: a larger `damping` bounds that.

Deviations: Gram matrices have `damping`, and ten times what rounding leaves of an eigenvalue of zero, on the diagonal:
B may have a lower rank than r. The Adam form, which keeps moments of whole weights, is not offered.

    >>> from fedpeft.config import ClientConfig
    >>> LoRAPro().has_state(ClientConfig())
    False
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.clients.optimizers.stacked import Gram, Moving, PairedSGD
from fedpeft.config import option


class LoRAPro(PairedSGD):
    """SGD whose step of the product is the nearest to a step of the whole weight."""

    paper = "Wang et al. 2024, arXiv 2407.18242"

    @dataclass
    class Config:
        damping: float = option(1e-8, "added to the diagonal of the Gram matrices", above=0)

    def directions(self, A: Moving, B: Moving, scale: float) -> tuple[Tensor, Tensor]:
        inner, outer = (Gram.of(matrix, self.config.damping) for matrix in (B.value.mT, A.value))
        down = inner.solve(A.gradient) / scale**2
        up = outer.solve(B.gradient.mT).mT / scale**2
        across = up - B.value @ inner.solve(B.value.mT @ up)
        # In the eigenvectors of both Gram matrices the equation of X is one of numbers.
        C = inner.vectors.mT @ (-down @ A.value.mT) @ outer.vectors
        X = inner.vectors @ (C / (inner.values[:, :, None] + outer.values[:, None, :])) @ outer.vectors.mT
        begins = (B.value == 0).all(dim=(1, 2), keepdim=True)  # a client's own business
        # There `inner` is its damping alone: noise of DP in g_A, divided by that, would be all of the step.
        return torch.where(begins, A.gradient, down + X @ A.value), torch.where(begins, up, across - B.value @ X)
