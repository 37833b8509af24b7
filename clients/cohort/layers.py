"""Linear layers that apply each client's own factors to its own samples, over one frozen base.

    y = W x + s B_k A_k x      for the samples x of client k; W x is one product over the whole batch

A pass has G groups of equally many samples: clients where all present bring equally many, otherwise single samples,
each with its client's factors. With single samples the gradient of a group's factors is a per-sample gradient.

The layers keep their modules and weights: while `replaced` is active only their `forward` is another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fedpeft.adapters.adapted import Adapted
from fedpeft.errors import InputError

# The second is the output projection of torch's attention, and computes like the first.
LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


@dataclass
class Pass:
    """What the layers work with in one pass over the model.

    Attributes:
        rows: of the batch, those of one sample one after another; samples are sorted by group.
        groups: G.
        values: by parameter name, [G, ...] or, where all groups have the same, [...].
    """

    rows: int = 0
    groups: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """A layer with parameters of clients.

    Attributes:
        factors: parameter names of the weights that are multiplied one after another: A, B; A, R, B; a head's weight.
        bias: parameter name of a head's bias.
    """

    name: str
    module: Any
    factors: list[str]
    bias: str | None = None

    def forward(self, now: Pass, x: Tensor) -> Tensor:
        """Outputs [rows, ..., out] for inputs [rows, ..., in], each group's with its own weights.

        Raises:
            InputError: the input has other rows than the batch.
        """
        if x.shape[0] != now.rows:
            raise InputError(
                f"run.engine=cohort: {self.name} gets {x.shape[0]} rows for the {now.rows} of the batch, so those of "
                "one client cannot be told apart."
            )
        weights = [now.values[key] for key in self.factors]
        if self.bias is not None or len(weights) == 1:
            y = x.reshape(now.groups, -1, x.shape[-1]) @ weights[0].mT
            if self.bias is not None:
                y = y + now.values[self.bias].unsqueeze(-2)
            return y.reshape(*x.shape[:-1], -1)
        y = self.module.base_layer(x)
        # As peft does: factors may be more precise than the base.
        x = self.module.lora_dropout["default"](x.to(weights[0].dtype)).reshape(now.groups, -1, x.shape[-1])
        for weight in weights[:-1]:
            x = x @ weight.mT
        grouped = y.reshape(now.groups, -1, y.shape[-1]).to(x.dtype)
        total = _add_product(grouped, x, weights[-1], self.module.scaling["default"])
        return total.reshape(y.shape).to(y.dtype)


def _add_product(y: Tensor, x: Tensor, weight: Tensor, scale: float) -> Tensor:
    """y + s x W^T for y [G, rows, out], x [G, rows, r] and W [G, out, r] or [out, r]."""
    if weight.ndim == 3:
        return y.baddbmm(x, weight.mT, alpha=scale)
    return y.flatten(0, 1).addmm(x.flatten(0, 1), weight.mT, alpha=scale).view_as(y)


def layers_of(model: Adapted) -> list[Layer]:
    """The layers that own the parameters of adapter and head.

    Raises:
        InputError: one is owned by a module that is neither a plain LoRA layer nor a linear layer of the head.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    keys = {id(parameter): key for key, parameter in model.parameters.items()}
    found: list[Layer] = []
    inside: set[int] = set()
    for root in model.base.modules:
        for name, module in root.named_modules():
            if isinstance(module, BaseTunerLayer):
                parts = (
                    [module.lora_A["default"], *module.lora_B["default"].modules()] if _is_plain_lora(module) else []
                )
                chain = [part for part in parts if not isinstance(part, nn.Sequential)]
                factors = [keys.get(id(getattr(part, "weight", None)), "") for part in chain]
                # Exact types: a subclass may compute something else.
                if (
                    not chain
                    or not all(factors)
                    or any(type(part) not in LINEAR or part.bias is not None for part in chain)
                ):
                    raise InputError(f"{name} is not a plain LoRA layer")
                found.append(Layer(name, module, factors))
                inside |= {id(part) for part in chain}
            elif id(module) not in inside:
                own = {path: keys.get(id(value)) for path, value in module.named_parameters(recurse=False)}
                if any(own.values()):
                    if type(module) not in LINEAR or not all(own.values()):
                        raise InputError(f"{name} ({type(module).__name__}) is not linear")
                    found.append(Layer(name, module, [own["weight"] or ""], own.get("bias")))
    left = set(model.parameters) - {key for layer in found for key in (*layer.factors, layer.bias)}
    if left:
        raise InputError(f"{min(left)} belongs to no module")
    return found


def _is_plain_lora(module: Any) -> bool:
    """Whether a layer of peft computes W x + s B A x: LoRA, active, not merged, neither DoRA nor another variant."""
    from peft.tuners.lora import LoraLayer

    return (
        isinstance(module, LoraLayer)
        and module.active_adapters == ["default"]
        and "default" in module.lora_A
        and not (module.disable_adapters or module.merged or module.lora_variant)
    )


@contextmanager
def with_factors(found: list[Layer], now: Pass) -> Iterator[None]:
    """Let these layers take their factors from `now`."""
    before = [vars(layer.module).get("forward") for layer in found]
    try:
        for layer in found:
            # torch calls `self.forward`: an entry of the instance comes before the class, and nothing else is touched.
            vars(layer.module)["forward"] = lambda x, *_, layer=layer, **__: layer.forward(now, x)
        yield
    finally:
        for layer, old in zip(found, before, strict=True):
            if old is None:
                vars(layer.module).pop("forward", None)
            else:
                vars(layer.module)["forward"] = old
