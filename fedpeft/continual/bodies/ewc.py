"""Elastic weight consolidation: parameters that mattered for earlier tasks are pulled back to where they were.

Kirkpatrick et al., arXiv 1612.00796, in the form with one anchor (Schwarz et al., arXiv 1805.06370):

    loss + lam / 2  sum_i F_i (theta_i - theta*_i)^2
    after a task:   f_i = sum over records of (d log p(y | x) / d theta_i)^2,   F <- decay F + f / mean(f),
                    theta* <- theta

The importance of a task is divided by its mean over all parameters, so that `lam` means the same at every scale of
gradients: the mean weight of the pull of one task is `lam` (choose it in steps of 10). Without that, lam = 500 was
the same as no penalty at all on the embedded streams. Gradients are of single records. `labels: data` takes the
records' labels (the empirical Fisher), `model` one drawn from the model's own prediction (the Fisher itself); the
task's own classes compete.

    >>> float(pull({"a": torch.tensor([3.0])}, {"a": torch.tensor([1.0])}, {"a": torch.tensor([0.5])}))
    2.0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft import seeds
from fedpeft.config import option
from fedpeft.continual.body import Classifier, only_classes
from fedpeft.continual.model import Inputs
from fedpeft.continual.parts.forms import FormBody, FormConfig
from fedpeft.data.encode import Encoded


class EWC(FormBody):
    """Quadratic pull to the last task's parameters, weighted by Fisher information."""

    paper = "Kirkpatrick et al. 2017, arXiv 1612.00796"
    needs = ("boundaries", "statistics")
    stays_central = (
        "pulls each parameter back by its own weight in every step, and no client half has such a term of the loss"
    )

    @dataclass
    class Config(FormConfig):
        lam: float = option(1.0, "mean weight of the pull that one task adds", low=0)
        decay: float = option(1.0, "share of the earlier importance that a new task leaves", low=0, high=1)
        labels: str = option(
            "data", "gradients at the records' labels, or at labels that the model draws", choices=("data", "model")
        )
        records: int = option(256, "records of a task that the importance is measured on", low=1)

    def penalty(self, inputs: Inputs, labels: Tensor, features: Tensor, classifier: Classifier) -> Tensor | None:
        if not self.memory["statistics"]:
            return None
        anchor = {key: self.memory["adapters"][f"{key}/anchor"] for key in self.parameters}
        importance = {key: self.memory["statistics"][f"{key}/F"] for key in self.parameters}
        lam: float = self.config.lam
        return lam / 2 * pull(self.parameters, anchor, importance)

    def statistics(self, data: Encoded) -> dict[str, Tensor]:
        """Sums of squared gradients of single records, float64."""
        rng = seeds.numpy_generator(self.seed, "fisher", self.index)
        chosen = np.sort(rng.permutation(len(data))[: self.config.records])
        total = {f"{key}/F": torch.zeros_like(value, dtype=torch.float64) for key, value in self.parameters.items()}
        for number in chosen.tolist():
            # One at a time: the square of a mean gradient is not the mean of squares.
            inputs, labels = data.batch(np.array([number]))
            logits = only_classes(self.classifier(self.model.features(inputs, self.change())), self.current().classes)
            if self.config.labels == "model":
                draw = self.generator("fisher", self.index, number)
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
            gradients = torch.autograd.grad(F.cross_entropy(logits, labels), list(self.parameters.values()))
            for key, gradient in zip(self.parameters, gradients, strict=True):
                total[f"{key}/F"] += gradient.double() ** 2
        return total

    def end_task(self, statistics: dict[str, Tensor]) -> None:
        # Over all parameters at once: a layer that matters less than others must stay so.
        mean = sum(float(value.sum()) for value in statistics.values()) / sum(v.numel() for v in statistics.values())
        for key, value in self.parameters.items():
            before = self.memory["statistics"].get(f"{key}/F", torch.zeros_like(value))
            added = statistics[f"{key}/F"] / mean if mean > 0 else statistics[f"{key}/F"]
            self.memory["statistics"][f"{key}/F"] = self.config.decay * before + added.to(value.dtype)
            self.memory["adapters"][f"{key}/anchor"] = value.detach().clone()


def pull(values: Mapping[str, Tensor], anchor: Mapping[str, Tensor], importance: Mapping[str, Tensor]) -> Tensor:
    """sum_i F_i (theta_i - theta*_i)^2."""
    return torch.stack([(importance[key] * (value - anchor[key]) ** 2).sum() for key, value in values.items()]).sum()
