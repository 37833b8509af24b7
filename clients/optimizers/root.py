"""ROOT: Muon on a momentum whose outliers are cut off. He et al., arXiv 2511.20626.

    M, N as in Muon;  e = the 0.9-quantile of |N|;  C = N with entries held to [-e, e]
    W = (1 - lr wd) W - 0.2 lr sqrt(max(rows, columns)) Newton-Schulz(C)

C is N without its soft-thresholded part N - C, in which the paper sees the outliers of noisy gradients.

`nesterov=false` is the paper's algorithm; its code has Nesterov's form, the default here.

Deviations, from the authors' code: it has Newton-Schulz coefficients of its own for four shapes of large weights,
Muon's otherwise; no factor is of these shapes, so Muon's are taken. Its momentum is a sum, M = mu M + G and
N = G + mu M: 1 / (1 - mu) times this one, which neither the cut nor Newton-Schulz sees. Newton-Schulz in the dtype of
the weights, not bfloat16. The head takes AdamW's steps.

    >>> import torch
    >>> from torch import nn
    >>> from fedpeft.clients.optimizers.base import Layout
    >>> from fedpeft.config import ClientConfig
    >>> weights = nn.Parameter(torch.zeros(1, 4))
    >>> weights.grad = torch.tensor([[9.0, 0.0, 0.0, 1.0]])
    >>> ROOT().make([weights], ClientConfig(lr=1.0), Layout({"q/A": torch.Size([2, 2])}, {})).step()
    >>> bool((weights[0, [1, 2]] == 0).all() and (weights[0, [0, 3]] < 0).all())
    True
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedpeft.clients.optimizers.muon import EvenMomentum, MomentumConfig, even_out
from fedpeft.clients.optimizers.stacked import Moving
from fedpeft.config import option


class ROOT(EvenMomentum):
    """Muon on a momentum without outliers; AdamW for the head."""

    paper = "He et al. 2025, arXiv 2511.20626"

    @dataclass
    class Config(MomentumConfig):
        quantile: float = option(0.9, "of the momentum's sizes: what is above is cut to it", above=0, high=1)
        scale: float = option(0.2, "of a step, beside sqrt(max(rows, columns))", above=0)

    def move_matrix(self, tensor: Moving, lr: float, weight_decay: float, step: int) -> None:
        ahead, config = self.find_momentum(tensor), self.config
        limit = find_quantile(ahead.abs().flatten(1), config.quantile)[:, None, None]
        tensor.value.mul_(1 - lr * weight_decay)
        size = lr * config.scale * max(ahead.shape[1:]) ** 0.5
        tensor.value.sub_(size * even_out(ahead.clamp(-limit, limit), config.iterations))


def find_quantile(values: Tensor, quantile: float) -> Tensor:
    """The quantile [K] of each row of [K, n], linear between two values, as torch.quantile has it.

    Only the values above it are sorted: torch.quantile, which sorts all, took five times as long.
    """
    place = quantile * (values.shape[1] - 1)
    low = int(place)
    largest = values.topk(values.shape[1] - low, dim=1).values
    # At the quantile 1 there is a single value, which is both ends.
    return largest[:, -1].lerp(largest[:, max(-2, -largest.shape[1])], place - low)
