"""O-LoRA: a new LoRA for every task, whose rows are pushed to be orthogonal to those of all earlier ones.

Wang et al., arXiv 2310.14152. At task t, per layer, with s = alpha / r,

    W_t = W + s (B_1 A_1 + ... + B_t A_t),   only B_t and A_t train
    loss = CE + lam sum_{i<t} sum_{jk} |A_t A_i^T|_jk + lam2 (|A_t| + |B_t|)

Where the rows are orthogonal, the new adapter reads inputs in directions that the old ones do not. It is a penalty, no
constraint: what remains of the overlap is for the caller to measure.

Deviations: the paper writes the overlap for the other factor; the authors' code takes A (lora_A), as here. Penalties
are summed over entries as in that code, so they grow with tasks, rank and layers, and `lam` has to be tuned for them
(0 to 5 in the authors' scripts).

    >>> import torch
    >>> from fedpeft.continual.parts.lora import sum_overlap
    >>> old = torch.tensor([[1.0, 0.0, 0.0]])
    >>> sum_overlap(torch.tensor([[3.0, 4.0, 0.0]]), [(old.T, old)]).item()
    3.0
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.config import option
from fedpeft.continual.body import Body, Classifier
from fedpeft.continual.model import Change, Inputs
from fedpeft.continual.parts import lora


class OLoRA(Body):
    """A LoRA for each task, softly orthogonal to the earlier ones."""

    paper = "Wang et al. 2023, arXiv 2310.14152"
    needs = ("boundaries",)
    stays_central = (
        "penalises the overlap with earlier rows in every step, and no client half has such a term of the loss"
    )

    @dataclass
    class Config:
        r: int = option(8, "rank of each task's LoRA", low=1)
        alpha: float = option(8.0, "scale of the LoRAs: alpha / r", above=0)
        lam: float = option(0.5, "weight of the overlap of the new A with the old ones", low=0)
        lam2: float = option(0.0, "weight of the new factors' norms", low=0)

    def begin_task(self) -> None:
        lora.put_by(self)
        lora.begin(self, self.config.r, self.index)

    def change(self) -> Change:
        return lora.sum_tasks(self, self.config.alpha / self.config.r)

    def penalty(self, inputs: Inputs, labels: Tensor, features: Tensor, classifier: Classifier) -> Tensor | None:
        terms = []
        if self.index and self.config.lam:
            terms += [
                self.config.lam * lora.sum_overlap(self._factor_pair(layer)[1], lora.past(self, layer))
                for layer in self.model.layers
            ]
        if self.config.lam2:
            # Of B too, which is zero at first: torch takes 0 for the slope of a norm there.
            terms += [self.config.lam2 * value.norm() for value in self.parameters.values()]
        return torch.stack(terms).sum() if terms else None

    def _factor_pair(self, layer: str) -> tuple[Tensor, Tensor]:
        return self.parameters[f"{layer}/B"], self.parameters[f"{layer}/A"]
