"""CLASSP: a value moves only where its gradient is large, and less the more it has moved before. arXiv 2405.09637.

    if g^2 > threshold:   a <- a + |g|^power,   w <- w - lr g / (a + eps)^(1 / power)

The rule, and what differs from the authors' code, is that of the continual body `classp` (`move` there); here it is a
client's optimizer. With `client.keep_optimizer` a lasts from round to round, as the paper's is never reset: what a
client has learned long ago is hard to move. Without, it is a thresholded AdaGrad of one round. Weight decay is apart.

Under DP-SGD noise alone opens a threshold below its variance, and fills a. The threshold holds at clients and not in
the federation: what it keeps still at one client moves by the others' updates.

    >>> from fedpeft.clients.optimizers.base import Layout
    >>> weights = nn.Parameter(torch.ones(1, 2))
    >>> config, layout = ClientConfig(lr=0.5), Layout({"q/A": torch.Size([1, 2])}, {})
    >>> optimizer = CLASSP(threshold=0.25).make([weights], config, layout)
    >>> weights.grad = torch.tensor([[2.0, 0.1]])
    >>> optimizer.step()
    >>> weights.detach().round(decimals=3)
    tensor([[0.5000, 1.0000]])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fedpeft.clients.optimizers.base import ClientOptimizer, Layout
from fedpeft.clients.optimizers.stacked import Moving, Stacked
from fedpeft.config import ClientConfig
from fedpeft.continual.bodies.classp import Threshold, move


class CLASSP(ClientOptimizer):
    """Thresholded steps that get smaller with all that a value has moved."""

    paper = "Ludwig 2024, arXiv 2405.09637"
    Config = Threshold

    def make(self, weights: Sequence[nn.Parameter], client: ClientConfig, layout: Layout) -> torch.optim.Optimizer:
        config = self.config

        def move_all(tensors: dict[str, Moving], lr: float, step: int) -> None:
            for tensor in tensors.values():
                # Before the rule and apart from it: values that the threshold keeps closed decay too.
                tensor.value.mul_(1 - lr * client.weight_decay)
                moved = tensor.state["moved"]
                move(tensor.value, moved, tensor.gradient, lr, config.threshold, config.power, config.eps)

        return Stacked(weights, client.lr, layout, ("moved",), move_all)
