"""Learning without forgetting: on the new task's records, old classes keep the scores that the old model gives them.

Li and Hoiem, arXiv 1606.09282, with the distillation of Hinton et al., arXiv 1503.02531:

    loss + lam T^2 mean over records of KL( softmax(z_old / T) || softmax(z / T) ),   z: scores of earlier classes

The old model is the last task's: its parameters and its classifier are kept, no record is. The old scores come from
the records of the new task only, so they say little where these are far from all old classes; that is the method's
known limit in class-incremental streams. Deviation: the paper warms the new rows of the classifier up alone first.

    >>> import math
    >>> z = torch.tensor([[0.0, 0.0]])
    >>> round(float(distill(torch.tensor([[math.log(3.0), 0.0]]), z, 1.0)), 4), float(distill(z, z, 2.0))
    (0.1438, 0.0)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft.config import option
from fedpeft.continual.body import Classifier
from fedpeft.continual.model import Inputs
from fedpeft.continual.parts.forms import FormBody, FormConfig


class LwF(FormBody):
    """Distillation from the model as the last task left it."""

    paper = "Li and Hoiem 2016, arXiv 1606.09282"
    needs = ("boundaries",)
    stays_central = "needs the last task's model and classifier at every client in every step, beside those that train"

    @dataclass
    class Config(FormConfig):
        lam: float = option(1.0, "weight of the distillation", low=0)
        temperature: float = option(2.0, "T of the distillation", above=0)

    def penalty(self, inputs: Inputs, labels: Tensor, features: Tensor, classifier: Classifier) -> Tensor | None:
        kept = self.memory["adapters"]
        if not kept:
            return None
        classes = self.memory["numbers"]["old/classes"]
        with torch.no_grad():
            # A second pass, over one base: the old model is only another change of it.
            before = self.model.features(inputs, self.changed({key: kept[f"old/{key}"] for key in self.parameters}))
            old = before @ kept["old/classifier/weight"].T + kept["old/classifier/bias"]
        lam: float = self.config.lam
        return lam * distill(classifier(features)[:, classes], old[:, classes], self.config.temperature)

    def end_task(self, statistics: dict[str, Tensor]) -> None:
        own = {**self.parameters, "classifier/weight": self.classifier.weight, "classifier/bias": self.classifier.bias}
        self.memory["adapters"] = {f"old/{key}": value.detach().clone() for key, value in own.items()}
        self.memory["numbers"]["old/classes"] = list(self.seen)


def distill(logits: Tensor, old: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(old / T) || softmax(logits / T)), the mean over rows [N, C]."""
    target = (old / temperature).log_softmax(-1)
    found = (logits / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(found, target, reduction="batchmean", log_target=True)
