"""Per-sample gradients of an adapter (and head) over a frozen base, exactly, in one backward pass.

A weight W that is used as y = x W^T gets from sample n   sum_t g_nt x_nt^T   with g the gradient of the summed losses
at y; a bias gets sum_t g_nt. So where all trained parameters belong to linear layers (LoRA, LoRA-SB, heads) only the
inputs and the gradients at the outputs of those layers are needed, and no weight gradient is computed by autograd.
The products are stored: for LoRA they are small, r (in + out) a sample, and the usual trick of norms without products
(ghost clipping) costs more than it saves here.

Where other modules own parameters too, each with a rule for groups of samples (`adapters.grouped`: norms, scales,
DoRA, our own layers), every sample gets its own copy of the parameters in one pass. Where one has no rule, every sample
has a backward pass of its own: slow, and exact for whatever autograd can differentiate. (torch.func's vmap is quicker,
but cannot run transformers' text models, whose masks depend on data, nor many adapters of peft.) Models that mix
samples are beyond all three; `verify` finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedpeft.adapters.grouped import Layer, Pass, copy_for_groups, find_layers, with_parameters
from fedpeft.errors import InputError

Inputs = dict[str, Tensor]
Loss = Callable[[Inputs, Tensor], Tensor]  # inputs, labels -> losses [N], each of its own sample only


def per_sample_gradients(
    modules: Iterable[nn.Module],
    parameters: dict[str, nn.Parameter],
    loss: Loss,
    inputs: Inputs,
    labels: Tensor,
    rows: int = 1,
) -> tuple[Tensor, Tensor]:
    """Gradients [N, P], in the order of `parameters` (those that train), and losses [N].

    Args:
        modules: the roots that hold the parameters.
        rows: of each sample in what the modules get, one after another.

    Raises:
        InputError: a layer does not keep the samples in its first dimension.
    """
    layers = linear_owners(modules, parameters)
    if layers is not None:
        return _gradients_analytic(layers, parameters, loss, inputs, labels, rows)
    grouped = ruled_owners(modules, parameters)
    if grouped is not None:
        return _gradients_of_copies(grouped, parameters, loss, inputs, labels, rows)
    alone = [_gradient_alone(parameters, loss, inputs, labels, index) for index in range(len(labels))]
    return torch.stack([gradient for gradient, _ in alone]), torch.stack([value for _, value in alone])


def linear_owners(modules: Iterable[nn.Module], parameters: dict[str, nn.Parameter]) -> dict[nn.Linear, str] | None:
    """The linear layers that own the parameters, with their names; None if another module owns one, or one of peft's
    tuners but LoRA, which need not call the linear layers that they keep their weights in.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    wanted = {id(parameter) for parameter in parameters.values()}
    layers: dict[nn.Linear, str] = {}
    for root in modules:
        for name, module in root.named_modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
                return None
            if any(id(parameter) in wanted for parameter in module.parameters(recurse=False)):
                # Exact types: a subclass may use its weight otherwise, and x g^T would be wrong.
                if type(module) not in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
                    return None
                layers.setdefault(module, name)
    return layers


def ruled_owners(modules: Iterable[nn.Module], parameters: dict[str, nn.Parameter]) -> list[Layer] | None:
    """The layers that own the parameters, if all of them have a rule for groups of samples."""
    try:
        return find_layers(modules, parameters)
    except InputError:
        return None


def _gradients_of_copies(
    layers: list[Layer],
    parameters: dict[str, nn.Parameter],
    loss: Loss,
    inputs: Inputs,
    labels: Tensor,
    rows: int,
) -> tuple[Tensor, Tensor]:
    count = len(labels)
    leaves = copy_for_groups(parameters, count)
    with with_parameters(layers, Pass(count * rows, count, leaves)):
        losses = loss(inputs, labels)
        slopes = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
    parts = [
        (torch.zeros_like(leaf) if slope is None else slope).reshape(count, -1)
        for leaf, slope in zip(leaves.values(), slopes, strict=True)
    ]
    return torch.cat([part.to(parts[0].dtype) for part in parts], dim=1), losses.detach()


def _gradients_analytic(
    layers: dict[nn.Linear, str],
    parameters: dict[str, nn.Parameter],
    loss: Loss,
    inputs: Inputs,
    labels: Tensor,
    rows: int,
) -> tuple[Tensor, Tensor]:
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        calls.append((module, (args[0] if args else kwargs["input"]).detach(), output))

    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        losses = loss(inputs, labels)
    finally:
        for handle in handles:
            handle.remove()
    count = len(losses)
    calls = [call for call in calls if call[2].requires_grad]
    # At the outputs only: no gradient of a weight is computed, which would be summed over the samples.
    slopes = torch.autograd.grad(losses.sum(), [output for _, _, output in calls], allow_unused=True)
    found: dict[int, Tensor] = {}
    for (layer, x, _), g in zip(calls, slopes, strict=True):
        if g is None:
            continue
        if x.shape[0] != count * rows:
            raise InputError(
                f"privacy.unit=sample: {layers[layer]} gets {x.shape[0]} rows for {count} samples, so their gradients "
                "cannot be told apart. Leave it out of adapter.target_modules."
            )
        x, g = x.reshape(count, -1, x.shape[-1]), g.reshape(count, -1, g.shape[-1])
        for parameter, part in ((layer.weight, lambda x=x, g=g: g.mT @ x), (layer.bias, lambda g=g: g.sum(1))):
            if parameter is not None and parameter.requires_grad:
                value = part().reshape(count, -1)
                found[id(parameter)] = found[id(parameter)] + value if id(parameter) in found else value
    parts = [found.get(id(parameter), losses.new_zeros(count, parameter.numel())) for parameter in parameters.values()]
    return torch.cat([part.to(parts[0].dtype) for part in parts], dim=1), losses.detach()


class _NoDropout(TorchFunctionMode):
    """Dropout is random, and so differs between a batch and its samples; everything else of training stays."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (nn.functional.dropout, torch.dropout):
            return args[0] if args else kwargs["input"]
        if func is nn.functional.scaled_dot_product_attention:
            args, kwargs["dropout_p"] = args[:4], 0.0
        return func(*args, **kwargs)


def verify(
    modules: Iterable[nn.Module],
    parameters: dict[str, nn.Parameter],
    loss: Loss,
    inputs: Inputs,
    labels: Tensor,
    rows: int = 1,
) -> None:
    """Compare per-sample gradients of a batch with autograd on each sample alone, at random parameter values.

    Catches parameters that are used behind the layers' backs, and models or losses that mix samples. Modules are taken
    in the mode that they are in; give them in training mode.

    Raises:
        InputError: they differ; names the parameter.
    """
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in parameters.values():  # a LoRA at its start (B = 0) has no gradient in A to compare
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
        with _NoDropout():
            fast, _ = per_sample_gradients(modules, parameters, loss, inputs, labels, rows)
            slow = torch.stack(
                [_gradient_alone(parameters, loss, inputs, labels, index)[0] for index in range(len(labels))]
            )
    finally:
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(before[key])
    # A base in half precision rounds so much more.
    rounding = 1e-3 if _all_float32(modules) else 0.05
    scale = slow.abs().amax(dim=1, keepdim=True).clamp(min=1e-6)
    close = (fast - slow).abs() <= rounding * scale
    wrong = (~close & torch.isfinite(slow)).any(dim=0)  # what is not a number alone cannot be compared
    if bool(wrong.any()):
        owners = torch.repeat_interleave(torch.tensor([value.numel() for value in parameters.values()]))
        key = list(parameters)[int(owners[int(wrong.cpu().nonzero()[0])])]
        raise InputError(
            f"privacy.unit=sample: the per-sample gradient of {key} differs from autograd on each sample alone: the "
            "model mixes samples or uses the parameter outside of its layer. Take another adapter or model."
        )


def _all_float32(modules: Iterable[nn.Module]) -> bool:
    # Whole numbers are a quantised base's, which multiplies in the dtype of the rest.
    kinds = {value.dtype for root in modules for value in root.parameters() if value.is_floating_point()}
    return kinds <= {torch.float32, torch.float64}


def _gradient_alone(
    parameters: dict[str, nn.Parameter], loss: Loss, inputs: Inputs, labels: Tensor, index: int
) -> tuple[Tensor, Tensor]:
    """Gradient [P] and loss of one sample."""
    chosen = slice(index, index + 1)
    total = loss({name: value[chosen] for name, value in inputs.items()}, labels[chosen]).sum()
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    flat = torch.cat(
        [
            (torch.zeros_like(parameter) if gradient is None else gradient).flatten()
            for parameter, gradient in zip(parameters.values(), gradients, strict=True)
        ]
    )
    return flat.detach(), total.detach()
