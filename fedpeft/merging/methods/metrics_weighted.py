"""Metrics-weighted averaging: better checkpoints count more. Wang et al., arXiv 2504.18580.

    D = sum_i w_i tau_i / sum_i w_i,   w_i = loss_i^-p  (by: loss)   or   w_i = step_i^p  (by: step)

p = 0 is the uniform mean; as p grows, only the best checkpoint counts. The number given with an adapter is its loss, or
its step (any score of which more is better will do); without numbers the steps are 1, 2, 3, ... Weights are kept as
logarithms, log W <- log(W + w), so that no p overflows. Heads have the same weights.

Deviations: the exponent form is what the abstract's "penalty factor" allows, not checked against the paper's own
formula. The mean is over the products B A, as over merged checkpoints, not over A and B each.

    >>> import torch
    >>> from fedpeft.merging.base import merge
    >>> from fedpeft.state import AdapterState, AdaptedLayer
    >>> layers = {"q": AdaptedLayer("lora")}
    >>> def one(b): return AdapterState({"q/A": torch.ones(1, 1), "q/B": torch.tensor([[b]])}, layers)
    >>> merged = merge("metrics_weighted", [one(0.0), one(4.0)], {"p": 1.0}, [0.6, 0.2])
    >>> round((merged["q/B"] @ merged["q/A"]).item(), 6)
    3.0
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedpeft.config import option
from fedpeft.errors import InputError
from fedpeft.merging.base import Merger, Numbers, State, Tensors, combine
from fedpeft.state import AdapterState


@dataclass
class MetricsWeightedConfig:
    """Options of `metrics_weighted`: what an adapter's number says of it, and how steeply weights follow it."""

    by: str = option(
        "loss",
        "what the numbers are: loss, less is better; step, later (or any score: more) is better",
        choices=("loss", "step"),
    )
    p: float = option(1.0, "exponent of the weights; 0 is the uniform mean", low=0)


class MetricsWeighted(Merger):
    """The mean of the adapters' products, weighted by their losses or steps."""

    Config: ClassVar[Any] = MetricsWeightedConfig
    paper = "Wang et al. 2025, arXiv 2504.18580"
    number = "loss or step"

    def update(self, state: State, adapter: AdapterState, number: float | None) -> tuple[Tensors, Numbers]:
        share = self.share(state, number)
        return combine(state, adapter, 1 - share, share), {"log_weight": self._log_total(state, number)}

    def share(self, state: State, number: float | None) -> float:
        return math.exp(self._log_weight(state, number) - self._log_total(state, number))

    def _log_total(self, state: State, number: float | None) -> float:
        return float(np.logaddexp(state["numbers"].get("log_weight", -math.inf), self._log_weight(state, number)))

    def _log_weight(self, state: State, number: float | None) -> float:
        if number is None:
            if self.config.by == "loss":
                raise InputError(
                    "metrics_weighted: by=loss needs the loss of each adapter as a number; by=step takes "
                    "1, 2, 3, ... where none is given."
                )
            number = float(state["numbers"]["count"] + 1)
        if number <= 0:
            raise InputError(f"metrics_weighted: number={number:g}: a {self.config.by} must be positive.")
        power: float = self.config.p if self.config.by == "step" else -self.config.p
        return power * math.log(number)
