"""The checks of the audit by themselves, on noise and samples made by hand, and the canaries on what is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedpeft.privacy import audit as checks
from fedpeft.privacy.ledger import Budget
from fedpeft.privacy.noise import Seeded
from fedpeft.privacy.plan import Plan


def a_plan(sigma: float, rate: float, steps: int) -> Plan:
    return Plan(rate, 64.0, 1.0, sigma, steps, Budget(4.377, 1e-5))


# The checks by themselves ---------------------------------------------------------------------------------------------


def test_noise_that_is_not_normal_or_the_same_in_every_tensor():
    plan, generator = a_plan(1.0, 1.0, 1), torch.Generator().manual_seed(0)

    def steps(draw):
        return [[draw() for _ in range(30)] for _ in range(2)]

    def uniform():
        return {name: math.sqrt(12) * (torch.rand(1000, generator=generator) - 0.5) for name in "ab"}

    def same():
        value = torch.randn(1000, generator=generator)
        return {"a": value, "b": value}

    def good():
        return {name: torch.randn(1000, generator=generator) for name in "ab"}

    for draw, names in ((uniform, {"noise shape"}), (same, {"noise is fresh"}), (good, set())):
        assert {check.name for check in checks.noise(steps(draw), replace(plan, expected_batch=1.0))
                if not check.passed} - {"noise of each tensor"} == names


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
def test_poisson_samples_pass_at_any_rate(rate):
    draw = np.random.default_rng(0)
    draws = [np.flatnonzero(draw.random(200) < rate) for _ in range(400)]
    assert all(check.passed for check in checks.sampler(draws, 200, rate))


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
    monkeypatch.setattr(Plan, "noised_mean", lambda plan, total, source: real(
        replace(plan, noise_multiplier=plan.noise_multiplier / plan.expected_batch), total, source))
    assert checks.one_run(a_plan(1.0, 1.0, 1), Seeded(1)) > 4.377


def test_the_bound_is_the_exact_binomial_one_without_delta():
    """All of r guesses right has chance p^r: refuted at 5 % for p < 0.05^(1 / r)."""
    p = 0.05 ** (1 / 50)
    assert checks.lower_bound(100, 50, 50, 0.0) == pytest.approx(math.log(p / (1 - p)), abs=1e-6)
    assert checks.lower_bound(100, 50, 25, 0.0) == 0
    bounds = [checks.lower_bound(2000, 400, right, 1e-5) for right in range(220, 401, 20)]
    assert bounds == sorted(bounds) and bounds[-1] == pytest.approx(4.84, abs=0.01)
    assert checks.lower_bound(2000, 400, 400, 1e-3) < bounds[-1]
