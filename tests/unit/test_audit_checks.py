"""The checks of the audit by themselves, on noise and samples made by hand, and the canaries on what is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedpeft.privacy import audit as checks
from fedpeft.privacy import audit_noise, second, tails
from fedpeft.privacy.ledger import Budget
from fedpeft.privacy.noise import Seeded
from fedpeft.privacy.plan import Plan


def a_plan(sigma: float, rate: float, steps: int) -> Plan:
    return Plan(rate, 64.0, 1.0, sigma, steps, Budget(4.377, 1e-5))


# The checks by themselves ---------------------------------------------------------------------------------------------


def noise_of(draw) -> set[str]:
    """Names of the failing checks of noise [2 runs, 2 clients, 2 rounds, 6 steps, 400 values] that `draw` gives."""
    values = torch.stack([draw() for _ in range(48)]).view(2, 2, 2, 6, 400)
    sizes = {"a": 100, "b": 300}
    return {
        check.name
        for check in audit_noise.check_noise([audit_noise.NoiseBlock("alone", True, values)], sizes)
        if not check.passed
    }


def test_noise_that_is_not_normal_or_the_same_in_every_tensor():
    generator = torch.Generator().manual_seed(0)

    def good():
        return torch.randn(400, generator=generator)

    def uniform():
        return math.sqrt(12) * (torch.rand(400, generator=generator) - 0.5)

    def same():
        value = good()
        return torch.cat([value[:300], value[:100]])

    assert noise_of(good) == set()
    assert "noise shape" in noise_of(uniform) and "noise size" not in noise_of(uniform)
    assert "nothing in common" in noise_of(same)


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
def test_poisson_samples_pass_at_any_rate(rate):
    draw = np.random.default_rng(0)
    counts = [(draw.random((4, 5, 10, count)) < rate).astype(float) for count in (200, 150)]
    draws = [checks.Draws("alone", name, some, rate) for name, some in zip("ab", counts, strict=True)]
    assert [check for check in checks.sampler(draws) if not check.passed] == []


def test_few_empty_batches():
    sizes = np.random.default_rng(0).binomial(4, 0.25, size=300)
    assert checks.empty(sizes, 4, 0.25).passed
    assert not checks.empty(np.where(sizes == 0, 1, sizes), 4, 0.25).passed


# Standard errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trials", "chance"), [(40, 0.1), (1000, 0.5)])
def test_binomial_tails_are_exact(trials, chance):
    """Against sums of the probabilities, written out."""
    masses = [math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k) for k in range(trials + 1)]
    high = round(trials * chance + 5 * math.sqrt(trials * chance))
    found = tails.binomial_deviation(np.array([high, 0]), trials, chance)
    tail = 0.5 * math.erfc(found[0] / math.sqrt(2))
    assert tail == pytest.approx(math.fsum(masses[high:]), rel=1e-6)
    assert found[1] < 0 and not tails.binomial_deviation(np.array([round(trials * chance)]), trials, chance)[0]


def test_both_forms_of_chi_square_agree_where_they_meet():
    squares = torch.tensor([1500.0, 2000.0, 2600.0])
    assert torch.allclose(
        tails.chi_square(squares, tails.EXACT),
        tails.chi_square(squares * (1 + 1 / tails.EXACT), tails.EXACT + 1),
        atol=0.05,
    )


@pytest.mark.parametrize(
    ("rate", "sigma", "steps", "known"),
    [(0.02, 0.7, 2500, 14.53277), (0.1, 2.0, 400, 4.90289), (1.0, 5.0, 50, 6.57297), (0.02, 1.0, 40, 1.07434)],
)
def test_the_second_accountant_knows_the_published_numbers(rate, sigma, steps, known):
    assert second.epsilon(rate, sigma, steps, 1e-5) == pytest.approx(known, rel=1e-3)


def test_a_measure_that_is_not_a_number_fails():
    assert not checks.Check("x", math.nan, 0.0, 1.0, "").passed


# Canaries -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "known", "claimed"),
    [(1.0, 1.0, 1, 1.91, 4.377), (4.0, 1.0, 16, 2.16, 4.377), (1.0, 0.1, 50, 1.06, 5.148), (0.5, 1.0, 1, 3.91, 9.997)],
)
def test_canaries_measure_what_is_known(sigma, rate, steps, known, claimed):
    """Published with the better of two guess fractions; ours is one, fixed, so a little lower on average."""
    measured = checks.one_run(a_plan(sigma, rate, steps), Seeded(1))
    assert 0.65 * known < measured < 1.25 * known < claimed


def test_canaries_are_above_the_claim_when_the_noise_is_divided_twice(monkeypatch):
    real = Plan.noised_mean
    monkeypatch.setattr(
        Plan,
        "noised_mean",
        lambda plan, total, source: real(
            replace(plan, noise_multiplier=plan.noise_multiplier / plan.expected_batch), total, source
        ),
    )
    assert checks.one_run(a_plan(1.0, 1.0, 1), Seeded(1)) > 4.377


def test_the_bound_is_the_exact_binomial_one_without_delta():
    """All of r guesses right has chance p^r: refuted at 5 % for p < 0.05^(1 / r)."""
    p = 0.05 ** (1 / 50)
    assert checks.lower_bound(100, 50, 50, 0.0) == pytest.approx(math.log(p / (1 - p)), abs=1e-6)
    assert checks.lower_bound(100, 50, 25, 0.0) == 0
    bounds = [checks.lower_bound(2000, 400, right, 1e-5) for right in range(220, 401, 20)]
    assert bounds == sorted(bounds) and bounds[-1] == pytest.approx(4.84, abs=0.01)
    assert checks.lower_bound(2000, 400, 400, 1e-3) < bounds[-1]
