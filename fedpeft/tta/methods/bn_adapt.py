"""Batch norms normalise with the test batch's statistics.

(1 - alpha) x running + alpha x batch for mean and (biased) variance. Schneider et al., arXiv 2006.16971; Nado et al.,
arXiv 2006.10963. Our blend is a share of the batch, not a count of pseudo-samples. Without batch norms it is exactly
the source model, and a batch of one is predicted with the running statistics.

    >>> import torch
    >>> from fedpeft.tta.method import make
    >>> method = make("bn_adapt", torch.nn.BatchNorm1d(1))
    >>> method.model(torch.tensor([[3.0], [5.0]]), statistics=method.statistics(torch.zeros(2, 1)))[0].mean().item()
    0.0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fedpeft.config import option
from fedpeft.tta.deployed import Batch, Statistics, batch_size, batch_statistics
from fedpeft.tta.method import MethodConfig, Outputs, TTAMethod


@dataclass
class BNAdaptConfig(MethodConfig):
    """Options of `bn_adapt`: alpha = `bn_alpha`, where 0 is the source model."""

    bn_alpha: float = option(1.0, "share of the batch's statistics", low=0, high=1)


class BNAdapt(TTAMethod):
    """Batch statistics in batch norms; nothing else changes."""

    Config: ClassVar[Any] = BNAdaptConfig
    paper = "Schneider et al. 2020, arXiv 2006.16971"

    def statistics(self, batch: Batch) -> Statistics | None:
        """What batch norms normalise a batch with; None, their running statistics, for a batch of one."""
        return batch_statistics(self.config.bn_alpha) if batch_size(batch) > 1 else None

    def _outputs(self, batch: Batch, learn: bool) -> Outputs:
        return self.forward(batch, None, self.statistics(batch))
