"""Adapters of ours but LoRA and LoRA-SB: options under which each is tried, and small models that have one."""

from __future__ import annotations

from typing import Any

import torch

from fedpeft import registry
from fedpeft.adapters.factored import find_method
from fedpeft.adapters.placed import find_placed
from fedpeft.state import AdapterState
from support import per_sample
from support import small_models as small

# Every one with its defaults, and options that make another adapter of it; at rank 4 on layers of 16 x 16.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "nlora": [{"init": "block"}, {"train": "core"}, {"init": "block", "train": "core"}],
    "nola": [{"train": "beta"}],
    "bd_lora": [{"blocks": 4}],
    "ravan": [{"heads": 1}],
    "svfit": [{"energy": 1.0}],
    "salt": [{"train": "values"}],
    "orthogonal_adaptation": [{"slot": 2}],
    "peqa": [{"group": 5}],
    "bottleneck": [{"place": "parallel", "activation": "gelu"}],
}
OWN = [name for name in registry.names("adapters") if find_placed(name) is not None]
CASES = [(name, options) for name in OWN for options in ({}, *VARIANTS.get(name, []))]
# Those that are no product of low rank, and those that are.
PLACED = [case for case in CASES if find_method(case[0]) is None]
FACTORED = [case for case in CASES if case not in PLACED]
# Of which an average of adapters is exact: what trains is linear in them.
LINEAR = ("paca", "svfit", "ravan", "loldu", "loca", "orthogonal_adaptation", "difffit", "peqa")
WITHOUT_RANK = ("difffit", "peqa")
LINEAR_BY_OPTIONS = (
    ("nlora", {"train": "core"}),
    ("nlora", {"init": "block", "train": "core"}),
    ("nola", {"train": "beta"}),
    ("salt", {"train": "values"}),
)


def is_linear(name: str, options: dict[str, Any]) -> bool:
    """Whether a change of the weight is linear in what trains."""
    return name in LINEAR or (name, options) in LINEAR_BY_OPTIONS


def roles_of(name: str) -> tuple[str, ...]:
    """What trains."""
    cls = registry.load("adapters", name)
    return (*cls.averages, *cls.keeps, "head")


# Without positions that turn keys, a bias of keys is the same for all scores of a softmax: its slope is rounding.
WITHOUT_KEYS = ["query", "value", "dense", "LayerNorm"]


def adapted(path: Any, name: str, options: dict[str, Any], kind: str = "bert", **section: Any):
    if name == "difffit" and kind == "bert":
        section = {"target_modules": WITHOUT_KEYS, **section}
    return small.adapted(path, kind, method=name, r=4, alpha=8.0, options=options, **section)


def in_double(folder: Any, kind: str, name: str, **section: Any):
    """An adapter on a small model in float64, without dropout; the model is saved once in a folder."""
    path = folder / kind
    path = path if path.exists() else small.save(kind, path)
    model = small.adapted(path, kind, method=name, r=4, alpha=8.0, **section)
    per_sample.as_double(model)
    per_sample.without_dropout(model)
    model.training_mode = lambda: None
    return model


def moved(model: Any, name: str, seed: int = 1, scale: float = 0.2) -> AdapterState:
    """The state with all that trains moved at random."""
    draw, state = torch.Generator().manual_seed(seed), model.state()
    return state.replace(
        {
            key: value + scale * torch.randn(value.shape, generator=draw, dtype=value.dtype)
            for key, value in state.select(roles_of(name)).tensors.items()
        }
    )
