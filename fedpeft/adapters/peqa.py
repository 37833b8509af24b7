"""PEQA: the scales of a weight that is kept in few bits train. Kim et al. 2023, arXiv 2305.14152 (from memory).

    W = S * Q,   W' = (1 + a) * S * Q = W + a * W,   a_0 = 0

Q are whole numbers, or the 16 places of NF4, and S their scales, the same for a row (int8) or 64 entries (NF4). a [out,
groups] has a value for each `adapter.options.group` inputs of a row, or for a whole row. Where no scale of S is for
entries of two groups, W' has the Q of W and other scales. A change is linear in a: an average of clients' adapters is
exact.

Over a base in float the same formula scales rows, or groups of them, of weights that nobody has rounded: nothing is
quantised here, and whoever asks for it is told so. Over one of `model.quantization` the base needs the memory of its
few bits; with groups each product makes the dequantised change, of each client in a cohort, and of each record under
sample-level DP, out x in values.

a has no rank: `adapter.r`, `alpha` and `rslora` do nothing here.

Deviations: the paper trains S itself, here a share of it, whose slopes are those of S times S: Adam then moves scales
of all sizes by the same share. It rounds weights itself, to 3 or 4 bits with a zero point; here a base is rounded as it
is loaded, or not at all. `fedpeft export --merge` writes a dense W', which no longer is of few bits.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.adapters.adapted import Injected
from fedpeft.adapters.grouped import Values
from fedpeft.adapters.placed import Placed, PlacedLayer, Tensors
from fedpeft.config import AdapterConfig, option
from fedpeft.models.base import Base, read_weight
from fedpeft.models.quantized import is_quantized

log = logging.getLogger("fedpeft")


class PEQA(Placed):
    """The scales of a quantised weight train."""

    paper = "Kim et al. 2023, arXiv 2305.14152"
    averages = ("a",)

    @dataclass
    class Config:
        group: int | None = option(None, "inputs that have a scale together; null is all of a row", low=1)

    def inject(self, base: Base, config: AdapterConfig, seed: int) -> Injected:
        """Put a layer around each target; say so where nothing is quantised."""
        injected = super().inject(base, config, seed)
        if not any(is_quantized(base.layer(site)) for site in injected.sites):
            log.warning(
                "adapter.name=peqa: model.quantization=null, so that the weights stay as they are, and rows or groups "
                "of them are scaled. Set model.quantization=int8 or nf4 to train the scales of a quantised base."
            )
        return injected

    def start(self, weight: Tensor, r: int, scale: float, generator: torch.Generator) -> Tensors:
        """Zeros."""
        out, width = weight.shape
        # Rounded up: the last group of a row may have fewer inputs.
        return {"a": torch.zeros(out, -(-width // (self.config.group or width)))}

    def least(self, weight: Tensor) -> int:
        """Any: nothing here has a rank."""
        return sys.maxsize

    def act(self, layer: PlacedLayer, x: Tensor, own: Values) -> Tensor:
        """W' x + b."""
        y: Tensor = layer.base_layer(x)
        if self.config.group is None:
            bias = getattr(layer.base_layer, "bias", None)
            change = layer.prepare(y if bias is None else y - bias, own) * own["a"].mT
        else:
            shares = own["a"].repeat_interleave(self.config.group, -1)[..., : x.shape[-1]]
            change = layer.prepare(x, own) @ (shares * read_weight(layer.base_layer).to(shares)).mT
        return (y + change).to(y.dtype)

    def usage(self, scale: float) -> list[str]:
        """The scaled weight as a forward hook; a layer of few bits says itself what its weight is."""
        spread = 'own["a"]' if self.config.group is None else f'own["a"].repeat_interleave({self.config.group}, 1)'
        return [
            "def adapt(layer, args, y, own):",
            "    x = args[0]",
            "    one = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)",
            "    weight = (layer.forward(one) - layer.forward(0 * one)).T",
            f"    return y + x @ ({spread}[:, : len(one)] * weight).T",
        ]
