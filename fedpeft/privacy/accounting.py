"""What Poisson-sampled Gaussian steps cost: epsilon from the noise, and the noise from epsilon, by dp-accounting.

One step takes each record with probability q, clips its gradient to C, adds N(0, (sigma C)^2) to the sum. `steps` are
all local steps of all rounds that a client joins. Sampling of clients is no factor of q: a server that sees who took
part gets no uncertainty from it.

    pld   privacy loss distributions on a grid of 1e-4; equals the exact Gaussian mechanism at q = 1 to 5 decimals
    prv   Opacus' numerical composition; an upper bound, 0.01 above pld
    rdp   Renyi orders; 7 to 19 % above pld, more for few steps at a small q

    >>> round(epsilon(sample_rate=1.0, noise_multiplier=1.0, steps=1, delta=1e-5), 4)
    4.3772
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

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
TOLERANCE = 1e-4
GRID, QUICK_GRID = 1e-4, 1e-3  # the quick one is up to 1e-4 above in epsilon and five to ten times as fast


def epsilon(sample_rate: float, noise_multiplier: float, steps: int, delta: float, accountant: str = "pld") -> float:
    """Epsilon of `steps` steps at this delta.

    Raises:
        InputError: a value out of its range, or an unknown accountant.
    """
    return composed(((sample_rate, noise_multiplier, steps),), delta, accountant, GRID)


def composed(releases: tuple[Release, ...], delta: float, accountant: str = "pld", grid: float = QUICK_GRID) -> float:
    """Epsilon of several kinds of steps together, at this delta; 0 for none.

    Args:
        releases: (sample rate, noise multiplier, steps) of each kind.
        grid: of the privacy losses, for pld; a coarser one is quicker and never below.

    Raises:
        InputError: a value out of its range, or an unknown accountant.
    """
    _known(accountant)
    _check(delta=delta)
    for release in releases:
        require_release(*release)
    merged: dict[tuple[float, float], int] = {}
    for sample_rate, sigma, steps in releases:
        merged[sample_rate, sigma] = merged.get((sample_rate, sigma), 0) + steps
    return _composed(tuple((*kind, steps) for kind, steps in sorted(merged.items())), delta, accountant, grid)


@functools.lru_cache(maxsize=4096)
def _composed(releases: tuple[Release, ...], delta: float, accountant: str, grid: float) -> float:
    if not releases:
        return 0.0
    if accountant == "prv":
        return _prv(releases, delta)
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

    total = _fresh(accountant, grid)
    for sample_rate, sigma, steps in releases:
        total.compose(SelfComposedDpEvent(PoissonSampledDpEvent(sample_rate, GaussianDpEvent(sigma)), steps))
    return float(total.get_epsilon(delta))


def _prv(releases: tuple[Release, ...], delta: float) -> float:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's deprecations, and of orders that only bound the search
        from opacus.accountants import PRVAccountant

        accountant = PRVAccountant()
        accountant.history = [(sigma, sample_rate, steps) for sample_rate, sigma, steps in releases]
        return float(accountant.get_epsilon(delta))


@functools.lru_cache(maxsize=1024)
def noise_multiplier(sample_rate: float, epsilon: float, steps: int, delta: float, accountant: str = "pld",
                     grid: float = GRID) -> float:
    """The smallest noise multiplier (1e-4, or 1e-4 of it, too large at most) at which the steps cost at most `epsilon`.

    Raises:
        InputError: a value out of its range, or an unknown accountant.
    """
    _check(sample_rate=sample_rate, delta=delta, steps=steps, epsilon=epsilon)
    _known(accountant)

    def cost(sigma: float, name: str = accountant) -> float:
        return composed(((sample_rate, sigma, steps),), delta, name, grid)

    # The Renyi bound is quick and never below: it gives the slower accountants a narrow bracket.
    low, high = 0.1, 1.0
    while cost(high, "rdp") > epsilon:
        low, high = high, 2 * high
    high = _smallest(lambda sigma: cost(sigma, "rdp"), epsilon, low, high)
    if accountant == "rdp":
        return high
    low, most = 0.5 * high, 1e3 * high
    while cost(high) > epsilon:  # their own errors, additive in epsilon, count where epsilon is small
        low, high = high, 1.5 * high
        if high > most:
            raise InputError(f"--epsilon: {epsilon:g} is below what the accountant {accountant} can resolve; take rdp.")
    return _smallest(cost, epsilon, low, high)


def _smallest(cost: Callable[[float], float], epsilon: float, low: float, high: float) -> float:
    """The smallest sigma in [low, high], up to the tolerance above it, with cost(sigma) <= epsilon; cost falls."""
    while high - low > TOLERANCE * max(1.0, high):
        middle = (low + high) / 2
        if cost(middle) <= epsilon:
            high = middle
        else:
            low = middle
    return high


def require_release(sample_rate: float, noise_multiplier: float, steps: int) -> None:
    """Raise InputError unless these are numbers that a release can have."""
    _check(sample_rate=sample_rate, noise_multiplier=noise_multiplier, steps=steps)


def _known(accountant: str) -> None:
    if accountant not in ACCOUNTANTS:
        raise InputError(unknown("--accountant", accountant, ACCOUNTANTS))


def _fresh(accountant: str, grid: float) -> Any:
    from dp_accounting import pld, rdp

    # It warns of every fractional order whose series does not converge, and leaves it out: a looser bound, still valid.
    logging.getLogger("absl").setLevel(logging.ERROR)
    library: Any = rdp if accountant == "rdp" else pld
    return library.RdpAccountant() if accountant == "rdp" else library.PLDAccountant(value_discretization_interval=grid)


def _check(**values: float) -> None:
    highest = {"sample_rate": 1.0, "delta": math.nextafter(1.0, 0.0)}
    allowed = {"sample_rate": "in (0, 1]", "delta": "in (0, 1)", "steps": "a whole number, at least 1"}
    for name, value in values.items():
        whole = name != "steps" or value == int(value)
        if not (math.isfinite(value) and 0 < value <= highest.get(name, math.inf) and whole):
            raise InputError(f"--{name.replace('_', '-')}: {value} is not {allowed.get(name, 'positive and finite')}.")
