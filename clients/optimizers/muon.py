"""Muon: the momentum of a matrix with its singular values made equal, by Newton-Schulz. Jordan et al. 2024.

    M = mu M + (1 - mu) G;   N = (1 - mu) G + mu M  (nesterov) or M
    X = N / ||N||_F;  five times  X = a X + (b X X^T + c (X X^T)^2) X   (a, b, c = 3.4445, -4.775, 2.0315)
    W = (1 - lr wd) W - lr sqrt(max(1, rows / columns)) X

as torch.optim.Muon has it (`adjust_lr_fn=original`), but over all clients at once: [K, rows, columns]. Factors and
cores are matrices to it; the head takes AdamW's steps, as is usual.

Deviations: torch iterates in bfloat16, this in the dtype of the weights.

    >>> from fedpeft.clients.optimizers.base import Layout
    >>> weights = nn.Parameter(torch.zeros(1, 4))
    >>> weights.grad = torch.tensor([[3.0, 0.0, 0.0, 1.0]])  # singular values 3 and 1
    >>> Muon().make([weights], ClientConfig(lr=1.0), Layout({"q/A": torch.Size([2, 2])}, {})).step()
    >>> bool(((weights.abs() > 0.6) == torch.tensor([[1, 0, 0, 1]])).all())
    True
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedpeft.clients.optimizers.adamw import AdamConfig
from fedpeft.clients.optimizers.base import ClientOptimizer, Layout
from fedpeft.clients.optimizers.stacked import Moving, Stacked, adam_direction
from fedpeft.config import ClientConfig, option

# Steep at zero and not made to converge: in five steps singular values come to between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.775, 2.0315)
ROLES = ("A", "B", "R")


@dataclass
class MomentumConfig(AdamConfig):
    """Options of what steps a matrix by its momentum made even; beta1, beta2 and eps are of AdamW, for the head."""

    decay: float = option(0.95, "mu, decay of the momentum", low=0, high=0.9999)
    nesterov: bool = option(True, "Nesterov's form of the momentum")
    iterations: int = option(5, "of Newton-Schulz", low=1, high=20)


class EvenMomentum(ClientOptimizer):
    """Steps factors and cores as matrices, each by a momentum of its own kind; the head by AdamW."""

    Config: ClassVar[type] = MomentumConfig

    def move_matrix(self, tensor: Moving, lr: float, weight_decay: float, step: int) -> None:
        """Step a factor [K, rows, columns] of K clients, in place; `exp_avg_sq` is free for what it keeps."""
        raise NotImplementedError

    def find_momentum(self, tensor: Moving) -> Tensor:
        """N [K, rows, columns], the momentum or Nesterov's form of it; moves the momentum."""
        mean = tensor.state["exp_avg"].lerp_(tensor.gradient, 1 - self.config.decay)
        return tensor.gradient.lerp(mean, self.config.decay) if self.config.nesterov else mean

    def make(self, weights: Sequence[nn.Parameter], client: ClientConfig, layout: Layout) -> torch.optim.Optimizer:
        config = self.config

        def move(tensors: dict[str, Moving], lr: float, step: int) -> None:
            for name, tensor in tensors.items():
                if name.rpartition("/")[2] in ROLES:
                    self.move_matrix(tensor, lr, client.weight_decay, step)
                else:
                    tensor.value.mul_(1 - lr * client.weight_decay)
                    tensor.value.sub_(lr * adam_direction(tensor, step, config.beta1, config.beta2, config.eps))

        return Stacked(weights, client.lr, layout, ("exp_avg", "exp_avg_sq"), move)


class Muon(EvenMomentum):
    """Momentum of each factor, its singular values made equal; AdamW for the head."""

    paper = "Jordan et al. 2024, kellerjordan.github.io/posts/muon"

    def move_matrix(self, tensor: Moving, lr: float, weight_decay: float, step: int) -> None:
        ahead = self.find_momentum(tensor)
        tensor.value.mul_(1 - lr * weight_decay)
        tensor.value.sub_(lr * scale_of_shape(ahead) * even_out(ahead, self.config.iterations))


def scale_of_shape(matrices: Tensor) -> float:
    """sqrt(max(1, rows / columns)), by which Muon lengthens the steps of tall matrices [K, rows, columns]."""
    rows, columns = matrices.shape[1:]
    return math.sqrt(max(1.0, rows / columns))


def even_out(matrices: Tensor, iterations: int) -> Tensor:
    """Matrices [K, rows, columns] with about equal singular values (0.7 to 1.2) and the singular vectors of these."""
    a, b, c = COEFFICIENTS
    # The side of the rank: products are [K, r, r], not [K, out, out].
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    # A gradient of zero, which A's is while B is zero, stays zero and does not become 0 / 0.
    X: Tensor = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        square = X @ X.mT
        X = a * X + (b * square + c * square @ square) @ X
    return X.mT if matrices.shape[1] > matrices.shape[2] else X
