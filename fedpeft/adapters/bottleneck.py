"""Bottleneck adapters: a small network of two layers behind a frozen layer, or beside it.

    series      y = W x,   y' = y + s (U f(D y + d) + u)        Houlsby et al. 2019, arXiv 1902.00751
    parallel    y' = W x + s (U f(D x + d) + u)                 He et al. 2022, arXiv 2110.04366; AdaptFormer

D [r, in or out], d [r], U [out, r] and u [out] train. adapter.r is the width of the bottleneck, s = alpha / r
(adapter.alpha=adapter.r is the 1 of series adapters, a tenth of it AdaptFormer's 0.1). D is drawn as LoRA's A, U and
both biases begin at zero: the untrained model is the base.

By default it stands where Houlsby's does, behind the last layers of attention and feed-forward network, before what
they are added to; in parallel beside the same. `adapter.target_modules` names others: Pfeiffer's place is the
feed-forward network's last layer alone, that of LLM-Adapters (arXiv 2304.01933) any linear layer.

f is not linear, so an average of adapters is not the average of what they do, and nothing can be merged into a weight:
`fedpeft export --merge`, offline aggregation and mergers refuse. The folder of a run has the four tensors of each layer
and the section that they were trained by; the card of an export has the lines that load it without fedpeft.

Deviations: Houlsby draws U near zero where it is zero here (as AdaptFormer, arXiv 2205.13535, and AdapterTune have it);
AdaptFormer's branch begins before the norm of the feed-forward block and goes around both of its layers, here it goes
around one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpeft.adapters.factored import draw_kaiming
from fedpeft.adapters.grouped import Values, add_product
from fedpeft.adapters.placed import Placed, PlacedLayer, Tensors
from fedpeft.config import option


class Bottleneck(Placed):
    """A small network of two layers behind each frozen layer, or beside it."""

    paper = "Houlsby et al. 2019, arXiv 1902.00751; He et al. 2022, arXiv 2110.04366; AdaptFormer, arXiv 2205.13535"
    averages = ("D", "U", "d", "u")
    affine = False
    # BERT and RoBERTa; DistilBERT; ViT; DeiT and others as they were; Llama and its like; GPT-2; T5; CLIP.
    places = (
        ("output.dense",),
        ("out_lin", "lin2"),
        ("o_proj", "fc2"),
        ("o_proj", "down_proj"),
        ("c_proj",),
        ("o", "wo"),
        ("out_proj", "fc2"),
    )

    @dataclass
    class Config:
        place: str = option("series", "behind the frozen layer, or beside it", choices=("series", "parallel"))
        activation: str = option("relu", "f", choices=("relu", "gelu", "silu", "tanh"))

    def start(self, weight: Tensor, r: int, scale: float, generator: torch.Generator) -> Tensors:
        """D as LoRA's A, all else zero."""
        out, width = weight.shape
        read = width if self.config.place == "parallel" else out
        tensors = {"D": draw_kaiming(r, read, generator), "d": torch.zeros(r)}
        return {**tensors, "U": torch.zeros(out, r), "u": torch.zeros(out)}

    def act(self, layer: PlacedLayer, x: Tensor, own: Values) -> Tensor:
        """The layer's outputs, with those of the small network."""
        y: Tensor = layer.base_layer(x)
        read = layer.prepare(x if self.config.place == "parallel" else y, own)
        inner = getattr(nn.functional, self.config.activation)(read @ own["D"].mT + own["d"].unsqueeze(-2))
        moved = y.to(inner.dtype) + layer.scale * own["u"].unsqueeze(-2)
        return add_product(moved, inner, own["U"], layer.scale).to(y.dtype)

    def usage(self, scale: float) -> list[str]:
        """The network as a forward hook."""
        read = "args[0]" if self.config.place == "parallel" else "y"
        return [
            "def adapt(layer, args, y, own):",
            f'    inner = torch.nn.functional.{self.config.activation}({read} @ own["D"].T + own["d"])',
            f'    return y + {scale:g} * (inner @ own["U"].T + own["u"])',
        ]
