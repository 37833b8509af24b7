"""The noise of a step, N(0, (sigma C / b)^2) and fresh for every entry, and the sources that it is drawn from.

The measure is a function of the step under test: it must pass on the code, and fail on every step with wrong noise.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fedpeft.privacy.noise import Ahead, OperatingSystem, Seeded
from support.dp_steps import BATCH, CLIP, Fixed, blanks, plan, shipped


def noise_faults(step, at, source, steps=200, sigma=1.3):
    """What is wrong with the noise of steps whose records have no gradient: it is N(0, (sigma C / b)^2), fresh."""
    how = plan(rate=0.5, sigma=sigma, steps=steps)
    data, faults = blanks(), []
    drawn = torch.stack([step(at, data, how, source) for _ in range(steps)]).double()
    z = drawn / (sigma * CLIP / BATCH)
    count = z.numel()
    assert count >= 1e5
    if abs(float(z.std()) - 1) > 0.01:
        faults.append(f"standard deviation {float(z.std()):.4f}")
    if abs(float(z.square().sum()) - count) > 5 * np.sqrt(2 * count):  # chi-square with `count` degrees of freedom
        faults.append("chi-square")
    if abs(float(z.mean())) > 5 / np.sqrt(count):
        faults.append("mean")
    if (z.square().sum(0) - steps).abs().max() > 7 * np.sqrt(2 * steps):
        faults.append("a parameter with other noise")
    if (z.square().sum(1) - z.shape[1]).abs().max() > 6 * np.sqrt(2 * z.shape[1]):
        faults.append("a step with other noise")
    for one, two in ((z[1:], z[:-1]), (z[:, 1:], z[:, :-1]), (z[:, 600:1200], z[:, :600])):
        if abs(float((one * two).mean())) > 5 / np.sqrt(one.numel()):
            faults.append("correlated")
    return faults


@pytest.mark.parametrize("source", [OperatingSystem(), Seeded(0, "noise")], ids=["os", "seeded"])
def test_the_noise_of_a_step(source, line):
    assert noise_faults(shipped, line, source) == []


def mutant_noise(change):
    """A step whose noise is made wrong by `change(noise, plan, times)`."""
    times = iter(range(10**6))

    def step(at, data, plan, source):
        size = sum(at.sizes())
        noise = torch.from_numpy(source.normal(size))
        return change(plan.noise_multiplier * plan.clip * noise / plan.expected_batch, plan, next(times))

    return step


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda noise, plan, time: noise / plan.expected_batch, id="divided twice"),
        pytest.param(lambda noise, plan, time: noise / plan.clip, id="without C"),
        pytest.param(lambda noise, plan, time: noise * 1.02, id="2 percent more"),
        pytest.param(lambda noise, plan, time: noise * 0.98, id="2 percent less"),
        pytest.param(lambda noise, plan, time: noise * (time % 8 != 0), id="none on every eighth step"),
        pytest.param(lambda noise, plan, time: torch.cat([noise[:-3], 0 * noise[-3:]]), id="none on the bias"),
        pytest.param(
            lambda noise, plan, time: torch.cat([noise[:600], noise[:600], noise[1200:]]), id="one for two rows"
        ),
        pytest.param(lambda noise, plan, time: noise + 0.02, id="shifted"),
    ],
)
def test_the_measure_of_noise_sees(change, line):
    assert noise_faults(mutant_noise(lambda noise, plan, time: noise), line, Seeded(0, "mutant")) == []
    assert noise_faults(mutant_noise(change), line, Seeded(0, "mutant"))


def test_the_same_noise_in_every_step_is_seen(line):
    again = np.random.default_rng(0).standard_normal(sum(line.sizes()))
    faults = noise_faults(
        mutant_noise(
            lambda noise, plan, time: plan.noise_multiplier * plan.clip * torch.from_numpy(again) / plan.expected_batch
        ),
        line,
        Seeded(0),
    )
    assert faults


def test_noise_does_not_depend_on_who_was_drawn(line):
    """The same noise whether the sample was empty, one piece or many: it is added once to the sum."""
    for uniforms in (np.ones(20), np.zeros(20), np.linspace(0, 1, 20)):
        source = Fixed([uniforms])
        found = shipped(line, blanks(), plan(rate=0.5, sigma=2.0), source)
        expected = torch.from_numpy(2.0 * CLIP * source.asked[0] / BATCH).float()
        torch.testing.assert_close(found, expected)
        assert len(source.asked) == 1 and len(found) == sum(line.sizes())


# Sources --------------------------------------------------------------------------------------------------------------


def test_the_operating_systems_noise_is_normal():
    from scipy import stats

    z = OperatingSystem().normal(400_001)
    assert len(z) == 400_001 and z.dtype == np.float64 and np.isfinite(z).all()
    count = len(z)
    for power, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - expected) < 5 * np.sqrt(spread / count), power
    assert stats.kstest(z, "norm").pvalue > 1e-7
    assert abs((z[:200_000] * z[200_000:400_000]).mean()) < 5 / np.sqrt(200_000)  # the two halves of the transform
    assert abs(np.corrcoef(np.abs(z[:200_000]), np.abs(z[200_000:400_000]))[0, 1]) < 5 / np.sqrt(200_000)
    assert abs((z[1:] * z[:-1]).mean()) < 5 / np.sqrt(count)
    assert 3.9 < np.abs(z).max() < 7  # there are tails
    for size in (0, 1, 2, 3):
        assert len(OperatingSystem().normal(size)) == size


def test_the_operating_systems_uniforms():
    from scipy import stats

    u = OperatingSystem().uniform(200_000)
    assert u.min() >= 0 and u.max() < 1 and stats.kstest(u, "uniform").pvalue > 1e-7
    assert len(np.unique(u)) == len(u)  # 53 bits, not a byte's worth


def test_nothing_repeats_and_no_seed_reaches_the_operating_systems_noise():
    import random

    values = []
    for _ in range(3):
        np.random.seed(0)
        random.seed(0)
        torch.manual_seed(0)
        source = OperatingSystem()
        values += [source.normal(5000), source.normal(5000), source.uniform(5000)]
    everything = np.concatenate(values)
    assert len(np.unique(everything)) == len(everything)


def test_drawing_leaves_the_global_generators_alone():
    before = (np.random.get_state()[1].copy(), torch.get_rng_state())
    for source in (OperatingSystem(), Seeded(3, "a")):
        source.normal(10)
        source.uniform(10)
    assert (np.random.get_state()[1] == before[0]).all() and torch.equal(torch.get_rng_state(), before[1])


def test_a_seeded_source_is_its_path():
    def first(*path):
        return Seeded(*path).normal(4).tolist()

    paths = [
        (seed, "privacy", "round", number, "client", client)
        for seed in (0, 1)
        for number in (1, 2)
        for client in ("a", "b")
    ]
    assert [first(*path) for path in paths] == [first(*path) for path in paths]
    assert len({tuple(first(*path)) for path in paths}) == len(paths)


def test_noise_drawn_ahead_is_the_same_noise():
    plain, source = Seeded(0, "noise"), Seeded(0, "noise")
    with ThreadPoolExecutor(2) as threads:
        for _ in range(3):
            assert np.array_equal(plain.uniform(4), source.uniform(4))
            assert np.array_equal(Ahead(source, 1000, threads).normal(1000), plain.normal(1000))
        with pytest.raises(RuntimeError, match="1000 values were drawn ahead; asked for 999"):
            Ahead(source, 1000, threads).normal(999)
        with pytest.raises(OSError, match="no entropy"):
            Ahead(Empty(), 10, threads).normal(10)


class Empty(OperatingSystem):
    def normal(self, count):
        raise OSError("no entropy")
