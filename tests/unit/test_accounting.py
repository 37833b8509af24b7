"""Known answers of the accountants, and the calculator's way back from epsilon to noise."""

from __future__ import annotations

import math

import pytest
from dp_accounting import get_epsilon_gaussian

from fedpeft.errors import InputError
from fedpeft.privacy.accounting import epsilon, noise_multiplier

# sample rate, noise multiplier, steps, delta, PLD, RDP: published in the project's privacy notes, made by dp-accounting
# 0.6.0 on other machines; the RDP column differs from Opacus where fractional orders decide.
KNOWN = [
    (0.01, 1.0, 1000, 1e-5, 1.82824, 2.10137),
    (0.01, 1.0, 10000, 1e-5, 6.18774, 6.71276),
    (0.01, 2.0, 1000, 1e-5, 0.62205, 0.68619),
    (0.02, 0.7, 2500, 1e-5, 14.53277, 16.05481),
    (0.05, 1.0, 400, 1e-5, 6.69997, 7.42548),
    (0.1, 2.0, 400, 1e-5, 4.90289, 5.33601),
    (1.0, 1.0, 1, 1e-5, 4.37718, 4.72851),
    (1.0, 5.0, 50, 1e-5, 6.57297, 7.07739),
    (256 / 60000, 1.1, 14062, 1e-5, 2.38169, 2.59656),
    (0.02, 1.0, 40, 1e-5, 1.07434, 1.55212),
]


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "pld", "rdp"), KNOWN)
def test_known_answers(rate, noise, steps, delta, pld, rdp):
    assert epsilon(rate, noise, steps, delta) == pytest.approx(pld, abs=1e-4)
    assert epsilon(rate, noise, steps, delta, "rdp") == pytest.approx(rdp, abs=1e-4)


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (5.0, 50), (3.0, 4)])
def test_without_sampling_it_is_the_exact_gaussian_mechanism(noise, steps):
    exact = get_epsilon_gaussian(noise / math.sqrt(steps), 1e-5)
    assert epsilon(1.0, noise, steps, 1e-5) == pytest.approx(exact, abs=2e-4)


@pytest.mark.parametrize(("rate", "target", "steps", "delta", "pld", "rdp"), [
    (0.016, 3.0, 200, 1e-4, 0.7067, 0.7684),
    (0.008, 1.0, 400, 1e-5, 0.9800, 1.1365),
])
def test_the_noise_for_a_target(rate, target, steps, delta, pld, rdp):
    found = noise_multiplier(rate, target, steps, delta)
    assert found == pytest.approx(pld, abs=3e-4)
    assert target - 1e-2 < epsilon(rate, found, steps, delta) <= target
    assert noise_multiplier(rate, target, steps, delta, "rdp") == pytest.approx(rdp, abs=3e-4)


def test_a_federation_costs_all_its_rounds():
    one, fifty = epsilon(0.016, 1.0, 4, 1e-5), epsilon(0.016, 1.0, 200, 1e-5)
    assert one == pytest.approx(0.494, abs=1e-3)
    assert fifty == pytest.approx(1.476, abs=1e-3)  # neither one round's nor fifty times it


@pytest.mark.parametrize(("change", "named"), [
    ({"sample_rate": 0.0}, "--sample-rate"), ({"sample_rate": 1.5}, "--sample-rate"), ({"delta": 1.0}, "--delta"),
    ({"steps": 0}, "--steps"), ({"noise_multiplier": -1.0}, "--noise-multiplier"),
    ({"noise_multiplier": math.nan}, "--noise-multiplier"), ({"accountant": "prw"}, "--accountant"),
])
def test_what_makes_no_sense_is_refused(change, named):
    values = {"sample_rate": 0.01, "noise_multiplier": 1.0, "steps": 10, "delta": 1e-5, "accountant": "pld"} | change
    with pytest.raises(InputError, match=named):
        epsilon(**values)
