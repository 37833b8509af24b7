"""OWLoRA: earlier LoRAs frozen and weighted, the new one trained to be orthogonal to them. An approximation.

After CoMEL (arXiv 2507.02395), whose abstract is all that was to be had: "keep earlier adapters frozen, weight them,
train the new one orthogonal to them". Per layer, with s = alpha / r,

    W_t = W + s (sum_{i<t} w_i B_i A_i + B_t A_t),   w_i, B_t, A_t train;  w_i is 1 when task i ends
    loss = CE + lam sum_{i<t} sum_{jk} |A_t A_i^T|_jk

Deviations: the paper's equations were not seen. The penalty is O-LoRA's, the scalar weight for each old adapter and
layer is in the way of SD-LoRA, and what the paper says of whole slides (multiple-instance learning) is left out. Do not
quote its numbers beside this.

    >>> import torch
    >>> from fedpeft.continual.bodies.owlora import weigh_pairs
    >>> ones = torch.ones(1, 1)
    >>> B, A = weigh_pairs([(ones, ones), (ones, 3 * ones)], torch.tensor([0.5]))
    >>> (B @ A).item()
    3.5
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.config import option
from fedpeft.continual.body import Body, Classifier, make_leaf
from fedpeft.continual.model import Change, Inputs, low_rank
from fedpeft.continual.parts import lora


class OWLoRA(Body):
    """A LoRA for each task, softly orthogonal to the earlier ones, which get learned weights. Approximation."""

    paper = "CoMEL 2025, arXiv 2507.02395 (approximation: from the abstract)"
    needs = ("boundaries",)
    stays_central = "trains weights of earlier adapters at the clients, and no adapter has such parameters"

    @dataclass
    class Config:
        r: int = option(8, "rank of each task's LoRA", low=1)
        alpha: float = option(8.0, "scale of the LoRAs: alpha / r", above=0)
        lam: float = option(0.5, "weight of the overlap of the new A with the old ones", low=0)

    def begin_task(self) -> None:
        lora.put_by(self)
        lora.begin(self, self.config.r, self.index)
        for layer in self.model.layers if self.index else ():
            before = self.parameters.get(f"{layer}/weights", torch.ones(0))
            self.parameters[f"{layer}/weights"] = make_leaf(torch.cat([before, torch.ones(1)]))

    def change(self) -> Change:
        return {
            layer: low_rank(*self._pairs(layer), self.config.alpha / self.config.r)
            for layer in self.model.layers
            if self.parameters
        }

    def penalty(self, inputs: Inputs, labels: Tensor, features: Tensor, classifier: Classifier) -> Tensor | None:
        if not self.index:
            return None
        each = [lora.sum_overlap(self.parameters[f"{layer}/A"], lora.past(self, layer)) for layer in self.model.layers]
        lam: float = self.config.lam
        return lam * torch.stack(each).sum()

    def _pairs(self, layer: str) -> tuple[Tensor, Tensor]:
        new = self.parameters[f"{layer}/B"], self.parameters[f"{layer}/A"]
        return weigh_pairs([*lora.past(self, layer), new], self.parameters.get(f"{layer}/weights", torch.ones(0)))


def weigh_pairs(pairs: list[tuple[Tensor, Tensor]], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of sum_i weights_i B_i A_i + B_t A_t, the last pair being the new one."""
    old = [(weight * B, A) for weight, (B, A) in zip(weights, pairs[:-1], strict=True)]
    return lora.side_by_side([*old, pairs[-1]])
