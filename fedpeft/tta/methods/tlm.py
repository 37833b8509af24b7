"""TLM: a language model learns from its inputs, by minimising the perplexity of those that surprise it.

With l(x) the mean negative log likelihood of the tokens of x after the first (nats, so perplexity is exp l):

    S(x) = lambda exp(l(x) - l_0)  where l(x) > l_0, else 0        (a constant to the gradient)
    L = sum_x S(x) l(x) / #{x: l(x) > l_0},  one step a batch over the LoRA factors

Hu et al., arXiv 2505.20633: l_0 = 3, lambda = 0.1, lr 5e-5, batches of 8. Needs a causal-lm of `fedpeft.models`. The
answer is the distribution of the token that comes next, over the vocabulary [N, V], or over `label_words` [N, K] where
classes have words; the authors generate, which is outside of the contract. This is the online one of their two modes;
the offline one trains on all inputs before it answers any, and takes S from the model without its adapter. Adam divides
the gradient by its own size, so with it lambda matters only at 0, and S only in weighing texts against each other.

    >>> import torch
    >>> [round(value, 3) for value in weights(torch.tensor([2.0, 4.0]), 3.0, 0.1).tolist()]
    [0.0, 0.272]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft.config import option
from fedpeft.errors import InputError
from fedpeft.tta.deployed import Batch
from fedpeft.tta.method import Outputs
from fedpeft.tta.parts.gradient import GradientConfig, GradientMethod


@dataclass
class TLMConfig(GradientConfig):
    """Options of `tlm`: lambda and l_0 of the weights S(x), and how a language model answers with classes."""

    adapt: Any = option("lora", "what adapts: norm_affine, lora, head, all, or a list of name patterns")
    lr: float = option(5e-5, "learning rate", low=0)
    threshold: float = option(3.0, "l_0: log perplexity above which a text is learned from (nats)")
    lambda_: float = option(0.1, "weight of a text at the threshold", low=0)
    label_words: list[int] | None = option(None, "token ids of the classes' words; null answers over the vocabulary")


class TLM(GradientMethod):
    """Minimises the perplexity of surprising inputs over the LoRA factors of a language model."""

    Config: ClassVar[Any] = TLMConfig
    paper = "Hu et al. 2025, arXiv 2505.20633"
    min_batch: ClassVar[int] = 1

    def __init__(self, model: Any, seed: int = 0, **options: Any) -> None:
        super().__init__(model, seed, **options)
        if self.model.output is None:
            raise InputError(
                "tlm: it learns from the tokens of its input, so it needs a causal language model "
                "(model.task=causal-lm)."
            )

    def _outputs(self, batch: Batch, learn: bool) -> Outputs:
        assert isinstance(batch, dict) and self.model.output is not None
        tokens: list[Tensor] = []

        def keep(scores: Tensor) -> Tensor:
            tokens.append(scores)
            return scores

        leaves = self.leaves() if learn else self.memory["student"]
        outputs = self.forward(batch, leaves, hooks={self.model.output: keep}, graph=learn)
        if learn:
            with torch.enable_grad():
                # From the scores of all tokens: the answer keeps those of the next token only.
                outputs.extra = {"leaves": leaves, "surprise": surprise(tokens[-1], batch)}
        if self.config.label_words is not None:
            outputs.logits = outputs.logits[:, self.config.label_words]
        return outputs

    def _update(self, batch: Batch, outputs: Outputs) -> str | None:
        nats = outputs.extra["surprise"]
        factor = weights(nats.detach(), self.config.threshold, self.config.lambda_)
        if not factor.any():
            return "no text is above the threshold"
        return self.descend((factor * nats).sum() / (factor > 0).sum(), outputs.extra["leaves"])


def surprise(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Mean negative log likelihood [N] of each text's tokens after its first, in nats; 0 where there are none."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    # A token counts if it and the one that predicts it are real.
    counted = (mask[:, 1:] * mask[:, :-1]).float()
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * counted).sum(1) / counted.sum(1).clamp(min=1)


def weights(nats: Tensor, threshold: float, scale: float) -> Tensor:
    """S of each text [N]."""
    return scale * torch.exp(nats - threshold) * (nats > threshold)
