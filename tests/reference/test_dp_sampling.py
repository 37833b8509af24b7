"""Who joins a step: every record alone, by its own coin. Steps on nobody are steps, and the divisor is public.

The measure is a function of the sampler under test: it must pass on the code, and fail on samplers of other kinds.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedpeft.clients.train import Private, private_steps, train
from fedpeft.data.encode import Encoded
from fedpeft.privacy.noise import OperatingSystem, Seeded
from support import small_models as small
from support.dp_steps import BATCH, CLIP, CPU, ROLES, SGD, Fixed, blanks, plan, shipped
from support.per_sample import records, single


def sampling_faults(sample, count=40, rate=0.1, steps=20_000):
    """What is wrong with a sampler that claims to take each record with `rate`, independent of everything."""
    inside = np.zeros((steps, count))
    for step in range(steps):
        drawn = np.asarray(sample(count, rate))
        if len(np.unique(drawn)) != len(drawn):
            return ["a record twice"]
        inside[step, drawn] = 1
    faults, sizes = [], inside.sum(1)
    if np.abs(inside.mean(0) - rate).max() > 5 * np.sqrt(rate * (1 - rate) / steps):
        faults.append("inclusion frequency")
    mean, variance = count * rate, count * rate * (1 - rate)
    if abs(sizes.mean() - mean) > 5 * np.sqrt(variance / steps):
        faults.append("mean size")
    if abs(sizes.var() / variance - 1) > 5 * np.sqrt(2.2 / steps):  # of a sample variance, near the normal one
        faults.append("variance of the size")
    empty = (1 - rate) ** count
    if abs((sizes == 0).mean() - empty) > 5 * np.sqrt(empty / steps):
        faults.append("empty batches")
    z = (inside - rate) / np.sqrt(rate * (1 - rate))
    between = z.T @ z / steps - np.eye(count)
    if np.abs(between - np.diag(np.diag(between))).max() > 6.5 / np.sqrt(steps):
        faults.append("records are not independent")
    if np.abs(z[1:].T @ z[:-1] / steps).max() > 6.5 / np.sqrt(steps):
        faults.append("steps are not independent")
    return faults


@pytest.mark.parametrize("source", [OperatingSystem(), Seeded(0, "sampling")], ids=["os", "seeded"])
def test_batches_are_poisson_samples(source):
    assert sampling_faults(lambda count, rate: plan(rate=rate).sample(count, source)) == []


def passes(rng):
    """Shuffled passes in batches of fixed size."""
    state = []

    def sample(count, rate):
        if not state:
            state.extend(rng.permutation(count).reshape(-1, int(count * rate)))
        return state.pop()

    return sample


def without_empty(rng):
    def sample(count, rate):
        while not len(drawn := np.flatnonzero(rng.random(count) < rate)):
            pass
        return drawn

    return sample


def neighbours(rng):
    """Records join in pairs."""
    return lambda count, rate: np.flatnonzero(np.repeat(rng.random(count // 2) < rate, 2))


def sticky(rng):
    """Each batch is kept for two steps."""
    state = []

    def sample(count, rate):
        if not state:
            state.extend([np.flatnonzero(rng.random(count) < rate)] * 2)
        return state.pop()

    return sample


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (passes, "variance of the size"),
        (lambda rng: lambda n, q: rng.choice(n, int(n * q), replace=False), "empty"),
        (lambda rng: lambda n, q: rng.choice(n, int(n * q)), "twice"),
        (without_empty, "empty"),
        (neighbours, "records are not"),
        (sticky, "steps are not"),
        (lambda rng: lambda n, q: np.flatnonzero(rng.random(n) < 1.05 * q), "inclusion"),
    ],
)
def test_the_measure_of_sampling_sees(make, named):
    assert any(named in fault for fault in sampling_faults(make(np.random.default_rng(0))))


def test_training_draws_as_the_sampler_does_and_counts_empty_draws(line):
    """What the losses tell: sizes of the batches of one round of many steps, empty ones among them."""
    steps, count, rate = 2000, 20, 0.1
    config = replace(SGD, local_steps=steps, batch_size=2)
    how = plan(rate=rate, sigma=1.0, steps=steps)
    sizes = np.array(
        [
            len(losses)
            for _, losses in private_steps(
                line.model, blanks(count), line.parameters, config, Private(how, Seeded(1)), CPU
            )
        ]
    )
    assert len(sizes) == steps
    assert abs(sizes.mean() - count * rate) < 5 * np.sqrt(count * rate * (1 - rate) / steps)
    assert abs(sizes.var() / (count * rate * (1 - rate)) - 1) < 5 * np.sqrt(2.2 / steps)
    assert abs((sizes == 0).mean() - 0.9**20) < 5 * np.sqrt(0.9**20 / steps)
    assert sizes.max() > 4  # more than one piece was ever needed


def test_steps_on_nobody_are_taken_and_move_everything(folder):
    adapted = small.adapted(folder("vit"), "vit")
    start = adapted.state()
    data = single(records("vit"))
    source = Fixed([np.ones(5)] * 3)
    steps, loss = train(
        adapted,
        data,
        ROLES,
        replace(SGD, local_steps=3),
        0,
        private=Private(plan(rate=0.4, sigma=1.5, steps=3), source),
    )
    assert steps == 3 and len(source.asked) == 3 and np.isnan(loss)
    moved = torch.cat([(start[key] - value).flatten() for key, value in adapted.state().tensors.items()])
    expected = SGD.lr * 1.5 * CLIP / BATCH * sum(source.asked)
    assert moved.norm() == pytest.approx(np.linalg.norm(expected), rel=1e-4)


def test_the_divisor_is_the_public_batch_not_the_drawn_one(line):
    data = Encoded({"pixel_values": torch.ones(6, 600)}, torch.zeros(6, dtype=torch.long))
    for drawn in (1, 3, 6):
        uniforms = np.where(np.arange(6) < drawn, 0.0, 1.0)
        norm = shipped(line, data, plan(rate=0.5), Fixed([uniforms])).norm()
        assert float(norm) == pytest.approx(drawn * CLIP / BATCH, rel=1e-4)
