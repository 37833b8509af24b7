"""TENT: minimise the entropy of the model's own predictions over the affine parameters of its norms.

    L = (1/N) sum_i H(softmax f(x_i)),  one step a batch; the answer is that from before the step

Wang et al., arXiv 2006.10726. As in the authors' code batch norms use the batch alone (`bn_alpha` 1); unlike it, a
batch of one keeps the running statistics and is not learned from, and layer norms are adapted too.

    >>> import torch
    >>> from fedpeft.tta.parts import scores
    >>> from fedpeft.tta.method import make
    >>> net = torch.nn.Sequential(torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))
    >>> method, x = make("tent", net, {"lr": 0.05}), torch.eye(3)
    >>> before = scores.entropy_of(method.step(x)[0]).mean()
    >>> bool(scores.entropy_of(method.predict(x)).mean() < before)
    True
"""

from __future__ import annotations

from fedpeft.tta.deployed import Batch
from fedpeft.tta.method import Outputs
from fedpeft.tta.parts import scores
from fedpeft.tta.parts.gradient import GradientMethod


class Tent(GradientMethod):
    """Entropy minimisation over norm parameters."""

    paper = "Wang et al. 2021, arXiv 2006.10726"

    def _update(self, batch: Batch, outputs: Outputs) -> str | None:
        return self.descend(scores.entropy(outputs.logits).mean(), outputs.extra["leaves"])
