"""SGD with momentum, torch's own: g += wd theta; m = mu m + g; theta -= lr m, or lr (g + mu m) with nesterov.

Weight decay is L2: part of the gradient. Sutskever et al., ICML 2013, for both forms of momentum.

    >>> from fedpeft.config import ClientConfig
    >>> weights = nn.Parameter(torch.ones(1))
    >>> weights.grad = torch.ones(1)
    >>> SGD().make([weights], ClientConfig(optimizer="sgd", lr=0.1), Layout({}, {})).step()
    >>> round(float(weights), 3)
    0.9
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedpeft.clients.optimizers.base import ClientOptimizer, Layout
from fedpeft.config import ClientConfig, option
from fedpeft.errors import InputError


class SGD(ClientOptimizer):
    """Stochastic gradient descent, with momentum where `client.momentum` is set."""

    paper = "Sutskever et al. 2013, ICML (momentum)"

    @dataclass
    class Config:
        nesterov: bool = option(False, "Nesterov's form of client.momentum")

    def require(self, client: ClientConfig) -> None:
        # Not the base's check: this is the optimizer that client.momentum is of.
        if self.config.nesterov and not client.momentum:
            raise InputError(
                "client.optimizer_options.nesterov=true is a form of momentum, and client.momentum=0. "
                "Set client.momentum, for example 0.9."
            )

    def has_state(self, client: ClientConfig) -> bool:
        return client.momentum > 0

    def make(self, weights: Sequence[nn.Parameter], client: ClientConfig, layout: Layout) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            weights,
            lr=client.lr,
            momentum=client.momentum,
            weight_decay=client.weight_decay,
            nesterov=self.config.nesterov,
        )
