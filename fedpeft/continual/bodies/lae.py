"""LAE: a fast online adapter and its slow average, the offline one; both predict, the surer one wins.

Gao et al., arXiv 2303.10070 (learning, accumulation, ensemble). `on` is what trains, `off` the offline expert:

    task 0          on and the classifier train; there is no off
    task 1 begins   off <- on, and from then on after every step  off <- a off + (1 - a) on
    tasks >= 1      in the first `frozen_epochs` epochs only the classifier trains, then on too
    prediction      max(softmax(scores of on), softmax(scores of off)), class by class

What trains (`form`), in the adapted layers or in the attention modules around them, s a learned scale from 1 on:

    lora      y + s B A x at every adapted layer
    adapter   y + s B gelu(A x) beside an attention module, x its input and y its output
    prefix    `length` learned keys and values in an attention, calibrated, without a scale, as the authors run it:
              see `fedpeft.continual.parts.prefix`

a is retention^(1 / steps of the task): how much of `off` is left of it after a task. The authors' a = 0.9999 means a
retention of 0.90 on their CIFAR-100 (1,040 steps a task) and would freeze `off` in a short run. The combined scores
are maxima of probabilities and do not sum to 1.

Deviations: the layers are those of the run, where the authors take the first blocks and, for LoRA, keys and values.
B starts at zero; prefixes start normal with deviation 0.02, theirs uniform on 0 to 0.01. No biases in the adapter.
Where `frozen_epochs` is not below the run's epochs, `on` does not move after task 0.

    >>> scores = {"online": torch.tensor([[0.0, 2.0]]), "offline": torch.tensor([[3.0, 0.0]])}
    >>> both(scores).mul(100).round().tolist()
    [[95.0, 88.0]]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft.config import FEDERATION, LEARNER, option
from fedpeft.continual.body import Body, make_leaf
from fedpeft.continual.model import Change, Patch, low_rank
from fedpeft.continual.parts import lora
from fedpeft.continual.parts.prefix import add_prefix, find_attentions, key_width


class LAE(Body):
    """Online and offline expert of one adapter."""

    paper = "Gao et al. 2023, arXiv 2303.10070"
    needs = ("boundaries",)
    stays_central = ""

    @dataclass
    class Config:
        form: str = option("lora", "what trains", choices=("lora", "adapter", "prefix"), only=LEARNER)
        r: int = option(5, "rank of the LoRA, or width of the adapter; else adapter.r", low=1, only=LEARNER)
        length: int = option(10, "keys and values in a prefix", low=1, only=LEARNER)
        retention: float = option(0.9, "share of the offline expert (the average) that a task leaves", low=0, high=1)
        frozen_epochs: int = option(
            3, "epochs of a later task in which only the classifier trains", low=0, only=LEARNER
        )
        frozen_rounds: int = option(1, "rounds of a later task in which only the head trains", low=0, only=FEDERATION)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.places = {layer: layer for layer in self.model.layers}
        if self.config.form != "lora":
            self.places = find_attentions(self.model, f"lae with form={self.config.form}")
        if self.config.form == "prefix":
            self.sizes = {place: key_width(self.model, place, query) for place, query in self.places.items()}

    def begin_task(self) -> None:
        if self.index == 0:
            for place, layer in self.places.items():
                self.parameters |= {
                    f"{place}/{role}": make_leaf(value) for role, value in self._draw_layer(place, layer).items()
                }
        elif self.index == 1:
            self.memory["adapters"] = {
                f"offline/{key}": value.detach().clone() for key, value in self.parameters.items()
            }

    def _draw_layer(self, place: str, layer: str) -> dict[str, Tensor]:
        if self.config.form == "prefix":
            shape = (self.config.length, self.sizes[place])
            return {role: 0.02 * torch.randn(*shape, generator=self.generator(role, place)) for role in ("K", "V")}
        m, n = self.model.base.shape(layer)
        if self.config.form == "adapter":
            m = n  # beside an attention: from hidden states to hidden states
        return {
            "A": lora.draw_A(n, self.config.r, self.generator("A", place)),
            "B": torch.zeros(m, self.config.r),
            "s": torch.ones(()),
        }

    def change(self) -> Change:
        return self._view(self.parameters)

    def views(self) -> dict[str, Change]:
        offline = {key.removeprefix("offline/"): value for key, value in self.memory["adapters"].items()}
        return {"online": self.change(), **({"offline": self._view(offline)} if offline else {})}

    def combine(self, scores: dict[str, Tensor]) -> Tensor:
        return both(scores)

    def body_trains(self, step: int) -> bool:
        return self.index == 0 or step >= self.config.frozen_epochs * self.per_epoch()

    def after_step(self, step: int) -> None:
        # So that a task leaves the same share of the average, however many steps it takes.
        keep = self.config.retention ** (1 / self.steps())
        for key, value in self.parameters.items() if self.index else ():
            self.memory["adapters"][f"offline/{key}"].mul_(keep).add_(value.detach(), alpha=1 - keep)

    def _view(self, leaves: Mapping[str, Tensor]) -> Change:
        change: dict[str, Patch] = {}
        for place, layer in self.places.items() if leaves else ():
            if self.config.form == "prefix":
                change |= add_prefix(self.model, place, layer, leaves[f"{place}/K"], leaves[f"{place}/V"])
            else:
                pair = leaves[f"{place}/B"], leaves[f"{place}/A"]
                shape = low_rank if self.config.form == "lora" else beside
                change[place] = shape(*pair, leaves[f"{place}/s"])
        return change


def beside(B: Tensor, A: Tensor, scale: Tensor) -> Patch:
    """y + scale B gelu(A x): an adapter parallel to a module."""
    return lambda x, y: y + (scale * F.linear(F.gelu(F.linear(x.to(A.dtype), A)), B)).to(y.dtype)


def both(scores: dict[str, Tensor]) -> Tensor:
    """The larger of the views' probabilities, class by class; what is -inf for all stays so."""
    best = torch.stack([value.softmax(-1) for value in scores.values()]).amax(0)
    unseen = torch.stack([value.isneginf() for value in scores.values()]).all(0)
    return best.masked_fill(unseen, float("-inf"))
