"""The deployed model as a test-time method sees it: logits, features, named tensors; never written to.

A method's own tensors are laid over the model while one forward pass runs and taken off again, so the backbone is the
same bits before and after every call, and any number of methods (or clients) share one backbone.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))
    >>> model = deploy(net, head="2")
    >>> model.select("norm_affine"), model.select(["0.*"])
    (['1.weight', '1.bias'], ['0.weight', '0.bias'])
    >>> logits, features = model(torch.ones(4, 2), {"1.weight": torch.zeros(3), "1.bias": torch.zeros(3)})
    >>> tuple(logits.shape), features.abs().max().item(), net[1].weight.min().item()
    ((4, 2), 0.0, 1.0)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fedpeft import registry
from fedpeft.adapters.adapted import Adapted
from fedpeft.errors import InputError
from fedpeft.models.base import Base, catch_inputs

Batch = Tensor | dict[str, Tensor]
Tensors = Mapping[str, Tensor]
# (name of the batch norm, module, its input) -> mean and variance [C] to normalise with.
Statistics = Callable[[str, Any, Tensor], tuple[Tensor, Tensor]]
Hooks = Mapping[str, Callable[[Tensor], Tensor]]  # module name -> what its output goes through

BATCH_NORM = nn.modules.batchnorm._BatchNorm
NORMS = ("LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm", "BatchNorm")
SETS = ("norm_affine", "lora", "head", "all")


class Deployed:
    """A frozen base: logits [N, K], the features [N, D] that enter its last linear layer, its tensors by name.

    Args:
        forward: a batch -> logits.

    Attributes:
        slots: parameter name -> the places (module, attribute) that hold it; tied parameters have one name.
        norms: batch norms by name.
        head: the last linear layer, None where it was not declared (methods that need features refuse then).
        output: of a causal language model, the module that gives the scores of every token [N, T, V]; else None.
    """

    def __init__(self, base: Base, forward: Callable[[Batch], Tensor], output: str | None = None) -> None:
        self.base, self.forward, self.output = base, forward, output
        self.head = base.head_layers[-1] if base.head_layers else None
        self.modules = base.named_modules
        self.slots: dict[str, list[tuple[nn.Module, str]]] = {}
        self._names: dict[int, str] = {}
        for prefix, part in self.modules.items():
            for attribute, value in part._parameters.items():
                if value is not None:
                    name = self._names.setdefault(id(value), f"{prefix}.{attribute}" if prefix else attribute)
                    self.slots.setdefault(name, []).append((part, attribute))
        self.norms: dict[str, Any] = {name: part for name, part in self.modules.items() if isinstance(part, BATCH_NORM)}

    def __call__(
        self,
        batch: Batch,
        overlay: Tensors | None = None,
        statistics: Statistics | None = None,
        hooks: Hooks | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits and features of a batch, in evaluation mode, with `overlay` in the place of the model's own tensors.

        The batch is moved to where the model is.

        Args:
            statistics: what batch norms normalise with; None is their running statistics.
            hooks: module name -> what its output goes through.
        """
        with ExitStack() as stack:
            stack.enter_context(self._in_evaluation())
            stack.enter_context(self._with_overlay(overlay or {}))
            if statistics is not None:
                stack.enter_context(self._with_statistics(statistics))
            for name, change in (hooks or {}).items():
                stack.callback(self.modules[name].register_forward_hook(_change_output(change)).remove)
            caught = stack.enter_context(catch_inputs(self.head)) if self.head is not None else []
            # Entropies of a base in bfloat16 would have three digits.
            logits = self.forward(self.moved(batch)).float()
        return logits, (caught[-1].float() if caught else None)

    @property
    def device(self) -> torch.device:
        """The device of the first tensor; the model lies on one device only."""
        return self.tensor(next(iter(self.slots))).device

    def moved(self, batch: Batch) -> Batch:
        """The batch on the model's device."""
        if isinstance(batch, Tensor):
            return batch.to(self.device)
        return {name: value.to(self.device) for name, value in batch.items()}

    def tensors(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Copies of the model's own tensors."""
        return {name: self.tensor(name).detach().clone() for name in names}

    def tensor(self, name: str) -> Tensor:
        """The model's own tensor of this name, no copy."""
        module, attribute = self.slots[name][0]
        value: Tensor = getattr(module, attribute)
        return value

    def head_parameters(self, overlay: Tensors | None = None) -> tuple[Tensor, Tensor]:
        """Weight [K, D] and bias [K] of the last layer (zeros where it has none).

        Raises:
            InputError: the head was not declared.
        """
        head = self.require_head()
        found = {
            attribute: (overlay or {}).get(name, self.tensor(name))
            for name, places in self.slots.items()
            for part, attribute in places
            if part is head
        }
        weight = found["weight"].float()
        return weight, found["bias"].float() if "bias" in found else weight.new_zeros(len(weight))

    def require_head(self) -> nn.Linear:
        """The last linear layer.

        Raises:
            InputError: the head was not declared.
        """
        if self.head is None:
            raise InputError(
                "head: this method needs the features that enter the last linear layer; declare that "
                "layer, deploy(model, head='name')."
            )
        return self.head

    def select(self, which: str | Sequence[str]) -> list[str]:
        """Parameter names of an adaptable set, or of a list of name patterns (`*` matches anything).

        Raises:
            InputError: no such set, or the model has no tensor in it.
        """
        patterns = not isinstance(which, str) and all(isinstance(pattern, str) for pattern in _to_list(which))
        if which not in SETS and not patterns:
            raise InputError(registry.unknown("adapt", which, [*SETS, "or a list of name patterns"]))
        if which == "all":
            names = list(self.slots)
        elif which == "norm_affine":
            names = [
                name
                for name, places in self.slots.items()
                if any(norm in type(places[0][0]).__name__ for norm in NORMS)
            ]
        elif which == "lora":
            # With a dot in front, which a module at the root does not have.
            names = [name for name in self.slots if ".lora_" in f".{name}"]
        elif which == "head":
            inside = {
                id(part)
                for name, part in self.modules.items()
                if any(name == head or name.startswith(f"{head}.") for head in self.base.heads)
            }
            names = [name for name, places in self.slots.items() if id(places[0][0]) in inside]
        else:
            names = [name for name in self.slots if any(fnmatchcase(name, pattern) for pattern in which)]
        if not names:
            raise InputError(
                f"adapt: {which!r} matches none of the model's {len(self.slots)} tensors "
                f"({', '.join(list(self.slots)[:4])}, ...)."
            )
        return names

    @contextmanager
    def _in_evaluation(self) -> Iterator[None]:
        # Part by part, as some may be in evaluation mode already, and are to stay so afterwards.
        training = [part for part in self.modules.values() if part.training]
        for part in training:
            part.training = False
        try:
            yield
        finally:
            for part in training:
                part.training = True

    @contextmanager
    def _with_overlay(self, overlay: Tensors) -> Iterator[None]:
        before = {name: self.tensor(name) for name in overlay}
        try:
            for name, value in overlay.items():
                # A module takes nothing but a Parameter in the place of one.
                leaf = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
                self._put(name, leaf)
            yield
        finally:
            for name, value in before.items():
                self._put(name, value)

    def _put(self, name: str, value: Tensor) -> None:
        for module, attribute in self.slots[name]:
            setattr(module, attribute, value)

    @contextmanager
    def _with_statistics(self, statistics: Statistics) -> Iterator[None]:
        try:
            for name, part in self.norms.items():
                # torch calls `self.forward`: an entry of the instance comes before the class, and its weights stay
                # where they are.
                part.__dict__["forward"] = _make_normaliser(name, part, statistics)
            yield
        finally:
            for part in self.norms.values():
                part.__dict__.pop("forward", None)


def deploy(model: Any, head: str | None = None, forward: Callable[[Batch], Tensor] | None = None) -> Deployed:
    """Any model as a `Deployed`: a plain torch module, a `Base`, an `Adapted`, or one that is deployed already.

    A causal language model classifies by the token that comes next: logits [N, V] after each text's last token.

    Args:
        head: name of the last linear layer of a plain module (its input is the features).
        forward: how a plain module takes a batch; as the only argument, or as keywords when the batch is a dict.

    Raises:
        InputError: `head` is no linear layer of the model.
    """
    if isinstance(model, Deployed):
        return model
    if isinstance(model, Adapted | Base):
        base, logits = (model.base, model.logits) if isinstance(model, Adapted) else (model, model.forward)
        answer = _by_name(lambda batch: base.objective.answer(logits(batch), batch))
        return Deployed(base, answer, None if base.objective.classes else _output_module(base))
    parts = dict(model.named_modules())
    if head is not None and not isinstance(parts.get(head), nn.Linear):
        raise InputError(
            registry.unknown("head", head, [name for name, part in parts.items() if isinstance(part, nn.Linear)])
        )
    forward = forward or (lambda batch: _call_model(model, batch))
    return Deployed(Base(model, forward, {head: parts[head]} if head else {}, None, "", ""), forward)


def _output_module(base: Base) -> str:
    """Name of the module that scores the tokens."""
    backbone: Any = base.backbone
    layer = backbone.get_output_embeddings()
    name: str = next(name for name, part in backbone.named_modules() if part is layer)
    return name


def batch_statistics(alpha: float) -> Statistics | None:
    """(1 - alpha) x running + alpha x this batch's statistics, which is what remains where there are no running ones.

    A batch that has one value a channel has no variance: the running statistics are used.
    """
    if alpha == 0:
        return None

    def statistics(name: str, module: Any, values: Tensor) -> tuple[Tensor, Tensor]:
        if module.running_mean is None:
            return of_batch(values)
        if values.numel() == values.shape[1]:
            return module.running_mean, module.running_var
        mean, variance = of_batch(values)
        return torch.lerp(module.running_mean, mean, alpha), torch.lerp(module.running_var, variance, alpha)

    return statistics


def of_batch(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] over all axes but the second."""
    axes = [axis for axis in range(values.ndim) if axis != 1]
    variance, mean = torch.var_mean(values, axes, correction=0)
    return mean, variance


def batch_size(batch: Batch) -> int:
    """Rows of a batch, of its first input where it has several."""
    return len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))


def take_rows(batch: Batch, rows: Tensor) -> Batch:
    """The rows with these numbers (or where a mask is true)."""
    return batch[rows] if isinstance(batch, Tensor) else {name: value[rows] for name, value in batch.items()}


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Batches of equal shapes, one after another."""
    if isinstance(batches[0], Tensor):
        return torch.cat([batch for batch in batches if isinstance(batch, Tensor)])
    return {name: torch.cat([batch[name] for batch in batches if isinstance(batch, dict)]) for name in batches[0]}


def finite_rows(batch: Batch) -> Tensor:
    """Which rows [N] have no NaN and no infinity; whole numbers always have none."""
    values = [batch] if isinstance(batch, Tensor) else list(batch.values())
    good = torch.ones(batch_size(batch), dtype=torch.bool, device=values[0].device)
    for value in values:
        if value.is_floating_point():
            good &= value.flatten(1).isfinite().all(1)
    return good


def _to_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _call_model(model: nn.Module, batch: Batch) -> Tensor:
    out = model(**batch) if isinstance(batch, dict) else model(batch)
    logits: Tensor = getattr(out, "logits", out)
    return logits


def _by_name(forward: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[Batch], Tensor]:
    """A forward that takes inputs by name only."""

    def call(batch: Batch) -> Tensor:
        if isinstance(batch, Tensor):
            raise InputError("batch: this model takes its inputs by name, for example {'pixel_values': images}.")
        return forward(batch)

    return call


def _change_output(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A forward hook; a block that returns a tuple has its hidden states first."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return hook


def _make_normaliser(name: str, module: Any, statistics: Statistics) -> Callable[[Tensor], Tensor]:
    def forward(values: Tensor) -> Tensor:
        mean, variance = statistics(name, module, values)
        shape = (1, -1, *([1] * (values.ndim - 2)))
        scale = (variance + module.eps).rsqrt()
        if module.weight is not None:
            scale = scale * module.weight
        shifted: Tensor = (values - mean.reshape(shape)) * scale.reshape(shape)
        return shifted if module.bias is None else shifted + module.bias.reshape(shape)

    return forward
