"""Schedule-free AdamW: gradients between a fast point and the average of where it has been, which is sent; no schedule.

    y = b1 x + (1 - b1) z             gradients g are taken here
    v = b2 v + (1 - b2) g^2;  lr_t = lr sqrt(1 - b2^t)
    z = z - lr_t (g / (sqrt(v) + eps) + wd y)
    x = (1 - c) x + c z,              c = lr_t^2 / (lr_1^2 + ... + lr_t^2)

Defazio et al., arXiv 2405.15682. x is what a schedule that falls to zero would have reached, without knowing when the
steps end. In a federation a client begins every round with x = y = z = the average that it was sent, and sends its x; a
round of one step is a step of Adam without momentum.

Here the weights are y, and `lead` is z - y, which is zero at the start:

    y += c lead - lr_t (1 - b1 (1 - c)) d;  lead = (1 - c) (lead - b1 lr_t d);  x = y - (1 / b1 - 1) lead,
    d = g / (sqrt(v) + eps) + wd y

A schedule inside a round is refused: it is what this replaces, and c is written for one rate. Its state is of one
round (z is a point and not a direction of the next start's), so `client.keep_optimizer` is refused.

Deviations, from the authors' code: warm-up is `client.warmup_rounds`, over rounds.

    >>> from fedpeft.clients.optimizers.base import settle
    >>> weights = nn.Parameter(torch.zeros(1))
    >>> optimizer = ScheduleFree().make([weights], ClientConfig(lr=0.1), Layout({"head/bias": torch.Size([1])}, {}))
    >>> for _ in range(2):
    ...     weights.grad = torch.ones(1)
    ...     optimizer.step()
    >>> settle(optimizer)
    >>> -0.2 < float(weights) < -0.1  # the average of -0.1 and what is near -0.2
    True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedpeft.clients.optimizers.base import ClientOptimizer, Layout
from fedpeft.clients.optimizers.stacked import Moving, Stacked
from fedpeft.config import ClientConfig, option
from fedpeft.errors import InputError


class ScheduleFree(ClientOptimizer):
    """AdamW that sends the average of its path, in place of a rate that falls."""

    paper = "Defazio et al. 2024, arXiv 2405.15682"

    @dataclass
    class Config:
        beta1: float = option(0.9, "share of the average in where gradients are taken", above=0, high=0.9999)
        beta2: float = option(0.999, "decay of the mean of squared gradients", low=0, high=0.999999)
        eps: float = option(1e-8, "added to the root of the mean square", above=0)

    def require(self, client: ClientConfig) -> None:
        super().require(client)
        if client.schedule != "constant":
            raise InputError(
                f"client.schedule={client.schedule}: client.optimizer={client.optimizer} averages its path in place of "
                "a rate that falls. Set client.schedule=constant, or take adamw."
            )
        if client.warmup_rounds and client.schedule_over != "rounds":
            raise InputError(
                f"client.schedule_over={client.schedule_over} with client.warmup_rounds={client.warmup_rounds:g}: "
                f"client.optimizer={client.optimizer} has one rate in a round. Set client.schedule_over=rounds, or "
                "client.warmup_rounds=0."
            )

    def has_state(self, client: ClientConfig) -> bool:
        return False

    def make(self, weights: Sequence[nn.Parameter], client: ClientConfig, layout: Layout) -> torch.optim.Optimizer:
        beta1, beta2, eps = self.config.beta1, self.config.beta2, self.config.eps

        def move(tensors: dict[str, Moving], lr: float, step: int) -> None:
            rate, share = lr * (1 - beta2**step) ** 0.5, share_of(step, beta2)
            for tensor in tensors.values():
                square, lead = tensor.state["exp_avg_sq"], tensor.state["lead"]
                square.mul_(beta2).addcmul_(tensor.gradient, tensor.gradient, value=1 - beta2)
                direction = tensor.gradient / (square.sqrt() + eps) + client.weight_decay * tensor.value
                # The weights before the lead, which they move by as it was.
                tensor.value.add_(share * lead).sub_(rate * (1 - beta1 * (1 - share)) * direction)
                lead.sub_(beta1 * rate * direction).mul_(1 - share)

        def last(tensors: dict[str, Moving]) -> None:
            for tensor in tensors.values():
                tensor.value.sub_((1 / beta1 - 1) * tensor.state["lead"])

        return Stacked(weights, client.lr, layout, ("exp_avg_sq", "lead"), move, last)


def share_of(step: int, beta2: float) -> float:
    """c of a step from 1 on, at one rate: 1 - b2^t over the sum of these.

    >>> share_of(1, 0.999), round(share_of(2, 0.5), 3)
    (1.0, 0.6)
    """
    total = step - beta2 * (1 - beta2**step) / (1 - beta2)
    # The quotient is 1 there but for rounding, which would leave something of the start in the average.
    return 1.0 if step == 1 else (1 - beta2**step) / total
