"""How far an average of adapters is from the average of what they do: measured, for whatever an adapter is."""

from __future__ import annotations

import math
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from fedpeft.adapters.adapted import Adapted
from fedpeft.state import AdapterState

CLIENTS, SCALE = 3, 0.3


@torch.no_grad()
def measure_average(model: Adapted, inputs: dict[str, Tensor], roles: tuple[str, ...], seed: int = 0) -> float:
    """Relative error of the averaged adapter's effect against the average of the effects.

        || f(mean theta_k) - mean f(theta_k) || / || mean f(theta_k) ||,   f(theta) = layer(x; theta) - layer(x)

    over all adapted layers, each with the inputs that it has in a pass over the bare model. theta_k is the start, moved
    at random by SCALE of each tensor's standard deviation (by SCALE where it is constant), as training on different
    records would. 0 is exact up to rounding; 1 is as far off as leaving the adapter out. It is about layers and one
    size of move, not about accuracy; where the start is off zero, so is f.

    Args:
        roles: of what trains.
    """
    model.base.backbone.eval()
    start, layers = model.state(), find_layers(model)
    model.write(start.without(("residual_A", "residual_B")))  # layer(x) is the bare model's
    calls = _record_calls(model, inputs, layers)
    moved = [move_randomly(start, roles, seed * CLIENTS + client) for client in range(CLIENTS)]
    mean = start.replace(
        {key: torch.stack([state[key] for state in moved]).mean(0) for key in start.select(roles).tensors}
    )
    bare = [layer.get_submodule("base_layer")(*args) for layer, args in calls]
    effects = []
    for state in (*moved, mean):
        model.write(state)
        effects.append([(layer(*args) - plain).double() for (layer, args), plain in zip(calls, bare, strict=True)])
    model.write(start)
    wanted = [torch.stack(each).mean(0) for each in zip(*effects[:-1], strict=True)]
    off = sum(float((got - want).square().sum()) for got, want in zip(effects[-1], wanted, strict=True))
    return math.sqrt(off / sum(float(want.square().sum()) for want in wanted))


def find_layers(model: Adapted) -> list[nn.Module]:
    """The adapted layers, in the order of the model."""
    return [
        module for module in model.base.backbone.modules() if isinstance(getattr(module, "base_layer", None), nn.Module)
    ]


def _record_calls(
    model: Adapted, inputs: dict[str, Tensor], layers: list[nn.Module]
) -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
    """Each layer with what it is given, in the order of calls."""
    calls: list[tuple[nn.Module, tuple[Tensor, ...]]] = []
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(lambda module, args: calls.append((module, args))).remove)
        model.logits(inputs)
    return calls


def move_randomly(start: AdapterState, roles: tuple[str, ...], seed: int) -> AdapterState:
    """The state with all of these roles moved by SCALE of each tensor's standard deviation, or by SCALE."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, value in start.select(roles).tensors.items():
        spread = float(value.std()) if value.numel() > 1 else 0.0
        step = SCALE * (spread if spread > 1e-6 else 1.0)
        tensors[key] = value + step * torch.randn(value.shape, generator=generator)
    return start.replace(tensors)
