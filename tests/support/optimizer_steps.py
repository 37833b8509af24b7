"""Steps of clients' optimizers on drawn gradients, and parts of their rules in float64."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from fedpeft import registry
from fedpeft.clients.optimizers.base import Layout, make_optimizer, settle
from fedpeft.config import ClientConfig

OUT, IN, R, SCALE = 7, 5, 3, 2.0
LAYOUT = Layout(
    {
        "q/A": torch.Size([R, IN]),
        "q/B": torch.Size([OUT, R]),
        "head/weight": torch.Size([2, 4]),
        "head/bias": torch.Size([2]),
    },
    {"q": SCALE},
)
RATE, DECAY = 0.05, 0.1


def drawn(seed):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in LAYOUT.shapes.items()}


def config_of(name, client=None, **options):
    return ClientConfig(
        **{"optimizer": name, "optimizer_options": options, "lr": RATE, "weight_decay": DECAY, **(client or {})}
    )


def layout_of(name):
    """LAYOUT, or for one that needs an A that stays, what it then trains and A as drawn."""
    if not registry.load("optimizers", name).reads_fixed_A:
        return LAYOUT
    shapes = {key: shape for key, shape in LAYOUT.shapes.items() if not key.endswith("/A")}
    return replace(LAYOUT, shapes=shapes, fixed={"q/A": drawn(0)["q/A"]})


def parameters_of(name, values):
    """Those of the values that an optimizer trains."""
    return {key: nn.Parameter(values[key].clone()) for key in layout_of(name).shapes}


def after(name, start, gradients, client=None, **options):
    """Values that are sent after a step for each of the gradients; `client` are further keys of its section."""
    weights = parameters_of(name, start)
    optimizer = make_optimizer(list(weights.values()), config_of(name, client, **options), layout_of(name))
    take_steps(optimizer, weights, gradients)
    settle(optimizer)
    return {**start, **{key: weight.detach() for key, weight in weights.items()}}


def take_steps(optimizer, weights, gradients):
    for gradient in gradients:
        for key, weight in weights.items():
            weight.grad = gradient[key].clone()
        optimizer.step()


def adam(value, gradients, rate):
    mean = square = torch.zeros_like(value)
    for t, g in enumerate(gradients, start=1):
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
        value = value * (1 - rate * DECAY) - rate * (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)) ** 0.5 + 1e-8)
    return value


def cast(tensors, kind):
    return {key: value.to(kind) for key, value in tensors.items()}


def near(found, expected, limit=1e-12):
    assert float((found - expected).abs().max()) < limit


def newton_schulz(matrix):
    """Five iterations on the singular values, which are all that they move."""
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    S = S / S.square().sum().sqrt()
    for _ in range(5):
        S = 3.4445 * S - 4.775 * S**3 + 2.0315 * S**5
    return (U * S) @ Vt


def loss_of_factors(tensors, target):
    """Half the squared distance of s B A from the target, and of the head from drawn values."""
    ends = [(SCALE * tensors["q/B"] @ tensors["q/A"], target)]
    ends += [(tensors[key], value) for key, value in drawn(8).items() if key.startswith("head/")]
    return sum((value - end).square().sum() for value, end in ends) / 2
