"""CLASSP: a weight moves only where its gradient is large, and less the more it has moved before, over all tasks.

Ludwig, arXiv 2405.09637. For every element with gradient g, accumulated a and learning rate lr:

    if g^2 > threshold:   a <- a + |g|^power,   w <- w - lr g / (a + eps)^(1 / power)

a is never reset. With power 2 and threshold 0 this is AdaGrad. Deviations: the published code tests the threshold on
the whole tensor (any non-zero gradient opens it) and discards the power; here both hold element by element. Its
threshold .5 and learning rate .2 were chosen for that code: element-wise, no gradient of a batch mean ever reaches .7,
hence a default near the median of g^2 on the embedded digits; the learning rate is `train.lr`, as for every body.

    >>> w, a = torch.tensor([1.0, 1.0]), torch.zeros(2)
    >>> move(w, a, torch.tensor([2.0, 0.1]), lr=0.5, threshold=0.25, power=1.0, eps=0.0)
    >>> w.tolist(), a.tolist()
    ([0.5, 1.0], [2.0, 0.0])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.config import option
from fedpeft.continual.parts.forms import FormBody, FormConfig


@dataclass
class Threshold:
    """Options of the rule, wherever it runs."""

    threshold: float = option(1e-6, "squared gradients up to this move nothing", low=0)
    power: float = option(1.0, "p of the accumulated |g|^p and of its root", above=0)
    eps: float = option(1e-5, "added to the accumulated sum", above=0)


class CLASSP(FormBody):
    """Thresholded steps that get smaller with all that a weight has moved."""

    paper = "Ludwig 2024, arXiv 2405.09637"
    stays_central = (
        "is an optimizer whose memory follows the gradient of every step, which clients take "
        "on paths of their own; no sum of theirs is one learner's"
    )

    @dataclass
    class Config(Threshold, FormConfig):
        """Those of the rule and of what it moves."""

    def begin_task(self) -> None:
        super().begin_task()
        for key, value in self.parameters.items():
            self.memory["statistics"].setdefault(f"{key}/a", torch.zeros_like(value))

    def restart_optimizer(self) -> None:
        """There is none: all that a step needs persists in `memory`."""

    def step(self) -> None:
        config = self.config
        for key, value in self.parameters.items():
            assert value.grad is not None
            with torch.no_grad():
                move(
                    value,
                    self.memory["statistics"][f"{key}/a"],
                    value.grad,
                    self.train.lr,
                    config.threshold,
                    config.power,
                    config.eps,
                )


def move(w: Tensor, a: Tensor, g: Tensor, lr: float, threshold: float, power: float, eps: float) -> None:
    """One step, in place."""
    open_ = g**2 > threshold
    # a first: the rule divides by what it has become.
    a.add_(g.abs() ** power * open_)
    w.sub_(torch.where(open_, lr * g / (a + eps) ** (1 / power), 0.0))
