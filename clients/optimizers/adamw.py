"""AdamW, torch's own: moments of each value's gradient, bias-corrected; weight decay apart from them.

    theta -= lr wd theta;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    theta -= lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

Loshchilov and Hutter, arXiv 1711.05101.

    >>> from fedpeft.config import ClientConfig
    >>> weights = nn.Parameter(torch.ones(2))
    >>> weights.grad = torch.tensor([5.0, -0.1])
    >>> AdamW().make([weights], ClientConfig(lr=0.1), Layout({}, {})).step()
    >>> weights.detach()
    tensor([0.9000, 1.1000])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedpeft.clients.optimizers.base import ClientOptimizer, Layout
from fedpeft.config import ClientConfig, option


@dataclass
class AdamConfig:
    """Decay of both moments, and what keeps the divisor from zero."""

    beta1: float = option(0.9, "decay of the mean of gradients", low=0, high=0.9999)
    beta2: float = option(0.999, "decay of the mean of their squares", low=0, high=0.999999)
    eps: float = option(1e-8, "added to the root of the mean square", above=0)


class AdamW(ClientOptimizer):
    """Steps by the mean gradient over its root mean square; decoupled weight decay."""

    paper = "Loshchilov and Hutter 2017, arXiv 1711.05101"
    Config = AdamConfig

    def make(self, weights: Sequence[nn.Parameter], client: ClientConfig, layout: Layout) -> torch.optim.Optimizer:
        config = self.config
        return torch.optim.AdamW(
            weights,
            lr=client.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=client.weight_decay,
        )
