"""LoRA+: AdamW whose rate for B is `ratio` times that for A. Hayou et al., arXiv 2402.12354.

    eta_A = lr,  eta_B = ratio lr,  each by AdamW's rule

B starts at zero and A does not, so at one rate A hardly learns features in wide models. The head, and whatever else
trains, has A's rate.

Deviations: none; the paper finds ratios of 2 to 16 good, and 16 where nothing is known (its code's default).

    >>> from fedpeft.clients.optimizers.base import Layout
    >>> weights = nn.Parameter(torch.ones(1, 1))
    >>> weights.grad = torch.ones(1, 1)
    >>> layout = Layout({"q/B": torch.Size([1, 1])}, {})
    >>> LoRAPlus(ratio=4.0).make([weights], ClientConfig(lr=0.1), layout).step()
    >>> round(float(weights), 3)
    0.6
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedpeft.clients.optimizers.adamw import AdamConfig
from fedpeft.clients.optimizers.base import ClientOptimizer, Layout
from fedpeft.clients.optimizers.stacked import Moving, Stacked, adam_direction
from fedpeft.config import ClientConfig, option


class LoRAPlus(ClientOptimizer):
    """AdamW with a larger rate for B than for A."""

    paper = "Hayou et al. 2024, arXiv 2402.12354"

    @dataclass
    class Config(AdamConfig):
        ratio: float = option(16.0, "rate of B over that of A and of the head", above=0)

    def make(self, weights: Sequence[nn.Parameter], client: ClientConfig, layout: Layout) -> torch.optim.Optimizer:
        config = self.config

        def move(tensors: dict[str, Moving], lr: float, step: int) -> None:
            for name, tensor in tensors.items():
                rate = lr * (config.ratio if name.endswith("/B") else 1.0)
                tensor.value.mul_(1 - rate * client.weight_decay)
                tensor.value.sub_(rate * adam_direction(tensor, step, config.beta1, config.beta2, config.eps))

        return Stacked(weights, client.lr, layout, ("exp_avg", "exp_avg_sq"), move)
