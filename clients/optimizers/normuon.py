"""NorMuon: Muon's even step with the rows brought to one length, by a running mean of their squares. arXiv 2510.05491.

    M, N as in Muon;  O = Newton-Schulz(N)
    v = b v + (1 - b) mean of O^2 over each row
    P = O / (sqrt(v) + 1e-10);  P = P ||O||_F / (||P||_F + 1e-10)
    W = (1 - lr wd) W - lr sqrt(max(1, rows / columns)) P

Muon evens out singular values, and rows of a wide or square O may still be of unlike length. A factor's row is a
rank's in A and an output's in B. Where B was 0 and so g_A = 0, O = 0 and nothing moves.

Deviations: Newton-Schulz in the dtype of the weights, not bfloat16, as in Muon; the head takes AdamW's steps.

    >>> from torch import nn
    >>> from fedpeft.clients.optimizers.base import Layout
    >>> from fedpeft.config import ClientConfig
    >>> weights = nn.Parameter(torch.zeros(1, 6))
    >>> weights.grad = torch.tensor([[3.0, 1.0, 0.5, 0.0, 1.0, 1.0]])
    >>> NorMuon().make([weights], ClientConfig(lr=1.0), Layout({"q/A": torch.Size([2, 3])}, {})).step()
    >>> lengths = weights.view(2, 3).norm(dim=1)
    >>> bool(torch.isclose(lengths[0], lengths[1]))  # at the first step v is of this O alone
    True
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedpeft.clients.optimizers.muon import EvenMomentum, MomentumConfig, even_out, scale_of_shape
from fedpeft.clients.optimizers.stacked import Moving
from fedpeft.config import option

SMALL = 1e-10  # added to divisors, as published


class NorMuon(EvenMomentum):
    """Muon whose rows have one length over time; AdamW for the head."""

    paper = "Li et al. 2025, arXiv 2510.05491"

    @dataclass
    class Config(MomentumConfig):
        row_decay: float = option(0.95, "b, decay of the mean square of each row", low=0, high=0.9999)

    def move_matrix(self, tensor: Moving, lr: float, weight_decay: float, step: int) -> None:
        ahead, decay = self.find_momentum(tensor), self.config.row_decay
        even = even_out(ahead, self.config.iterations)
        # One number a row, in all of its places: state has the form of the weights.
        square = tensor.state["exp_avg_sq"].mul_(decay).add_((1 - decay) * even.square().mean(2, keepdim=True))
        rows = even / (square[:, :, :1].sqrt() + SMALL)
        length, new = (torch.linalg.matrix_norm(matrix, keepdim=True) for matrix in (even, rows))
        tensor.value.mul_(1 - lr * weight_decay)
        tensor.value.sub_(lr * scale_of_shape(ahead) * rows * (length / (new + SMALL)))
