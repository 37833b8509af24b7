"""Forms that can train in a base, for bodies that care when and how strongly it moves and not what it is that moves.

    full   dW [out, in] of every adapted layer, from zero            y + dW x
    lora   B [out, r] = 0 and A [r, in] Kaiming-uniform              y + (alpha / r) B A x
    film   gain g and shift b of every normalisation layer, from 0   (1 + g) y + b, by channel

`film` reaches every function that training the layer's own affine parameters reaches (where these are not zero), and
leaves them as they are.

    >>> import torch
    >>> from fedpeft.models.base import Base
    >>> norm = torch.nn.LayerNorm(2)
    >>> model = Plastic(Base(net := torch.nn.Sequential(norm, torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
    ...                      lambda batch: net(batch["x"]), {"2": net[2]}, None, "", "image-classification"), ["1"])
    >>> sorted(start(model, "film", 1, lambda layer: torch.Generator())), sorted(start(model, "full", 1, None))
    (['0/b', '0/g'], ['1/W'])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedpeft.config import LEARNER, option
from fedpeft.continual.body import Body, make_leaf
from fedpeft.continual.model import Change, Patch, Plastic, add_dense, low_rank
from fedpeft.continual.parts.lora import draw_A
from fedpeft.errors import InputError

CHANNELS_FIRST = ("BatchNorm", "GroupNorm", "InstanceNorm")


@dataclass
class FormConfig:
    """Options of bodies whose trained form can be chosen; r and alpha are the LoRA's alone."""

    form: str = option(
        "full",
        "what trains: the layers' full weights, a LoRA, or gain and shift of the norms",
        choices=("full", "lora", "film"),
        only=LEARNER,
    )
    r: int = option(8, "rank of the LoRA; else adapter.r", low=1, only=LEARNER)
    alpha: float = option(8.0, "scale of the LoRA: alpha / r; else adapter.alpha", above=0, only=LEARNER)


class FormBody(Body):
    """The same parameters in every task, in the form that `form` says."""

    Config: ClassVar[Any] = FormConfig

    def begin_task(self) -> None:
        if not self.parameters:
            values = start(self.model, self.config.form, self.config.r, lambda layer: self.generator("A", layer))
            self.parameters = {key: make_leaf(value) for key, value in values.items()}

    def change(self) -> Change:
        return self.changed(self.parameters)

    def changed(self, leaves: Mapping[str, Tensor]) -> Change:
        """What the model becomes with these in the place of `parameters`."""
        return change(self.model, leaves, self.config.alpha / self.config.r)


def start(model: Plastic, form: str, r: int, generator: Callable[[str], torch.Generator]) -> dict[str, Tensor]:
    """Values by `layer/role` that change nothing yet.

    Raises:
        InputError: `film` on a base without normalisation layers.
    """
    if form == "film":
        found = norms(model)
        if not found:
            raise InputError(
                f"body.form=film: {type(model.base.backbone).__name__} has no normalisation layers with "
                "a gain. Use full or lora."
            )
        return {f"{name}/{role}": torch.zeros(width) for name, width in found.items() for role in ("g", "b")}
    values = {}
    for layer in model.layers:
        m, n = model.base.shape(layer)
        if form == "full":
            values[f"{layer}/W"] = torch.zeros(m, n)
        else:
            values[f"{layer}/A"] = draw_A(n, r, generator(layer))
            values[f"{layer}/B"] = torch.zeros(m, r)
    return values


def change(model: Plastic, leaves: Mapping[str, Tensor], scale: float = 1.0) -> Change:
    """The change that values by `layer/role` make; the roles say in which form."""
    patches: dict[str, Patch] = {}
    for key in leaves:
        layer, _, role = key.rpartition("/")
        if role == "W":
            patches[layer] = add_dense(leaves[key])
        # A and b are taken along with B and g: each pair is one change.
        elif role == "B":
            patches[layer] = low_rank(leaves[key], leaves[f"{layer}/A"], scale)
        elif role == "g":
            first = type(model.base.layer(layer)).__name__.startswith(CHANNELS_FIRST)
            patches[layer] = modulate(leaves[key], leaves[f"{layer}/b"], first)
    return patches


def norms(model: Plastic) -> dict[str, int]:
    """Normalisation layers with a gain, and their channels; the head's own are left out."""
    head = {id(module) for module in model.base.head.modules()}
    return {
        name: weight.numel()
        for name, module in model.base.backbone.named_modules()
        # By name, as each family of models has a class of its own for it.
        if "Norm" in type(module).__name__
        and id(module) not in head
        and isinstance(weight := getattr(module, "weight", None), nn.Parameter)
    }


def modulate(g: Tensor, b: Tensor, channels_first: bool = False) -> Patch:
    """y -> (1 + g) y + b; channels are the last dimension, or the second."""

    def patch(x: Tensor, y: Tensor) -> Tensor:
        shape = (-1, *(1,) * (y.ndim - 2)) if channels_first else (-1,)
        return ((1 + g.view(shape)) * y + b.view(shape)).to(y.dtype)

    return patch
