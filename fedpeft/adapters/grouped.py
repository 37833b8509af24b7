"""Layers that apply the parameters of many at once, each to its own samples, over one frozen base.

    y_g = act(x_g; theta_g)      for the samples x_g of group g; what is the same for all is one product over the batch

A kind of layer says this in one rule, and from it have clients a common pass (`clients.cohort`) and records their own
gradients (`privacy.gradients`): a pass has G groups of equally many samples, each with its own copy of the trained
parameters. With a client for each group the gradient of a copy is that client's, with single samples it is a
per-sample gradient, and autograd takes both through the products of the rule.

Rules are of linear layers (below), of some of peft's tuners (`peft_rules`) and of our own layers (`OwnLayer.act`).
The layers keep their modules and weights: while `with_parameters` is active only their `forward` is another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedpeft.errors import InputError

# The second is the output projection of torch's attention, and computes like the first.
LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)

Values = Mapping[str, Tensor]
# module, x [G, n, in], the module's parameters by their path in it, [G, ...] or (of all groups) [...] -> y [G, n, out]
Act = Callable[[Any, Tensor, Values], Tensor]


@dataclass(frozen=True)
class Rule:
    """What a kind of layer computes.

    Attributes:
        reads: where in the module the parameters are that `act` takes, by the first part of their paths; empty is all.
    """

    act: Act
    reads: tuple[str, ...] = ()


class OwnLayer(nn.Module):
    """A layer of ours around a frozen one, `base_layer`: one formula, for one user and for many groups.

    Parameters of the adapter are the module's own. `act` takes them from `own` and nowhere else, last dimensions last:
    `x @ own["A"].mT` and `own["d"].unsqueeze(-2)` are right for x [..., n, in] with and without groups.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def act(self, x: Tensor, own: Values) -> Tensor:
        """Outputs [..., n, out] of inputs [..., n, in]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Outputs with the layer's own parameters."""
        rows = x if x.ndim > 1 else x[None]
        return self.act(rows, dict(self.named_parameters(recurse=False))).reshape(*x.shape[:-1], -1)


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
    """A layer with parameters of groups.

    Attributes:
        keys: parameter names by path in the module, of those that a pass may have values of.
        others: the module's further parameters, the same for all.
    """

    name: str
    module: nn.Module
    rule: Rule
    keys: dict[str, str]
    others: dict[str, Tensor]

    def forward(self, now: Pass, x: Tensor) -> Tensor:
        """Outputs [rows, ..., out] for inputs [rows, ..., in], each group's with its own parameters.

        Raises:
            InputError: the input has other rows than the batch.
        """
        if x.shape[0] != now.rows:
            raise InputError(
                f"{self.name} gets {x.shape[0]} rows for the {now.rows} of the batch, so those of one client, or one "
                "sample, cannot be told apart. Leave it out of adapter.target_modules."
            )
        own = {**self.others, **{path: now.values[key] for path, key in self.keys.items() if key in now.values}}
        y = self.rule.act(self.module, x.reshape(now.groups, -1, x.shape[-1]), own)
        return y.reshape(*x.shape[:-1], -1)


def find_layers(modules: Iterable[nn.Module], parameters: Mapping[str, Tensor]) -> list[Layer]:
    """The layers that own these parameters, each with its rule.

    Raises:
        InputError: one is owned by a module that has no rule, or is none of those that its rule takes.
    """
    from fedpeft.adapters.peft_rules import is_tuner

    keys = {id(parameter): key for key, parameter in parameters.items()}
    found: list[Layer] = []
    inside: set[int] = set()
    for root in modules:
        for name, module in root.named_modules():
            if id(module) in inside:
                continue
            whole = is_tuner(module) or isinstance(module, OwnLayer)
            held = dict(module.named_parameters(recurse=whole))
            owned = {path: keys[id(value)] for path, value in held.items() if id(value) in keys}
            if not owned:
                continue
            rule = find_rule(name, module)
            strange = [path for path in owned if rule.reads and path.partition(".")[0] not in rule.reads]
            if strange:
                raise InputError(f"{name} trains {strange[0]}, which its kind has no rule for")
            rest = {path: value for path, value in held.items() if not path.startswith("base_layer.")}
            found.append(Layer(name, module, rule, owned, {path: value.detach() for path, value in rest.items()}))
            if whole:
                inside |= {id(part) for part in module.modules()}
    left = set(parameters) - {key for layer in found for key in layer.keys.values()}
    if left:
        raise InputError(f"{min(left)} belongs to no module")
    return found


def find_rule(name: str, module: nn.Module) -> Rule:
    """The rule of a module.

    Raises:
        InputError: it has none; says what it is.
    """
    from fedpeft.adapters.peft_rules import find_tuner_rule, is_tuner

    if isinstance(module, OwnLayer):
        return Rule(type(module).act)
    if is_tuner(module):
        return find_tuner_rule(name, module)
    # Exact types: a subclass may compute something else.
    if type(module) in LINEAR:
        return Rule(_apply_linear)
    raise InputError(f"{name} ({type(module).__name__}) is not linear")


def _apply_linear(module: nn.Module, x: Tensor, own: Values) -> Tensor:
    y = x @ own["weight"].mT
    return y + own["bias"].unsqueeze(-2) if "bias" in own else y


def add_product(y: Tensor, x: Tensor, weight: Tensor, scale: float) -> Tensor:
    """y + s x W^T for y [G, n, out], x [G, n, r] and W [G, out, r] or [out, r]."""
    if weight.ndim == 3:
        return y.baddbmm(x, weight.mT, alpha=scale)
    return y.flatten(0, -2).addmm(x.flatten(0, -2), weight.mT, alpha=scale).view_as(y)


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y + s x A^T B^T for y [G, n, out], x [G, n, in], A [G, r, in] or [r, in] and B [G, out, r] or [out, r]."""
    if A.ndim == B.ndim == 3:
        product: Tensor = _LowRank.apply(y, x, A, B, scale)  # type: ignore[no-untyped-call]
        return product
    return add_product(y, x @ A.mT, B, scale)


class _LowRank(torch.autograd.Function):
    """Every product as one whose result has rows of many columns, [r, n] and not [n, r]: autograd takes those with r
    columns, and BLAS needs four times as long for them.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        inner = A @ x.mT
        ctx.save_for_backward(x, inner, A, B)
        ctx.scale = scale
        return y.baddbmm(inner.mT, B.mT, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, inner, A, B) = slopes, ctx.saved_tensors
        of_y, of_x, of_A, of_B, _ = ctx.needs_input_grad
        h = ctx.scale * (B.mT @ g.mT)
        return (
            g if of_y else None,
            h.mT @ A if of_x else None,
            h @ x if of_A else None,
            (ctx.scale * (inner @ g)).mT if of_B else None,
            None,
        )


@contextmanager
def with_parameters(found: list[Layer], now: Pass) -> Iterator[None]:
    """Let these layers take their parameters from `now`."""
    before = [vars(layer.module).get("forward") for layer in found]
    try:
        for layer in found:
            # torch calls `self.forward`: an entry of the instance comes before the class, and nothing else is touched.
            vars(layer.module)["forward"] = lambda x, *_, layer=layer, **__: layer.forward(now, x)
        yield
    finally:
        _put_back([layer.module for layer in found], before)


@contextmanager
def without_adapter(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let every adapted layer compute as the frozen one in it, in evaluation mode, also inside `with_parameters`."""
    every = [module for root in modules for module in root.modules()]
    adapted = [module for module in every if isinstance(getattr(module, "base_layer", None), nn.Module)]
    before = [vars(module).get("forward") for module in adapted]
    training = [module for module in every if module.training]
    try:
        for module in training:
            module.training = False
        for module in adapted:
            vars(module)["forward"] = lambda *args, inner=module.base_layer, **options: inner(*args, **options)
        yield
    finally:
        _put_back(adapted, before)
        for module in training:
            module.training = True


def _put_back(modules: Iterable[nn.Module], before: Iterable[Any]) -> None:
    """Give modules the `forward` that their instances had, or none of their own."""
    for module, old in zip(modules, before, strict=True):
        if old is None:
            vars(module).pop("forward", None)
        else:
            vars(module)["forward"] = old


def copy_for_groups(parameters: Mapping[str, Tensor], groups: int) -> dict[str, Tensor]:
    """Leaves [G, ...] of the same values, by name: what each group's gradient is taken in."""
    return {key: value.detach().expand(groups, *value.shape).requires_grad_() for key, value in parameters.items()}
