"""SD-LoRA: the directions of earlier LoRAs are normalised and frozen; their magnitudes and the new LoRA train.

Wu et al., arXiv 2501.13198. Per layer, with s = alpha / r,

    W_t = W + sum_{i<t} m_i D_i + s B_t A_t,   D_i = B_i A_i / |B_i A_i|_F,   m_i, B_t, A_t train

When task i ends, m_i = s |B_i A_i|_F, so that putting it by changes nothing. A LoRA that never moved has no direction:
D_i = 0. Magnitudes are one number for each layer and old task, in `parameters` as `layer/magnitudes` [t - 1]; a
direction is kept as the pair B_i / |B_i A_i|_F and A_i.

Deviations: the variants that lower the rank (RR) or absorb directions (KD) are left out. The paper's equations are
followed where the authors' code has others: there m_i is one number for all layers, starts at 0.8 and not where it
keeps the function; D_i is divided by |B_i|_F |A_i|_F, about sqrt(r) times as much (|B A|_F is 0.35 of it for random
factors of rank 8); and the new LoRA has a trained factor, 0.8 at first, in place of s.

    >>> import torch
    >>> B, magnitude = direction(torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0, 0.0]]), 0.5)
    >>> B.flatten().mul(10).round().tolist(), magnitude.item()   # |B A| = 10; times the scale 0.5
    ([3.0, 4.0], 5.0)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft import lowrank
from fedpeft.config import option
from fedpeft.continual.body import Body, make_leaf
from fedpeft.continual.model import Change, low_rank
from fedpeft.continual.parts import lora


class SDLoRA(Body):
    """Frozen directions with learned magnitudes, and one new LoRA."""

    paper = "Wu et al. 2025, arXiv 2501.13198"
    needs = ("boundaries",)
    stays_central = "trains magnitudes of earlier directions at the clients, and no adapter has such parameters"

    @dataclass
    class Config:
        r: int = option(8, "rank of each task's LoRA", low=1)
        alpha: float = option(8.0, "scale of the new LoRA: alpha / r", above=0)

    def begin_task(self) -> None:
        lora.put_by(self)
        kept = self.memory["adapters"]
        # Before the new pair is drawn: the last one becomes a direction, whose magnitude keeps its product.
        for layer in self.model.layers if self.index else ():
            key = f"past/{self.index - 1}/{layer}"
            kept[f"{key}/B"], new = direction(kept[f"{key}/B"], kept[f"{key}/A"], self._scale_of())
            before = self.parameters.get(f"{layer}/magnitudes", torch.ones(0))
            self.parameters[f"{layer}/magnitudes"] = make_leaf(torch.cat([before, new[None]]))
        lora.begin(self, self.config.r, self.index)

    def change(self) -> Change:
        return {layer: low_rank(*self._pairs(layer)) for layer in self.model.layers if self.parameters}

    def _pairs(self, layer: str) -> tuple[Tensor, Tensor]:
        magnitudes = self.parameters.get(f"{layer}/magnitudes", torch.ones(0))
        old = [(magnitude * B, A) for magnitude, (B, A) in zip(magnitudes, lora.past(self, layer), strict=True)]
        new = self._scale_of() * self.parameters[f"{layer}/B"], self.parameters[f"{layer}/A"]
        return lora.side_by_side([*old, new])

    def _scale_of(self) -> float:
        return float(self.config.alpha / self.config.r)


def direction(B: Tensor, A: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """B / |B A|_F, so that its product with A has norm 1, and the magnitude scale |B A|_F; zeros where B A is zero."""
    norm = lowrank.norm(B, A).to(B.dtype)
    return (B / norm if norm > 0 else torch.zeros_like(B)), scale * norm
