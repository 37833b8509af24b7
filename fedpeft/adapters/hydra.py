"""Hydra: a LoRA beside a frozen layer, and one behind it. Kim et al. 2023, arXiv 2309.06922.

    y = W x + b,   y' = y + s (B_p A_p x + B_s A_s y)
    W' = (I + s B_s A_s) W + s B_p A_p,   b' = (I + s B_s A_s) b

A_p [r, in], B_p [out, r], A_s [r, out] and B_s [out, r] train. Both A are drawn from N(0, 0.02^2), both B begin at
zero: the untrained model is the base.

What the second pair does hangs on the frozen W, which neither a state nor a folder has. The folder of a run keeps the
four factors, and whoever wants a plain LoRA of it is refused; `fedpeft export --merge` writes W' and b'.

Deviations: the second pair reads y with the layer's bias; s = alpha / r, which is 1 in the paper (adapter.alpha =
adapter.r). The paper has both pairs at the last layer of the feed-forward network, here they are at
`adapter.target_modules`, which are LoRA's where they are not named.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedpeft.adapters.grouped import Values, add_product
from fedpeft.adapters.placed import Placed, PlacedLayer, Tensors

SPREAD = 0.02


class Hydra(Placed):
    """A LoRA beside each frozen layer, and one behind it."""

    paper = "Kim et al. 2023, arXiv 2309.06922"
    averages = ("A_p", "B_p", "A_s", "B_s")

    def start(self, weight: Tensor, r: int, scale: float, generator: torch.Generator) -> Tensors:
        """Both A drawn, both B zero."""
        out, width = weight.shape
        beside, behind = (SPREAD * torch.randn(r, size, generator=generator) for size in (width, out))
        return {"A_p": beside, "B_p": torch.zeros(out, r), "A_s": behind, "B_s": torch.zeros(out, r)}

    def act(self, layer: PlacedLayer, x: Tensor, own: Values) -> Tensor:
        """The layer's outputs, with those of both pairs."""
        y: Tensor = layer.base_layer(x)
        beside, behind = layer.prepare(x, own) @ own["A_p"].mT, layer.prepare(y, own) @ own["A_s"].mT
        moved = add_product(y.to(beside.dtype), beside, own["B_p"], layer.scale)
        return add_product(moved, behind, own["B_s"], layer.scale).to(y.dtype)

    def usage(self, scale: float) -> list[str]:
        """Both pairs as a forward hook."""
        return [
            "def adapt(layer, args, y, own):",
            '    beside = args[0] @ own["A_p"].T @ own["B_p"].T',
            f'    return y + {scale:g} * (beside + y @ own["A_s"].T @ own["B_s"].T)',
        ]
