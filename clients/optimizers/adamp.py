"""AdamP: Adam without the part of a step that only lengthens a weight, where its length seems to be of no effect.

    P = Adam's direction
    if max over rows |cos(g, W)| < d / sqrt(columns), each row a vector; or else the same of all of W as one vector:
        P = P - W^ <W^, P>,   W^ = W / (||W|| + eps),   and weight decay is `decay_ratio` times what it is
    W = (1 - lr wd) W - lr P

Heo et al., arXiv 2006.08217. A weight in front of a normalisation has no effect by its length: there g is orthogonal to
W, which is what the cosine looks for, and steps along W only make the next ones smaller. A factor's length has an
effect: B A is what counts, so of A and B the cosine is small by chance alone (or at the start, where g_A = 0 and
B = 0), and AdamP is mostly AdamW. It is for adapters that train weights in front of a normalisation.

Vectors (biases, scales) take AdamW's steps.

Deviations: none from the authors' code; in it, too, one tensor is projected as a whole or not at all.

    >>> from fedpeft.clients.optimizers.base import Layout
    >>> weights = nn.Parameter(torch.tensor([[1.0, 0.0]]))
    >>> optimizer = AdamP().make([weights], ClientConfig(lr=0.1), Layout({"q/A": torch.Size([1, 2])}, {}))
    >>> weights.grad = torch.tensor([[0.0, 1.0]])  # at a right angle
    >>> optimizer.step()
    >>> weights.detach().round(decimals=4)
    tensor([[ 1.0000, -0.1000]])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpeft.clients.optimizers.adamw import AdamConfig
from fedpeft.clients.optimizers.base import ClientOptimizer, Layout
from fedpeft.clients.optimizers.stacked import Moving, Stacked, adam_direction
from fedpeft.config import ClientConfig, option


@dataclass
class ProjectionConfig:
    """Options of what both AdamP and SGDP do with a direction."""

    delta: float = option(0.1, "d: a cosine below d / sqrt(size) counts as a right angle", low=0)
    decay_ratio: float = option(0.1, "weight decay where a step is projected, over that elsewhere", low=0, high=1)
    eps: float = option(1e-8, "added to lengths of weights, and in AdamP to the root of the mean square", above=0)


class AdamP(ClientOptimizer):
    """AdamW without steps along a weight whose gradient is at a right angle to it."""

    paper = "Heo et al. 2020, arXiv 2006.08217"

    @dataclass
    class Config(ProjectionConfig, AdamConfig):
        nesterov: bool = option(False, "Nesterov's form of the mean gradient")

    def make(self, weights: Sequence[nn.Parameter], client: ClientConfig, layout: Layout) -> torch.optim.Optimizer:
        config = self.config

        def move(tensors: dict[str, Moving], lr: float, step: int) -> None:
            for tensor in tensors.values():
                direction = adam_direction(tensor, step, config.beta1, config.beta2, config.eps, config.nesterov)
                direction, share = project(tensor, direction, config)
                tensor.value.mul_(1 - lr * client.weight_decay * share).sub_(lr * direction)

        return Stacked(weights, client.lr, layout, ("exp_avg", "exp_avg_sq"), move)


def project(tensor: Moving, direction: Tensor, config: ProjectionConfig) -> tuple[Tensor, Tensor]:
    """What is left of a direction [K, ...] beside the weight, and the share of weight decay of each client [K, 1, ...].

    A direction that is not projected is left as it is, and has all of its weight decay.
    """
    value = tensor.value
    done = torch.zeros(len(value), *[1] * (value.ndim - 1), dtype=torch.bool, device=value.device)
    left, whole = direction, torch.ones_like(done, dtype=value.dtype)
    if value.ndim < 3:  # [K, n], K clients in front: a bias or a scale, no weight before a norm
        return left, whole
    # Rows first: a tensor whose rows are all at right angles is not looked at as a whole any more.
    for read_vectors in (_read_rows, _read_whole):
        W, G, P = (read_vectors(each) for each in (value, tensor.gradient, direction))
        cosines = torch.cosine_similarity(G, W, dim=2, eps=config.eps).abs()
        right = (cosines.amax(1) < config.delta / W.shape[2] ** 0.5).view_as(done) & ~done
        unit = W / (torch.linalg.vector_norm(W, dim=2, keepdim=True) + config.eps)
        left = torch.where(right, (P - unit * (unit * P).sum(2, keepdim=True)).view_as(value), left)
        done = done | right
    return left, whole.where(~done, config.decay_ratio)


def _read_rows(values: Tensor) -> Tensor:
    """[K, rows, n] of [K, rows, ...]."""
    return values.flatten(2)


def _read_whole(values: Tensor) -> Tensor:
    """[K, 1, n] of [K, ...]."""
    return values.flatten(1)[:, None]
