"""NAMO and NAMO-D: Muon's even step whose length follows Adam's ratio of momentum to gradient. arXiv 2602.17080.

    M, N as in Muon;  v = b v + (1 - b) ||G||_F^2
    a = lr sqrt(1 - b^t) / (1 - mu^t) ||N||_F / (sqrt(v) + eps)
    W = (1 - wd min(a, 1)) W - min(0.2 a sqrt(max(rows, columns)), 1) Newton-Schulz(N)

The step shrinks where gradients of one direction stop following each other, as noise makes them: Muon's length is the
rate whatever the gradient is. NAMO-D has v, the ratio and so a for each column, the ratio held to [c, 1/c] times its
mean over the columns.

Where g_A = 0, at the start, N = 0 and nothing moves. Under DP-SGD the noise is in ||G|| and less of it in ||N||, so
steps are shorter than without.

Deviations, from the authors' code: Newton-Schulz in the dtype of the weights, not bfloat16; the head takes AdamW's
steps with beta2 = 0.999, as elsewhere here, where theirs is 0.95.

    >>> from torch import nn
    >>> from fedpeft.clients.optimizers.base import Layout
    >>> from fedpeft.config import ClientConfig
    >>> weights = nn.Parameter(torch.zeros(1, 4))
    >>> weights.grad = torch.tensor([[3.0, 0.0, 0.0, 1.0]])
    >>> NAMO().make([weights], ClientConfig(lr=0.1), Layout({"q/A": torch.Size([2, 2])}, {})).step()
    >>> bool(0 < weights.abs().max() < 0.2)
    True
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.clients.optimizers.muon import EvenMomentum, MomentumConfig, even_out
from fedpeft.clients.optimizers.stacked import Moving
from fedpeft.config import option


@dataclass
class NormConfig(MomentumConfig):
    """Options of both."""

    norm_decay: float = option(0.99, "b, decay of the squared norm of gradients", low=0, high=0.999999)
    scale: float = option(0.2, "of a step, beside sqrt(max(rows, columns))", above=0)


class NAMO(EvenMomentum):
    """Muon whose step has the length of Adam's ratio of norms; AdamW for the head."""

    paper = "Zhang et al. 2026, arXiv 2602.17080"
    Config = NormConfig

    def find_lengths(self, ahead: Tensor, tensor: Moving, step: int) -> Tensor:
        """||N|| over the root mean square of ||G||, [K, 1, 1]; 1 in the steady state of one direction."""
        return self.compare_norms(ahead, tensor, step, (1, 2))

    def compare_norms(self, ahead: Tensor, tensor: Moving, step: int, over: tuple[int, ...]) -> Tensor:
        """The ratio of norms over these axes, bias-corrected; moves the mean square of the gradient's."""
        config = self.config
        squared = tensor.gradient.square().sum(over, keepdim=True)
        # One number a matrix or column, in all of its places: state has the form of the weights.
        mean = tensor.state["exp_avg_sq"].mul_(config.norm_decay).add_((1 - config.norm_decay) * squared)
        # All rows of it say the same, and of NAMO all columns.
        mean = mean[:, :1, : squared.shape[2]]
        correction: float = math.sqrt(1 - config.norm_decay**step) / (1 - config.decay**step)
        ratio: Tensor = ahead.square().sum(over, keepdim=True).sqrt() / (mean.sqrt() + config.eps)
        return correction * ratio

    def move_matrix(self, tensor: Moving, lr: float, weight_decay: float, step: int) -> None:
        ahead = self.find_momentum(tensor)
        rates = lr * self.find_lengths(ahead, tensor, step)
        tensor.value.mul_(1 - weight_decay * rates.clamp(max=1.0))
        longest = self.config.scale * max(ahead.shape[1:]) ** 0.5
        tensor.value.sub_((longest * rates).clamp(max=1.0) * even_out(ahead, self.config.iterations))


class NAMOD(NAMO):
    """NAMO with a length for each column; AdamW for the head."""

    @dataclass
    class Config(NormConfig):
        clamp: float = option(0.75, "c: a column's ratio is held to [c, 1/c] times the mean", above=0, high=1)

    def find_lengths(self, ahead: Tensor, tensor: Moving, step: int) -> Tensor:
        """As NAMO's, of each column [K, 1, columns]."""
        ratios = self.compare_norms(ahead, tensor, step, (1,))
        mean = ratios.mean(2, keepdim=True)
        return torch.clamp(ratios, mean * self.config.clamp, mean / self.config.clamp)
