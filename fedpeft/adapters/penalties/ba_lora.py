"""BA-LoRA's penalties for language models: near to what the base says, and not too sure. Chang et al. 2024, arXiv
2408.04556.

    P = mean over a record's predicted tokens of  consistency * KL(p_0 || p) - diversity * H(p)

p is what the model says of the next token, p_0 what the base alone does, H the entropy. Both are of one record, so
under DP they are a part of its loss and its gradient, clipped with it. Weights are the paper's.

Deviations: the third term, the share of the leading singular values of all scores of a batch, is left out, as are the
covariances that take the place of H in classifiers: they make one record's loss hang on the others', so that one record
more would move every clipped gradient. The authors' code adds H where the text speaks of diversity, which would make
the model surer; here its weight draws towards more of it. A classifier's head is drawn anew, and its p_0 says nothing.
The paper's start is PiSSA's, which moves the base; here the base alone has to be there to compare with.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedpeft.adapters.penalties.base import OverScores
from fedpeft.config import option
from fedpeft.objectives.base import IGNORE


class BALoRAPenalty(OverScores):
    """A language model stays near to what its base says, and keeps more than one word likely."""

    paper = "Chang et al. 2024, arXiv 2408.04556"

    @dataclass
    class Config:
        consistency: float = option(1e-4, "weight of the divergence from what the base says", low=0)
        diversity: float = option(3e-4, "weight of the entropy of what the model says", low=0)

    def losses(self, scores: Tensor, before: Tensor, targets: Tensor) -> Tensor:
        """Both terms, over the tokens that have a target."""
        now, then = scores.log_softmax(-1), before.log_softmax(-1)
        divergence = (then.exp() * (then - now)).sum(-1)
        entropy = -(now.exp() * now).sum(-1)
        known = targets != IGNORE
        each = (self.config.consistency * divergence - self.config.diversity * entropy).masked_fill(~known, 0.0)
        # 0 of a record with nothing to predict, not 0 / 0: under DP it stays in the batch.
        mean: Tensor = each.sum(1) / known.sum(1).clamp(min=1)
        return mean
