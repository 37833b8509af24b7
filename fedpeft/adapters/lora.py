"""LoRA by peft: W x + s B A x, s = alpha / r (alpha / sqrt(r) with rslora). Hu et al., arXiv 2106.09685.

A [r, in] is Kaiming-uniform (a = sqrt 5), B [out, r] zero, as peft draws them.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from fedpeft.adapters.adapted import Injected
from fedpeft.adapters.targets import resolve
from fedpeft.config import AdapterConfig
from fedpeft.models import Base
from fedpeft.state import Site


class Lora:
    """Low-rank factors A and B beside linear layers."""

    paper = "Hu et al. 2021, arXiv 2106.09685"

    def inject(self, base: Base, config: AdapterConfig, seed: int) -> Injected:
        layers = lora_layers(base, config)
        parameters, sites, frozen = {}, {}, {}
        for site, layer in layers.items():
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            parameters[f"{site}/A"], parameters[f"{site}/B"] = A, B
            sites[site] = Site("lora", (B.shape[0], A.shape[1]), float(layer.scaling["default"]))
            frozen[site] = layer.get_base_layer()
        return Injected(parameters, sites, frozen)


def lora_layers(base: Base, config: AdapterConfig) -> dict[str, Any]:
    """Put peft's LoRA layers into the backbone; site name -> layer."""
    names = resolve(base, config.target_modules)
    settings = LoraConfig(r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, use_rslora=config.rslora,
                          target_modules=names, bias="none")
    inject_adapter_in_model(settings, base.backbone)
    return {
        name: module
        for name, module in base.backbone.named_modules()
        if isinstance(module, LoraLayer) and name in names
    }
