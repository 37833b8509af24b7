"""EATA: TENT on samples that are certain and not redundant, with an anchor on weights that mattered on source data.

A sample counts if H_i < E0 = `margin` ln K and |cos(p_i, m)| < d, m the moving average (0.9) of predictions that
counted.

    L = mean over these of exp(E0 - H_i) H_i            (the factor is a constant to the gradient)
    theta <- step(theta, dL);  theta <- (theta + 2 lr beta F theta_0) / (1 + 2 lr beta F)

F is the diagonal Fisher information of the source model for its own labels. Niu et al., arXiv 2204.02610. Deviation:
the penalty beta sum F (theta - theta_0)^2 is a proximal step of its own and not part of the gradient, so a large beta
freezes the weights where Adam would let them jump. `fisher_weight` 0 is ETA and needs no source data. d defaults to the
authors' 0.4 up to 10 classes, 0.1 up to 100, 0.05 beyond.

    >>> import torch
    >>> counts(torch.tensor([[9.0, 0.0], [0.1, 0.0]]), 0.4, 0.4, None).tolist()
    [True, False]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft.config import option
from fedpeft.data.encode import Encoded
from fedpeft.tta.deployed import Batch
from fedpeft.tta.method import Outputs, source_batches
from fedpeft.tta.parts import scores
from fedpeft.tta.parts.gradient import GradientConfig, GradientMethod


@dataclass
class EATAConfig(GradientConfig):
    """Options of `eata`: which samples count, and how strongly source weights hold."""

    margin: float = option(0.4, "E0 / ln K: entropy above which a sample does not count")
    redundancy: float | None = option(None, "cosine to the mean prediction above which a sample does not count", low=0)
    fisher_weight: float = option(1.0, "beta, pull to the source weights", low=0)
    source_rows: int = option(2000, "source samples for the Fisher information", low=1)


class EATA(GradientMethod):
    """Entropy minimisation on certain, non-redundant samples, anchored by Fisher information."""

    Config: ClassVar[Any] = EATAConfig
    paper = "Niu et al. 2022, arXiv 2204.02610"

    def _needs(self) -> str:
        return "inputs" if self.config.fisher_weight > 0 else "none"

    def _prepare(self, source: Encoded) -> dict[str, Any]:
        fisher: dict[str, Tensor] = {}
        seen = 0
        for batch, _ in source_batches(source):
            if seen >= self.config.source_rows:
                break
            leaves = self.leaves(self._start())
            logits = self.forward(batch, leaves, self.statistics(batch), graph=True).logits
            gradients = self.gradients(F.cross_entropy(logits, logits.argmax(-1)), leaves)
            for name, value in gradients.items():
                # Of the batch's mean gradient, weighted by its rows; single samples would need a backward pass each.
                fisher[name] = fisher.get(name, torch.zeros_like(value)) + len(logits) * value.square()
            seen += len(logits)
        return {"fisher": {name: value / seen for name, value in fisher.items()}}

    def _fresh(self) -> dict[str, Any]:
        return {**super()._fresh(), "mean": None}

    def _update(self, batch: Batch, outputs: Outputs) -> str | None:
        config, logits = self.config, outputs.logits
        # Detached: which samples count is a choice, not a part of the loss.
        mask = counts(logits.detach(), config.margin, config.redundancy, self.memory["mean"])
        if not mask.any():
            return "no sample passed the filter"
        chosen = logits[mask]
        entropy = scores.entropy(chosen)
        # A constant weight: with its gradient, an entropy above 1 would be pushed up.
        factor = torch.exp(config.margin * math.log(logits.shape[1]) - entropy.detach())
        reason = self.descend((factor * entropy).mean(), outputs.extra["leaves"])
        if reason is not None:
            # Neither anchor nor mean may move by a batch that was not learned from.
            return reason
        start = self.model.tensors(list(self.prepared.get("fisher", {})))
        for name, importance in self.prepared.get("fisher", {}).items():
            pull = 2 * config.lr * config.fisher_weight * importance
            self.memory["student"][name] = (self.memory["student"][name] + pull * start[name]) / (1 + pull)
        mean, old = chosen.detach().softmax(-1).mean(0), self.memory["mean"]
        self.memory["mean"] = mean if old is None else 0.9 * old + 0.1 * mean
        return None


def counts(logits: Tensor, margin: float, redundancy: float | None, mean: Tensor | None) -> Tensor:
    """Which rows [N] are certain and differ from the mean prediction."""
    classes = logits.shape[1]
    if redundancy is None:
        redundancy = 0.4 if classes <= 10 else 0.1 if classes <= 100 else 0.05
    certain = scores.entropy(logits) < margin * math.log(classes)
    if mean is None:
        return certain
    return certain & (F.cosine_similarity(mean[None], logits.softmax(-1), dim=-1).abs() < redundancy)
