"""Which modules get a LoRA: looked up per architecture, checked against the model at hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fedpeft.config import AdapterConfig
from fedpeft.errors import InputError
from fedpeft.models.base import Base, is_linear

# transformers 5 renamed ViT's projections, so peft's table by model type can be stale: what counts is what is there.
ATTENTION = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("query_key_value",),
    ("qkv_proj",),
    ("qkv",),
    ("Wqkv",),
    ("c_attn",),
    ("q", "v"),
    ("in_proj",),
)


def linear_layers(base: Base) -> dict[str, nn.Module]:
    """Names of the layers that can take a LoRA; heads are left out."""
    heads = {id(module) for head in base.heads.values() for module in head.modules()}
    backbone: Any = base.backbone
    # A language model's last layer is the head in all but its name, and often shares its weight with the embedding.
    output = backbone.get_output_embeddings() if hasattr(backbone, "get_output_embeddings") else None
    return {
        name: module
        for name, module in backbone.named_modules()
        if is_linear(module) and id(module) not in heads and module is not output
    }


def find_norms(base: Base) -> list[str]:
    """Names of the norms, in the order of the model; heads are left out."""
    heads = {id(part) for head in base.heads.values() for part in head.modules()}
    named = base.backbone.named_modules()
    return [name for name, part in named if type(part).__name__.endswith("Norm") and id(part) not in heads]


def resolve(base: Base, wanted: list[str] | None, places: tuple[tuple[str, ...], ...] = ATTENTION) -> list[str]:
    """Full names of the modules to adapt, sorted.

    Args:
        wanted: name endings, `["all-linear"]`, or None for those of `places`.
        places: groups of endings; the first of which a model has all. ATTENTION is query and value projections.

    Raises:
        InputError: an ending matches no linear layer; the message lists those there are.
    """
    layers = linear_layers(base)
    endings = sorted({name.rpartition(".")[2] for name in layers})
    if wanted == ["all-linear"]:
        return sorted(layers)
    if wanted is None:
        wanted = next((list(group) for group in places if all(_find(layers, ending) for ending in group)), None)
        if wanted is None:
            raise InputError(
                f"adapter.target_modules: no layer that is known by name in {type(base.backbone).__name__}; "
                f"name some of its linear layers: {', '.join(endings)}, or [all-linear]."
            )
    chosen = []
    for ending in wanted:
        found = _find(layers, ending)
        if not found:
            raise InputError(
                f"adapter.target_modules: no linear layer of {type(base.backbone).__name__} ends in '{ending}'. "
                f"There are: {', '.join(endings)}."
            )
        chosen += found
    return sorted(set(chosen))


def _find(layers: Iterable[str], ending: str) -> list[str]:
    return [name for name in layers if name == ending or name.endswith(f".{ending}")]


def lora_layers(base: Base, config: AdapterConfig) -> dict[str, Any]:
    """Put peft's LoRA layers into the backbone; site name -> layer."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    # Full names: by endings peft would also take layers of the head.
    names = resolve(base, config.target_modules)
    settings = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        target_modules=names,
        bias="none",
    )
    inject_adapter_in_model(settings, base.backbone)
    return {
        name: module
        for name, module in base.backbone.named_modules()
        if isinstance(module, LoraLayer) and name in names
    }
