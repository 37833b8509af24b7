"""SGDP: SGD without the part of a step that only lengthens a weight, where its length seems to be of no effect.

    m = mu m + g;  P = m, or g + mu m with nesterov;  P is projected as in AdamP
    W = (1 - lr wd / (1 - mu)) W - lr P,   wd `decay_ratio` times what it is where P was projected

Heo et al., arXiv 2006.08217; when that is worth having is in `adamp`. `client.momentum` is mu. Unlike sgd's, weight
decay is apart from the gradient.

Deviations: none from the authors' code, of which it leaves the dampening out.

    >>> from fedpeft.clients.optimizers.base import Layout
    >>> weights = nn.Parameter(torch.tensor([[1.0, 0.0]]))
    >>> config = ClientConfig(optimizer="sgdp", lr=0.1)
    >>> optimizer = SGDP().make([weights], config, Layout({"q/A": torch.Size([1, 2])}, {}))
    >>> weights.grad = torch.tensor([[0.01, 1.0]])  # all but at a right angle
    >>> optimizer.step()
    >>> weights.detach()
    tensor([[ 1.0000, -0.1000]])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedpeft.clients.optimizers.adamp import ProjectionConfig, project
from fedpeft.clients.optimizers.base import Layout
from fedpeft.clients.optimizers.sgd import SGD
from fedpeft.clients.optimizers.stacked import Moving, Stacked
from fedpeft.config import ClientConfig


class SGDP(SGD):
    """SGD without steps along a weight whose gradient is at a right angle to it."""

    paper = "Heo et al. 2020, arXiv 2006.08217"

    @dataclass
    class Config(ProjectionConfig, SGD.Config):
        """Those of SGD and of the projection."""

    def make(self, weights: Sequence[nn.Parameter], client: ClientConfig, layout: Layout) -> torch.optim.Optimizer:
        config, mu = self.config, client.momentum

        def move(tensors: dict[str, Moving], lr: float, step: int) -> None:
            for tensor in tensors.values():
                direction = tensor.gradient
                if mu:
                    mean = tensor.state["momentum_buffer"].mul_(mu).add_(tensor.gradient)
                    direction = tensor.gradient + mu * mean if config.nesterov else mean
                direction, share = project(tensor, direction, config)
                # Momentum makes steps 1 / (1 - mu) times as long in the end; decay keeps pace with them.
                tensor.value.mul_(1 - lr * client.weight_decay * share / (1 - mu)).sub_(lr * direction)

        return Stacked(weights, client.lr, layout, ("momentum_buffer",) if mu else (), move)
