"""Accountants turn the noise of Poisson-sampled Gaussian steps into epsilon, and epsilon into noise (dp-accounting).

One step takes each record with probability q, clips its gradient to C, adds N(0, (sigma C)^2) to the sum. `steps` are
all local steps of all rounds that a client joins. Sampling of clients is no factor of q: a server that sees who took
part gets no uncertainty from it.

    pld   privacy loss distributions on a grid, one for the calculator, the plan and the ledger alike: finer for more
          steps, so that it adds less than 1e-4 to epsilon, or 1e-3 of it where losses are large (little noise)
    prv   Opacus' numerical composition; an upper bound, 0.01 above pld
    rdp   Renyi orders; 5 to 45 % above pld in usual runs, 1.4 to 2.8 times it for noise below 0.5 or tiny rates

All three are upper bounds. Where distributions would take too long or gigabytes (noise below about 0.005, delta below
1e-11), pld answers with the smaller of rdp and the Gaussian mechanism without sampling, and prv refuses.

    >>> round(epsilon(sample_rate=1.0, noise_multiplier=1.0, steps=1, delta=1e-5), 4)
    4.3772
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable
from typing import Any

from fedpeft import extras
from fedpeft.errors import InputError
from fedpeft.registry import unknown

ACCOUNTANTS = ("pld", "prv", "rdp")
Release = tuple[float, float, int]
ASSUMPTIONS = (
    "what is protected: one record of one client (sample level), neighbours by adding or removing it",
    "Poisson sampling: every local step takes each record with the sample rate, independent of everything",
    "noise: Gaussian with standard deviation noise multiplier x clipping norm, on the sum of clipped gradients",
    "steps: all local steps of all rounds that the client joins; client sampling does not lower the sample rate",
    "the adversary sees every update, as the server does; each client has an epsilon of its own, report the largest",
)
BOUNDED = (
    "epsilon is a closed upper bound here (the smaller of rdp and no sampling): distributions of losses this "
    "large, or at a delta this small, are beyond double precision or memory"
)
TOLERANCE = 1e-4
EXCESS = 5e-5  # of epsilon over all steps together: a step on a grid of width h adds about h^2
WIDEST, POINTS, WHOLE = 4e-4, 40_000, 1 << 21  # of the grid; of one step's losses and of all steps' together on it
TAIL = 1e-11  # below, double precision cannot tell a composed delta from zero
LEAST_NOISE, MOST_NOISE, MOST_STEPS = 1e-4, 1e9, 10**12


def epsilon(sample_rate: float, noise_multiplier: float, steps: int, delta: float, accountant: str = "pld") -> float:
    """Epsilon of `steps` steps at this delta.

    Raises:
        InputError: a value out of its range, or an unknown accountant.
    """
    return compose_epsilon(((sample_rate, noise_multiplier, steps),), delta, accountant)


def compose_epsilon(releases: tuple[Release, ...], delta: float, accountant: str = "pld") -> float:
    """Epsilon of several kinds of steps together, at this delta; 0 for none.

    Args:
        releases: (sample rate, noise multiplier, steps) of each kind.

    Raises:
        InputError: a value out of its range, an unknown accountant, or numbers that prv cannot resolve.
    """
    _require_known(accountant)
    _check_values(delta=delta)
    for release in dict.fromkeys(releases):  # once each kind, as a client's rounds are alike
        require_release(*release)
    return _compose_releases(_merge_releases(releases), delta, accountant)


def is_bounded(releases: tuple[Release, ...], delta: float, accountant: str) -> bool:
    """Whether pld answers with the closed bound: its distributions would take too long or too much memory."""
    return accountant == "pld" and _choose_grid(_merge_releases(releases), delta) is None


def _merge_releases(releases: tuple[Release, ...]) -> tuple[Release, ...]:
    merged: dict[tuple[float, float], int] = {}
    for sample_rate, sigma, steps in releases:
        merged[sample_rate, sigma] = merged.get((sample_rate, sigma), 0) + steps
    # Sorted: the same releases in any order are composed to the same bits, and found in the cache.
    return tuple((*kind, steps) for kind, steps in sorted(merged.items()))


@functools.lru_cache(maxsize=4096)
def _compose_releases(releases: tuple[Release, ...], delta: float, accountant: str) -> float:
    if not releases:
        return 0.0
    if accountant == "prv":
        return _epsilon_prv(releases, delta)
    if accountant == "rdp":
        return _epsilon_rdp(releases, delta)
    grid = _choose_grid(releases, delta)
    if grid is None:
        return _closed_bound(releases, delta)
    whole: Any = None
    for sample_rate, sigma, steps in releases:
        part = _loss_of_step(sample_rate, sigma, grid).self_compose(steps)
        whole = part if whole is None else whole.compose(part)
    return float(whole.get_epsilon_for_delta(delta))


@functools.lru_cache(maxsize=16)
def _loss_of_step(sample_rate: float, sigma: float, grid: float) -> Any:
    """The privacy loss distribution of one step, whose losses are rounded up to a grid."""
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=sigma, sampling_prob=sample_rate, value_discretization_interval=grid
    )


def _choose_grid(releases: tuple[Release, ...], delta: float) -> float | None:
    """The width of the grid of these steps, whoever asks; None where any that is fine enough has too many points."""
    if delta < TAIL or not releases:
        return None if releases else WIDEST
    ranges = [_largest_loss(sample_rate, sigma) for sample_rate, sigma, _ in releases]
    wanted = min(WIDEST, math.sqrt(EXCESS / sum(steps for *_, steps in releases)), min(ranges) / 200)
    whole = min(
        sum(largest * steps for largest, (*_, steps) in zip(ranges, releases, strict=True)),
        2 * _epsilon_rdp(releases, TAIL),
    )
    grid = max(wanted, max(ranges) / POINTS, whole / WHOLE)
    return grid if grid <= max(WIDEST, min(0.5, 1e-2 * min(ranges))) else None


def _largest_loss(sample_rate: float, sigma: float) -> float:
    """The largest loss of a step whose noise stays within ten standard deviations."""
    loss = (1 + 20 * sigma) / (2 * sigma**2)
    return float(loss + math.log(sample_rate + (1 - sample_rate) * math.exp(-loss)))


def _epsilon_rdp(releases: tuple[Release, ...], delta: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent, rdp

    # It warns of every fractional order whose series does not converge, and leaves it out: a looser bound, still valid.
    logging.getLogger("absl").setLevel(logging.ERROR)
    total = rdp.RdpAccountant()
    for sample_rate, sigma, steps in releases:
        total.compose(SelfComposedDpEvent(PoissonSampledDpEvent(sample_rate, GaussianDpEvent(sigma)), steps))
    return float(total.get_epsilon(delta))


def _closed_bound(releases: tuple[Release, ...], delta: float) -> float:
    """Never below: the smaller of the Renyi bound and of the Gaussian mechanism with every record in every step."""
    mu = math.sqrt(sum(steps / sigma**2 for _, sigma, steps in releases))
    tail = math.sqrt(-2 * math.log(delta))  # P(N(0, 1) > t) <= exp(-t^2 / 2), so that the loss exceeds this with delta
    return min(_epsilon_rdp(releases, delta), mu**2 / 2 + mu * tail)


def _epsilon_prv(releases: tuple[Release, ...], delta: float) -> float:
    import warnings

    mesh = 0.01 / math.sqrt(sum(steps for *_, steps in releases) * math.log(12e3 / delta) / 2)
    points = 2 * (_epsilon_rdp(releases, delta / 1e3) + 3) / mesh
    if not points <= 2 * WHOLE:
        raise _refuse_unresolvable(f"it would need {points:.0e} points")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's deprecations, and of orders that only bound the search
        extras.require("opacus", "The accountant prv")
        from opacus.accountants import PRVAccountant

        accountant = PRVAccountant()
        accountant.history = [(sigma, sample_rate, steps) for sample_rate, sigma, steps in releases]
        try:
            found = float(accountant.get_epsilon(delta))
        except (ValueError, RuntimeError, ArithmeticError, IndexError, MemoryError) as error:
            raise _refuse_unresolvable(str(error)) from error
    if not math.isfinite(found):
        raise _refuse_unresolvable(f"its answer is {found}")
    return max(0.0, found)


def _refuse_unresolvable(reason: str) -> InputError:
    return InputError(f"--accountant: prv cannot resolve these numbers: {reason.rstrip('.')}. Take pld or rdp.")


@functools.lru_cache(maxsize=1024)
def noise_multiplier(
    sample_rate: float,
    epsilon: float,
    steps: int,
    delta: float,
    accountant: str = "pld",
    beside: tuple[Release, ...] = (),
) -> float:
    """The smallest noise multiplier (1e-4, or 1e-4 of it, too large at most) at which the steps cost at most `epsilon`.

    Args:
        beside: other releases that `epsilon` has to pay for too.

    Raises:
        InputError: a value out of its range, an unknown accountant, or `beside` leaves nothing for the steps.
    """
    _check_values(sample_rate=sample_rate, delta=delta, steps=steps, epsilon=epsilon)
    _require_known(accountant)
    if (others := compose_epsilon(beside, delta, accountant)) >= epsilon:
        raise InputError(
            f"--epsilon: {epsilon:g} leaves nothing for the steps: what is released beside them costs {others:.4g}."
        )

    def cost(sigma: float, name: str = accountant) -> float:
        return compose_epsilon((*beside, (sample_rate, sigma, steps)), delta, name)

    # The Renyi bound is quick and never below: it gives the slower accountants a narrow bracket.
    low, high = LEAST_NOISE, 1.0
    if compose_epsilon(beside, delta, "rdp") < epsilon:
        while cost(high, "rdp") > epsilon:
            low, high = high, 4 * high
            if high > MOST_NOISE:
                raise InputError(f"--epsilon: {epsilon:g} needs a noise multiplier above {MOST_NOISE:g}.")
        high = _find_smallest(lambda sigma: cost(sigma, "rdp"), epsilon, low, high)
    if accountant == "rdp":
        return high
    low, most = max(LEAST_NOISE, 0.5 * high), 1e3 * high
    while cost(high) > epsilon:  # their own errors, additive in epsilon, count where epsilon is small
        low, high = high, 1.5 * high
        if high > most:
            raise InputError(f"--epsilon: {epsilon:g} is below what the accountant {accountant} can resolve; take rdp.")
    while low > LEAST_NOISE and cost(low) <= epsilon:  # Renyi may take most of epsilon for what is beside
        low, high = max(LEAST_NOISE, 0.5 * low), low
    return _find_smallest(cost, epsilon, low, high)


def _find_smallest(cost: Callable[[float], float], epsilon: float, low: float, high: float) -> float:
    """The smallest sigma in [low, high], up to the tolerance above it, with cost(sigma) <= epsilon; cost falls.

    Both logarithms are nearly on a line, so a few steps along it, and back by the tolerance, do for most.
    """
    above, below = cost(low), cost(high)
    if above <= epsilon:
        return low
    for turn in itertools.count():
        room = TOLERANCE * max(1.0, high)
        if high - low <= room:
            return high
        guess = (low + high) / 2
        if turn % 4 < 3 and 0 < below < above < math.inf and math.log(above / below) > 1e-6:
            share = math.log(above / epsilon) / math.log(above / below)
            guess = low * (high / low) ** share + (0.45 * room if turn % 2 == 0 else -0.45 * room)
            guess = min(max(guess, low + 0.4 * room), high - 0.4 * room)
        found = cost(guess)
        if found <= epsilon:
            high, below = guess, found
        else:
            low, above = guess, found
    raise AssertionError


def require_release(sample_rate: float, noise_multiplier: float, steps: int) -> None:
    """Raise InputError unless these are numbers that a release can have."""
    _check_values(sample_rate=sample_rate, noise_multiplier=noise_multiplier, steps=steps)


def _require_known(accountant: str) -> None:
    if accountant not in ACCOUNTANTS:
        raise InputError(unknown("--accountant", accountant, ACCOUNTANTS))


ALLOWED = {  # above, up to, in words
    "sample_rate": (0.0, 1.0, "in (0, 1]"),
    "delta": (0.0, math.nextafter(1.0, 0.0), "in (0, 1)"),
    "steps": (0.5, MOST_STEPS, f"a whole number from 1 to {MOST_STEPS:g}"),
    "noise_multiplier": (LEAST_NOISE * (1 - 1e-9), MOST_NOISE, f"from {LEAST_NOISE:g} to {MOST_NOISE:g}"),
    "epsilon": (0.0, 1e15, "above 0"),
}


def _check_values(**values: float) -> None:
    for name, value in values.items():
        low, high, allowed = ALLOWED[name]
        if not low < value <= high or (name == "steps" and value != int(value)):  # not a number is in no range
            raise InputError(f"--{name.replace('_', '-')}: {value} is not allowed; it must be {allowed}.")
