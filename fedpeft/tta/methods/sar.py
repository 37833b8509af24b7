"""SAR: entropy minimisation on certain samples with sharpness-aware steps, and a reset when all answers become certain.

    g  = d mean_{H_i < E0} H_i at theta;         theta+ = theta + rho g / |g|
    g+ = d mean_{H_i < E0 and H_i+ < E0} H_i+ at theta+;   theta <- SGD(theta, g+)
    e <- 0.9 e + 0.1 mean H_i+ over the same samples;   e < e_m: weights, moments and e start anew

E0 = 0.4 ln K. Niu et al., arXiv 2302.12400. Deviations: e_m is 0.029 ln K, which is the paper's 0.2 at K = 1000 (the
constant 0.2 resets any good model of few classes); the update is skipped by count where a filter leaves nothing; the
moving average restarts with the weights; `top`, the share of norms nearest the output that stay frozen, stands for the
authors' lists of block names.

    >>> import torch
    >>> perturbed({"w": torch.tensor([1.0])}, {"w": torch.tensor([-3.0])}, 0.05)["w"].tolist()
    [0.949999988079071]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedpeft.config import option
from fedpeft.tta.deployed import Batch
from fedpeft.tta.method import Outputs
from fedpeft.tta.parts import scores
from fedpeft.tta.parts.gradient import GradientConfig, GradientMethod


@dataclass
class SARConfig(GradientConfig):
    """Options of `sar`; the published optimizer is SGD."""

    optimizer: str = option("sgd", "optimizer", choices=("adam", "sgd"))
    margin: float = option(0.4, "E0 / ln K: entropy above which a sample does not count")
    rho: float = option(0.05, "radius of the perturbation", low=0)
    reset_below: float = option(0.029, "e_m / ln K: moving entropy below which everything restarts", low=0)
    top: float = option(0.25, "share of the norms, nearest the output, that do not adapt", low=0, high=0.99)


class SAR(GradientMethod):
    """Sharpness-aware and reliable entropy minimisation."""

    Config: ClassVar[Any] = SARConfig
    paper = "Niu et al. 2023, arXiv 2302.12400"

    def _names(self) -> list[str]:
        names = super()._names()
        if self.config.adapt != "norm_affine":
            return names
        # In the order of the model, which ends with the norms nearest the output.
        owners = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
        kept = set(owners[: math.ceil((1 - self.config.top) * len(owners))])
        return [name for name in names if name.rpartition(".")[0] in kept]

    def _fresh(self) -> dict[str, Any]:
        return {**super()._fresh(), "entropy": None}

    def _update(self, batch: Batch, outputs: Outputs) -> str | None:
        config = self.config
        limit = config.margin * math.log(outputs.logits.shape[1])
        entropy = scores.entropy(outputs.logits)
        first = entropy.detach() < limit
        if not first.any():
            return "no sample passed the filter"
        gradients, reason = self.finite_gradients(entropy[first].mean(), outputs.extra["leaves"])
        if reason is not None:
            return reason
        # Only the gradient is taken there; the step is made from the weights as they were.
        leaves = self.leaves(perturbed(self.memory["student"], gradients, config.rho))
        again = scores.entropy(self.forward(batch, leaves, self.statistics(batch), graph=True).logits)[first]
        # Asked again, as the perturbed weights may be uncertain of a sample that passed.
        second = again.detach() < limit
        if not second.any():
            return "no sample passed the second filter"
        reason = self.descend(again[second].mean(), leaves)
        if reason is not None:
            return reason
        mean, old = float(again[second].detach().mean()), self.memory["entropy"]
        self.memory["entropy"] = mean if old is None else 0.9 * old + 0.1 * mean
        if self.memory["entropy"] < config.reset_below * math.log(outputs.logits.shape[1]):
            self.restart()
        return None


def perturbed(params: dict[str, Tensor], gradients: dict[str, Tensor], rho: float) -> dict[str, Tensor]:
    """theta + rho g / |g|, the norm over all tensors together."""
    norm = torch.stack([value.norm() for value in gradients.values()]).norm()
    return {
        name: value + rho * gradients[name] / (norm + 1e-12) if name in gradients else value
        for name, value in params.items()
    }
