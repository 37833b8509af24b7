"""AdamP, SGDP, schedule-free AdamW and CLASSP against their rules, entry by entry in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fedpeft.config import load
from fedpeft.errors import InputError
from support.optimizer_steps import DECAY, RATE, adam, after, drawn, near

START = drawn(0)


def at_right_angles(seed, whole):
    """Gradients with <g, w> = 0, of each row or of the whole matrix; vectors are as drawn."""
    gradients = drawn(seed)
    for key, value in START.items():
        if value.ndim == 2:
            W = value.reshape(1, -1) if whole else value
            G = gradients[key].reshape(W.shape)
            gradients[key] = (G - W * ((W * G).sum(1) / (W * W).sum(1))[:, None]).view_as(value)
    return gradients


def dot(one, other):
    return sum(float(a) * float(b) for a, b in zip(one.flatten(), other.flatten(), strict=True))


def project(value, gradient, direction, delta, eps):
    """What is left of the direction, and the share of weight decay; which vectors were looked at first is the rule."""
    if value.ndim < 2:
        return direction, 1.0
    for shape in (value.shape, (1, value.numel())):
        W, G, P = (each.reshape(shape) for each in (value, gradient, direction))
        cosines = [abs(dot(g, w)) / math.sqrt(dot(g, g) * dot(w, w)) for g, w in zip(G, W, strict=True)]
        if max(cosines) < delta / math.sqrt(shape[1]):
            units = torch.stack([w / (math.sqrt(dot(w, w)) + eps) for w in W])
            along = torch.tensor([dot(u, p) for u, p in zip(units, P, strict=True)], dtype=W.dtype)
            return (P - units * along[:, None]).view_as(value), 0.3
    return direction, 1.0


GRADIENTS = {
    "rows": [at_right_angles(seed, False) for seed in (1, 2)],
    "whole": [at_right_angles(seed, True) for seed in (1, 2)],
    "neither": [drawn(seed) for seed in (1, 2)],
}
OPTIONS = {"decay_ratio": 0.3, "delta": 0.02}


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("case", GRADIENTS)
def test_adamp_is_its_rule(case, nesterov):
    found, projected = after("adamp", START, GRADIENTS[case], nesterov=nesterov, **OPTIONS), 0
    for key, value in START.items():
        mean = square = torch.zeros_like(value)
        for t, g in enumerate((one[key] for one in GRADIENTS[case]), 1):
            mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
            ahead = 0.9 * mean + 0.1 * g if nesterov else mean
            direction = ahead / (1 - 0.9**t) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
            direction, ratio = project(value, g, direction, 0.02, 1e-8)
            projected += ratio != 1.0
            value = (1 - RATE * DECAY * ratio) * value - RATE * direction
        near(found[key], value)
    assert bool(projected) == (case != "neither")


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("case", GRADIENTS)
def test_sgdp_is_its_rule(case, momentum, nesterov):
    found = after("sgdp", START, GRADIENTS[case], {"momentum": momentum}, nesterov=nesterov, **OPTIONS)
    projected = 0
    for key, value in START.items():
        total = torch.zeros_like(value)
        for g in (one[key] for one in GRADIENTS[case]):
            total = momentum * total + g
            direction = g + momentum * total if nesterov else total
            direction, ratio = project(value, g, direction, 0.02, 1e-8)
            projected += ratio != 1.0
            value = (1 - RATE * DECAY * ratio / (1 - momentum)) * value - RATE * direction
        near(found[key], value)
    assert bool(projected) == (case != "neither")


def test_adamp_without_projections_is_adamw():
    found = after("adamp", START, GRADIENTS["rows"], delta=0.0)
    for key, value in START.items():
        near(found[key], adam(value, [one[key] for one in GRADIENTS["rows"]], RATE))


@pytest.mark.parametrize("steps", [1, 5])
def test_schedule_free_is_three_points(steps):
    """x, y and z as the paper has them; what is sent is x, and the gradients are those that the test says."""
    gradients = [drawn(seed) for seed in range(1, steps + 1)]
    found = after("schedule_free", START, gradients, beta1=0.8, beta2=0.99)
    for key, value in START.items():
        x, z, square, weights = value, value, torch.zeros_like(value), 0.0
        for t, g in enumerate((one[key] for one in gradients), 1):
            y = 0.8 * x + 0.2 * z
            square = 0.99 * square + 0.01 * g * g
            rate = RATE * math.sqrt(1 - 0.99**t)
            z = z - rate * (g / (square.sqrt() + 1e-8) + DECAY * y)
            weights += rate**2
            x = (1 - rate**2 / weights) * x + rate**2 / weights * z
        near(found[key], x)


@pytest.mark.parametrize(
    ("client", "words"),
    [
        ({"schedule": "cosine"}, ("client.schedule=cosine", "client.schedule=constant")),
        ({"warmup_rounds": 1, "schedule_over": "round"}, ("client.warmup_rounds=1", "client.schedule_over=rounds")),
        ({"keep_optimizer": True}, ("client.keep_optimizer=true", "schedule_free")),
        ({"momentum": 0.9}, ("client.momentum=0.9", "client.momentum=0")),
        ({"optimizer_options": {"beta1": 0.0}}, ("optimizer_options.beta1", "> 0")),
    ],
)
def test_schedule_free_refuses_what_it_replaces(client, words):
    with pytest.raises(InputError) as error:
        load({"client": {"optimizer": "schedule_free", **client}})
    assert all(word in str(error.value) for word in words), error.value
    assert load({"client": {"optimizer": "schedule_free", "warmup_rounds": 1.0}}).client.warmup_rounds == 1


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_classp_moves_only_what_has_a_large_gradient(power):
    gradients = [drawn(seed) for seed in (1, 2, 3)]
    found = after("classp", START, gradients, {"weight_decay": 0.0}, threshold=0.25, power=power)
    for key, value in START.items():
        expected, still = value.clone().flatten(), 0
        for place in range(value.numel()):
            moved = 0.0
            for g in (float(one[key].flatten()[place]) for one in gradients):
                if g * g > 0.25:
                    moved += abs(g) ** power
                    expected[place] -= RATE * g / (moved + 1e-5) ** (1 / power)
            still += moved == 0
        near(found[key].flatten(), expected)
        assert int((found[key] == value).sum()) == still
    assert float(after("classp", START, [])["q/A"].sum()) == float(START["q/A"].sum())


def test_sgdp_refuses_nesterov_without_momentum():
    with pytest.raises(InputError, match=r"nesterov=true.*client\.momentum=0"):
        load({"client": {"optimizer": "sgdp", "optimizer_options": {"nesterov": True}}})
