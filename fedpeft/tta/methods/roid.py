"""ROID: certainty- and diversity-weighted self-training, pulled to the source weights, with prior correction.

With p_i the student's predictions, m their moving mean (0.9), min-max scaled over the batch:
    v_i = scaled 1 - cos(p_i, m),  c_i = scaled -H(p_i),  w_i = exp(v_i c_i / T), 0 where v_i < mean v
    L = (1/N) sum_i w_i [ SLR(p_i) + SCE(f(x_i), f(view(x_i))) ],   SLR(p) = -sum_k p_k log(p_k / (1 - p_k))
    theta <- step;  theta <- mu theta + (1 - mu) theta_0                                 (mu = 0.99)
The answer is p_i ⊙ (q + g) / (1 + g K), normalised; q the batch mean of p, g = max(1/N, 1/K) / max q.

Marsden, Doebler and Yang, arXiv 2306.00650. SCE is the symmetric cross entropy. Deviation: the prior multiplies
probabilities (the public code multiplies logits). Probabilities in SLR are cut at 0.99.

    >>> import torch
    >>> corrected(torch.tensor([[0.5, 0.5], [0.5, 0.5]])).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft.config import option
from fedpeft.tta.deployed import Batch, take_rows
from fedpeft.tta.method import Outputs
from fedpeft.tta.parts import scores
from fedpeft.tta.parts.augment import KINDS, augment_batch
from fedpeft.tta.parts.gradient import GradientConfig, GradientMethod

CUT = 0.99


@dataclass
class ROIDConfig(GradientConfig):
    """Options of `roid`: the sample weights, the pull to the source weights, and what may be left out."""

    temperature: float = option(1 / 3, "T of the sample weights", above=0)
    mu: float = option(0.99, "share of the student in the average with the source weights", low=0, high=1)
    consistency: bool = option(True, "learn from an augmented view too")
    augment: str = option("image", "kind of view", choices=KINDS)
    correct_prior: bool = option(True, "multiply predictions by the batch's smoothed class prior")


class ROID(GradientMethod):
    """Weighted self-training with weight ensembling and prior correction."""

    Config: ClassVar[Any] = ROIDConfig
    paper = "Marsden et al. 2023, arXiv 2306.00650"

    def _fresh(self) -> dict[str, Any]:
        return {**super()._fresh(), "mean": None}

    def _outputs(self, batch: Batch, learn: bool) -> Outputs:
        outputs = super()._outputs(batch, learn)
        if self.config.correct_prior:
            outputs.probs = corrected(outputs.logits.detach().softmax(-1))
        return outputs

    def _update(self, batch: Batch, outputs: Outputs) -> str | None:
        config, logits, leaves = self.config, outputs.logits, outputs.extra["leaves"]
        probs = logits.detach().softmax(-1)
        mean = self.memory["mean"]
        weights, kept = sample_weights(
            probs, torch.full_like(probs[0], 1 / len(probs[0])) if mean is None else mean, config.temperature
        )
        losses = soft_likelihood_ratio(logits[kept])
        if config.consistency:
            view = augment_batch(config.augment, take_rows(batch, kept), self.generator("view"))
            other = self.forward(view, leaves, self.statistics(view), graph=True).logits
            losses = losses + scores.symmetric_cross_entropy(logits[kept], other)
        # By all samples of the batch: those that were left out count with weight 0.
        reason = self.descend((weights[kept] * losses).sum() / len(logits), leaves)
        if reason is not None:
            return reason
        start, mu = self._start(), config.mu
        self.memory["student"] = {
            name: torch.lerp(start[name], value, mu) for name, value in self.memory["student"].items()
        }
        now = probs.mean(0)
        old = torch.full_like(now, 1 / len(now)) if mean is None else mean
        self.memory["mean"] = 0.9 * old + 0.1 * now
        return None


def soft_likelihood_ratio(logits: Tensor) -> Tensor:
    """-sum p log(p / (1 - p)) of each row [N]."""
    p = logits.softmax(-1).clamp(1e-6, CUT)
    return -(p * (p / (1 - p)).log()).sum(-1)


def sample_weights(probs: Tensor, mean: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Weights [N], and which rows [N] are diverse enough to count."""
    diversity = _scale_to_range(1 - F.cosine_similarity(mean[None], probs, dim=-1))
    certainty = _scale_to_range(-scores.entropy_of(probs))
    return torch.exp(diversity * certainty / temperature), diversity >= diversity.mean()


def corrected(probs: Tensor) -> Tensor:
    """Probabilities times the smoothed mean of the batch."""
    rows, classes = probs.shape
    prior = probs.mean(0)
    smooth = max(1 / rows, 1 / classes) / float(prior.max())
    weighted = probs * (prior + smooth) / (1 + smooth * classes)
    return weighted / weighted.sum(-1, keepdim=True)


def _scale_to_range(values: Tensor) -> Tensor:
    """To [0, 1]; zeros where all are equal."""
    span = values.max() - values.min()
    return (values - values.min()) / span if float(span) > 0 else torch.zeros_like(values)
