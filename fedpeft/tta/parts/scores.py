"""Losses and measures on rows of logits [N, K] or probabilities that more than one method uses.

>>> import torch
>>> round(float(entropy(torch.zeros(1, 4))), 4) == round(float(torch.tensor(4.0).log()), 4)
True
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-30  # a float32 whose logarithm is finite


def entropy(logits: Tensor) -> Tensor:
    """-sum p log p of each row [N], p = softmax(logits)."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def entropy_of(probs: Tensor) -> Tensor:
    """Entropy of each row of probabilities [N]."""
    values: Tensor = torch.special.entr(probs)
    return values.sum(-1)


def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy of the mean prediction of the rows."""
    # The mean in logarithms: a class that all views rule out would be 0 otherwise, and its logarithm infinite.
    log_mean = logits.log_softmax(-1).logsumexp(0) - torch.tensor(float(len(logits))).log()
    return -(log_mean.exp() * log_mean).sum()


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """-sum softmax(target) log softmax(logits) of each row [N]."""
    return -(target.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def symmetric_cross_entropy(one: Tensor, two: Tensor) -> Tensor:
    """The mean of the cross entropy in both directions [N]."""
    return 0.5 * (cross_entropy(one, two) + cross_entropy(two, one))


def log(probs: Tensor) -> Tensor:
    """Logarithm of probabilities, finite where they are 0."""
    return probs.clamp(min=TINY).log()


def divergence(p: Tensor, q: Tensor) -> float:
    """KL(p || q) of two distributions [K]."""
    return float((p * (log(p) - log(q))).sum())


def on_simplex(weights: Tensor, floor: float = 0.0) -> Tensor:
    """A distribution [K] from non-negative weights, no entry below `floor` before it is normalised again."""
    probs = weights / weights.sum()
    probs = probs.clamp(min=floor)
    return probs / probs.sum()
