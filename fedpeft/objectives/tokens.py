"""What objectives whose scores are of tokens have in common: the loss of a text is the mean over its own tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fedpeft.objectives.base import IGNORE, Objective, divide_or_nan
from fedpeft.objectives.measures import TOKENS


class TokenObjective(Objective):
    """Every token that has a label is scored among all words."""

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Mean over a text's own tokens: a mean over the batch's tokens would couple the samples."""
        losses = F.cross_entropy(scores.transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")
        return losses.sum(1) / (targets != IGNORE).sum(1).clamp(min=1)

    def measure(self, scores: Tensor, targets: Tensor, losses: Tensor) -> dict[str, float]:
        over_tokens = float((losses * (targets != IGNORE).sum(1)).sum())
        return {**super().measure(scores, targets, losses), "over_tokens": over_tokens}

    def metrics(self, sums: Mapping[str, float], samples: int) -> dict[str, float]:
        """`loss` is the mean over texts, `token_loss` that over all their tokens, which are `test_tokens`."""
        return {
            **super().metrics(sums, samples),
            "test_tokens": sums["targets"],
            "token_loss": divide_or_nan(sums["over_tokens"], sums["targets"]),
        }

    def further(self, sums: Mapping[str, float], samples: int) -> dict[str, float]:
        """`perplexity` is exp of the mean loss of all tokens."""
        loss = divide_or_nan(sums["over_tokens"], sums["targets"])
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf}


class NextToken(TokenObjective):
    """Every token is predicted from those before it, as a model writes them."""

    measures = TOKENS

    def measure(self, scores: Tensor, targets: Tensor, losses: Tensor) -> dict[str, float]:
        exact = int(((scores.argmax(-1) == targets) | (targets == IGNORE)).all(1).sum())
        return {**super().measure(scores, targets, losses), "exact": exact}

    def further(self, sums: Mapping[str, float], samples: int) -> dict[str, float]:
        """`exact_match`: a text whose every next token is the most likely one is what greedy generation says."""
        return {"exact_match": divide_or_nan(sums["exact"], samples), **super().further(sums, samples)}

    def describe_answer(self, answer: int, label_names: Sequence[str], processor: Any) -> str:
        return str(processor.decode([answer]))
