"""Muon's kin (NorMuon, NAMO, NAMO-D, ROOT) against their equations, one entry and one step at a time in float64."""

from __future__ import annotations

import math

import pytest
import torch

from support.optimizer_steps import DECAY, RATE, adam, after, drawn, near, newton_schulz

MU = 0.95
START, GRADIENTS = drawn(0), [drawn(seed) for seed in (1, 2, 3, 4)]
LIMIT = 1e-9  # singular values one by one, and matrices by products


def momenta(key, nesterov=True):
    """Nesterov's form of the momentum at each step, and the gradient."""
    mean = torch.zeros_like(START[key])
    for gradient in (one[key] for one in GRADIENTS):
        mean = MU * mean + (1 - MU) * gradient
        yield (1 - MU) * gradient + MU * mean if nesterov else mean, gradient


def norm(values):
    return math.sqrt(sum(float(value) ** 2 for value in values.flatten()))


@pytest.mark.parametrize("key", ["q/A", "q/B"])
def test_normuon_is_its_rule(key):
    value = START[key].clone()
    rows, columns = value.shape
    square = [0.0] * rows
    for ahead, _ in momenta(key):
        even = newton_schulz(ahead)
        step = torch.zeros_like(even)
        for i in range(rows):
            square[i] = 0.9 * square[i] + 0.1 * norm(even[i]) ** 2 / columns
            step[i] = even[i] / (math.sqrt(square[i]) + 1e-10)
        step *= norm(even) / (norm(step) + 1e-10)
        value = (1 - RATE * DECAY) * value - RATE * math.sqrt(max(1, rows / columns)) * step
    near(after("normuon", START, GRADIENTS, row_decay=0.9)[key], value, LIMIT)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("key", ["q/A", "q/B"])
def test_namo_is_its_rule(key, nesterov):
    value, square = START[key].clone(), 0.0
    for t, (ahead, gradient) in enumerate(momenta(key, nesterov), 1):
        square = 0.98 * square + 0.02 * norm(gradient) ** 2
        rate = RATE * math.sqrt(1 - 0.98**t) / (1 - MU**t) * norm(ahead) / (math.sqrt(square) + 1e-8)
        step = min(0.2 * rate * math.sqrt(max(value.shape)), 1.0) * newton_schulz(ahead)
        value = (1 - DECAY * min(rate, 1.0)) * value - step
    near(after("namo", START, GRADIENTS, norm_decay=0.98, nesterov=nesterov)[key], value, LIMIT)


@pytest.mark.parametrize("clamp", [0.2, 0.9])
@pytest.mark.parametrize("key", ["q/A", "q/B"])
def test_namo_d_is_its_rule(key, clamp):
    value = START[key].clone()
    columns = value.shape[1]
    squares, clamped = [0.0] * columns, 0
    for t, (ahead, gradient) in enumerate(momenta(key), 1):
        ratios = []
        for j in range(columns):
            squares[j] = 0.99 * squares[j] + 0.01 * norm(gradient[:, j]) ** 2
            ratios.append(norm(ahead[:, j]) / (math.sqrt(squares[j]) + 1e-8))
        mean = sum(ratios) / columns
        even, base = newton_schulz(ahead), RATE * math.sqrt(1 - 0.99**t) / (1 - MU**t)
        for j, ratio in enumerate(ratios):
            held = min(max(ratio, clamp * mean), mean / clamp)
            clamped += held != ratio
            decay = DECAY * min(base * held, 1.0)
            step = min(0.2 * math.sqrt(max(value.shape)) * base * held, 1.0) * even[:, j]
            value[:, j] = (1 - decay) * value[:, j] - step
    assert bool(clamped) == (clamp == 0.9)
    near(after("namo_d", START, GRADIENTS, clamp=clamp)[key], value, LIMIT)


def test_namo_takes_no_step_longer_than_one():
    """Both caps, of the step and of the weight decay: singular values of the step are then Newton-Schulz's own."""
    start = {key: value.clone() for key, value in START.items()}
    found = after("namo", start, GRADIENTS[:1], {"lr": 1e6})
    ahead = next(iter(momenta("q/A")))[0]
    near(found["q/A"], (1 - DECAY) * START["q/A"] - newton_schulz(ahead), LIMIT)


@pytest.mark.parametrize("quantile", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("key", ["q/A", "q/B"])
def test_root_is_its_rule(key, quantile):
    """As published: the momentum is a sum, and what is above the threshold is taken off by soft thresholding."""
    value, total, cut = START[key].clone(), torch.zeros_like(START[key]), 0
    for gradient in (one[key] for one in GRADIENTS):
        total = MU * total + gradient
        ahead = gradient + MU * total
        ordered = sorted(ahead.abs().flatten().tolist())
        place = quantile * (len(ordered) - 1)
        low = math.floor(place)
        limit = ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
        outliers = ahead.sign() * (ahead.abs() - limit).clamp(min=0)
        cut += int((outliers != 0).sum())
        step = 0.2 * math.sqrt(max(value.shape)) * newton_schulz(ahead - outliers)
        value = (1 - RATE * DECAY) * value - RATE * step
    assert bool(cut) == (quantile < 1)
    near(after("root", START, GRADIENTS, quantile=quantile)[key], value, LIMIT)


@pytest.mark.parametrize("name", ["normuon", "namo", "namo_d", "root"])
def test_the_head_takes_adamws_steps_and_a_zero_gradient_moves_nothing(name):
    gradients = [{**one, "q/A": torch.zeros_like(one["q/A"])} for one in GRADIENTS]
    found = after(name, START, gradients, {"weight_decay": 0.0})
    assert torch.equal(found["q/A"], START["q/A"]) and not torch.equal(found["q/B"], START["q/B"])
    decayed = after(name, START, gradients)
    for key in ("head/weight", "head/bias"):
        near(decayed[key], adam(START[key], [one[key] for one in gradients], RATE))
