"""LoRA by peft: W x + s B A x, s = alpha / r (alpha / sqrt(r) with rslora). Hu et al., arXiv 2106.09685.

A [r, in] is Kaiming-uniform (a = sqrt 5), B [out, r] zero, as peft draws them.
"""

from __future__ import annotations

from typing import ClassVar

from fedpeft.adapters.adapted import Injected
from fedpeft.config import AdapterConfig
from fedpeft.models.base import Base
from fedpeft.models.targets import lora_layers
from fedpeft.state import AdaptedLayer


class Lora:
    """Low-rank factors A and B beside linear layers."""

    paper: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685"

    def inject(self, base: Base, config: AdapterConfig, seed: int) -> Injected:
        layers = lora_layers(base, config)
        parameters, sites = {}, {}
        for site, layer in layers.items():
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            parameters[f"{site}/A"], parameters[f"{site}/B"] = A, B
            sites[site] = AdaptedLayer("lora", (B.shape[0], A.shape[1]), float(layer.scaling["default"]))
        return Injected(parameters, sites)
