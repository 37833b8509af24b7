"""The one view of a frozen base model: its head, the features that enter it, its layers' weights as [out, in].

>>> import torch
>>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
>>> base = Base(net, lambda batch: net(batch["x"]), {"1": net[1]}, None, "", "image-classification")
>>> base.width, base.classes, base.shape("0"), tuple(base.features({"x": torch.ones(5, 2)}).shape)
(3, 4, (3, 2), (5, 3))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedpeft.errors import InputError
from fedpeft.models.quantized import dequantize, is_quantized, make_dense
from fedpeft.objectives.base import Objective, load_objective


@dataclass
class Base:
    """A frozen base model. What is put over it (adapters, changes, overlays) holds one, and asks it.

    Attributes:
        backbone: the transformers model that adapters go into.
        forward: inputs -> logits [N, labels] ([N, T, vocabulary] for causal-lm).
        heads: module name -> head module; names are those of the checkpoint (`classifier`).
        processor: tokenizer, image processor, or None where images go in as they are.
        source: what `AutoModel...from_pretrained` takes to get this base again.
        task: name of the objective.
        options: of the objective.
    """

    backbone: nn.Module
    forward: Callable[[dict[str, Tensor]], Tensor]
    heads: dict[str, nn.Module]
    processor: Any
    source: str
    task: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def objective(self) -> Objective:
        """What the model is trained to do."""
        return load_objective(self.task, self.options)

    @property
    def head(self) -> nn.Module:
        """The classification head; of several modules, the first that features enter.

        Raises:
            InputError: the model has none.
        """
        if not self.heads:
            raise InputError(f"model.task={self.task}: the model has no classification head.")
        return next(iter(self.heads.values()))

    @property
    def head_layers(self) -> list[nn.Linear]:
        """The linear layers of all heads; empty without a head."""
        return [part for head in self.heads.values() for part in head.modules() if isinstance(part, nn.Linear)]

    @property
    def width(self) -> int:
        """D of the features [N, D]."""
        return self.head_layers[0].in_features

    @property
    def classes(self) -> int:
        """How many classes the head scores."""
        return self.head_layers[-1].out_features

    @property
    def modules(self) -> list[nn.Module]:
        """The backbone, and heads outside of it: all modules that hold parameters."""
        inside = {id(module) for module in self.backbone.modules()}
        return [self.backbone, *(head for head in self.heads.values() if id(head) not in inside)]

    @property
    def named_modules(self) -> dict[str, nn.Module]:
        """All parts by name, heads outside of the backbone under their own."""
        parts = dict(self.backbone.named_modules())
        inside = set(map(id, parts.values()))
        for name, head in self.heads.items():
            if id(head) not in inside:
                parts |= dict(head.named_modules(prefix=name))
        return parts

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """What enters the head [N, D] in float32, of a sequence its first token; in the mode the model is in."""
        return self.features_and_logits(inputs)[0]

    def features_and_logits(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Both of one pass."""
        with catch_inputs(self.head) as caught:
            logits = self.forward(inputs)
        features = caught[-1].float()
        return (features[:, 0] if features.ndim == 3 else features), logits

    def layer(self, name: str) -> nn.Module:
        """A frozen layer of the backbone, also where an adapter's layer is around it."""
        found = self.backbone.get_submodule(name)
        # peft keeps the layer that it wraps under this name.
        inner = getattr(found, "base_layer", found)
        assert isinstance(inner, nn.Module)
        return inner

    def weight(self, layer: str) -> Tensor:
        """The weight [out, in] of a layer, a view: what is written into it is written into the layer.

        Raises:
            InputError: it is quantised, and so cannot be written.
        """
        module = self.layer(layer)
        if is_quantized(module):
            raise InputError(f"model.quantization: {layer} is kept in few bits, which hold no change of its weight.")
        return orient(module, module.get_parameter("weight").detach())

    def values(self, layer: str) -> Tensor:
        """The weight [out, in] of a layer to read, dequantised."""
        return read_weight(self.layer(layer))

    def shape(self, layer: str) -> tuple[int, int]:
        """(outputs, inputs) of a layer."""
        module: Any = self.layer(layer)
        if is_quantized(module):
            return module.out_features, module.in_features
        rows, columns = self.weight(layer).shape
        return rows, columns

    def make_dense(self, dtype: torch.dtype | None = None) -> None:
        """Put plain layers in the place of quantised ones, all of it in this dtype, or the one that it has."""
        make_dense(self.backbone)
        for module in self.modules if dtype is not None else ():
            module.to(dtype)

    def to(self, device: torch.device) -> None:
        """Move all modules to a device in place."""
        for module in self.modules:
            module.to(device)


@contextmanager
def catch_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """What enters a module in the passes that are made meanwhile, oldest first."""
    caught: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        yield caught
    finally:
        hook.remove()


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix product: `nn.Linear`, or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or _stores_transposed(module)


def read_weight(layer: nn.Module) -> Tensor:
    """The weight [out, in] of a layer to read, dequantised."""
    return dequantize(layer) if is_quantized(layer) else orient(layer, layer.get_parameter("weight").detach())


def orient(layer: nn.Module, value: Tensor) -> Tensor:
    """A linear layer's weight, or what has its shape, as [out, in]; turning it twice gives it back."""
    return value.T if _stores_transposed(layer) else value


def _stores_transposed(module: nn.Module) -> bool:
    """transformers' Conv1D stores [in, out]."""
    return type(module).__name__ == "Conv1D"
