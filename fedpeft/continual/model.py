"""A frozen base whose layers can be changed for the time of one pass: what every body works on.

A `Change` says for some modules what becomes of their output y at input x; the base's own weights are never written.
Old and new models, experts and averages are then only different changes over one base, and autograd reaches whatever
tensors a change was made of.

    >>> import torch
    >>> model = Plastic(Base(net := torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4)),
    ...                      lambda batch: net(batch["x"]), {"1": net[1]}, None, "", "image-classification"), ["0"])
    >>> model.layers
    ('0',)
    >>> x = {"x": torch.ones(5, 2)}
    >>> moved = model.features(x, {"0": add_dense(torch.ones(3, 2))}) - model.features(x)
    >>> moved.round(decimals=4).unique().tolist()
    [2.0]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpeft.models.base import Base, catch_inputs
from fedpeft.models.targets import resolve

Inputs = dict[str, Tensor]
Patch = Callable[[Tensor, Tensor], Tensor]  # input x and output y of a module -> its new output
Change = Mapping[str, Patch]


class Plastic:
    """One frozen base, the layers of it that bodies may change, and its features under a change.

    Args:
        layers: endings of the names of the layers to adapt, None for the attention's query and value projections.

    Attributes:
        layers: full names of the adaptable layers, sorted.
        passes: forward passes made, in rows.
    """

    def __init__(self, base: Base, layers: list[str] | None = None) -> None:
        self.base = base
        self.layers = tuple(resolve(base, layers))
        self.passes = 0

    @classmethod
    def over(cls, base: Base, layers: Iterable[str]) -> Plastic:
        """One whose layers have these full names, though an adapter's may be around them."""
        plastic = cls.__new__(cls)
        plastic.base, plastic.layers, plastic.passes = base, tuple(sorted(layers)), 0
        return plastic

    def features(self, inputs: Inputs, change: Change | None = None) -> Tensor:
        """Features [N, D] under a change; the base in evaluation mode, so that no row depends on another."""
        self.base.backbone.eval()
        with ExitStack() as stack:
            for name, patch in (change or {}).items():
                layer = self.base.layer(name)
                stack.callback(layer.register_forward_hook(_patch_output(patch), with_kwargs=True).remove)
            features = self.base.features(inputs)
        self.passes += len(features)
        return features

    def observe(self, inputs: Inputs, change: Change | None = None) -> dict[str, Tensor]:
        """What enters each adaptable layer, as rows [tokens, in]; padding is left out where there is a mask."""
        device = next(self.base.head.parameters()).device
        inputs = {name: value.to(device) for name, value in inputs.items()}
        with ExitStack() as stack, torch.no_grad():
            caught = {name: stack.enter_context(catch_inputs(self.base.layer(name))) for name in self.layers}
            self.features(inputs, change)
        mask = inputs.get("attention_mask")
        kept = None if mask is None else mask.bool().cpu()
        entered = {name: values[-1].float().cpu() for name, values in caught.items()}  # sums are made on the CPU
        return {
            name: value[kept] if kept is not None and value.shape[:2] == kept.shape else value.flatten(0, -2)
            for name, value in entered.items()
        }


def add_dense(delta: Tensor) -> Patch:
    """W -> W + delta [out, in]."""
    return lambda x, y: y + F.linear(x.to(delta.dtype), delta).to(y.dtype)


def low_rank(B: Tensor, A: Tensor, scale: float | Tensor = 1.0) -> Patch:
    """W -> W + scale B A, with B [out, r] and A [r, in]."""
    # In the factors' dtype: the base may be in half precision, where small changes vanish.
    return lambda x, y: y + (scale * F.linear(F.linear(x.to(A.dtype), A), B)).to(y.dtype)


def sum_changes(*changes: Change) -> dict[str, Patch]:
    """Several changes at once: what they add adds up."""
    names = {name for change in changes for name in change}
    return {name: _sum_patches([change[name] for change in changes if name in change]) for name in sorted(names)}


def _sum_patches(patches: list[Patch]) -> Patch:
    def patch(x: Tensor, y: Tensor) -> Tensor:
        for one in patches:
            y = one(x, y)
        return y

    return patch


def _patch_output(patch: Patch) -> Callable[..., Any]:
    """A forward hook; a block that returns a tuple has its hidden states first."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        # Some architectures call their layers by keyword.
        x = args[0] if args else next(iter(kwargs.values()))
        return (patch(x, output[0]), *output[1:]) if isinstance(output, tuple) else patch(x, output)

    return hook
