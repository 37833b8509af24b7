"""Sequential fine-tuning: the same parameters go on from task to task, with nothing done against forgetting.

    dW (full weights of the adapted layers) or s B A (LoRA) is trained on every task in turn

The lower reference of every table. `full` trains dW [out, in] from zero; `lora` a pair B = 0, A Kaiming-uniform.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fedpeft.config import LEARNER, option
from fedpeft.continual.body import Body, make_leaf
from fedpeft.continual.model import Change, add_dense, low_rank


class Sequential(Body):
    """Plain fine-tuning, task after task."""

    stays_central = ""

    @dataclass
    class Config:
        form: str = option(
            "full", "what trains: the layers' full weights, or a LoRA", choices=("full", "lora"), only=LEARNER
        )
        r: int = option(8, "rank of the LoRA; else adapter.r", low=1, only=LEARNER)
        alpha: float = option(8.0, "scale of the LoRA: alpha / r; else adapter.alpha", above=0, only=LEARNER)

    def begin_task(self) -> None:
        for layer in self.model.layers if not self.parameters else ():
            m, n = self.model.base.shape(layer)
            if self.config.form == "full":
                self.parameters[f"{layer}/W"] = make_leaf(torch.zeros(m, n))
            else:
                draw = torch.rand(self.config.r, n, generator=self.generator("A", layer))
                self.parameters[f"{layer}/A"] = make_leaf((2 * draw - 1) / math.sqrt(n))
                self.parameters[f"{layer}/B"] = make_leaf(torch.zeros(m, self.config.r))

    def change(self) -> Change:
        if not self.parameters:
            return {}
        if self.config.form == "full":
            return {layer: add_dense(self.parameters[f"{layer}/W"]) for layer in self.model.layers}
        scale = self.config.alpha / self.config.r
        return {
            layer: low_rank(self.parameters[f"{layer}/B"], self.parameters[f"{layer}/A"], scale)
            for layer in self.model.layers
        }
