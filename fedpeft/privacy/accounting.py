"""What Poisson-sampled Gaussian steps cost: epsilon from the noise, and the noise from epsilon, by dp-accounting.

One step takes each record with probability q, clips its gradient to C, adds N(0, (sigma C)^2) to the sum. `steps` are
all local steps of all rounds that a client joins. Sampling of clients is no factor of q: a server that sees who took
part gets no uncertainty from it.

    pld   privacy loss distributions on a grid of 1e-4; equals the exact Gaussian mechanism at q = 1 to 5 decimals
    rdp   Renyi orders; 7 to 19 % above pld, more for few steps at a small q

    >>> round(epsilon(sample_rate=1.0, noise_multiplier=1.0, steps=1, delta=1e-5), 4)
    4.3772
"""

from __future__ import annotations

import logging
import math
from typing import Any

from fedpeft.errors import InputError
from fedpeft.registry import unknown

ACCOUNTANTS = ("pld", "rdp")
ASSUMPTIONS = (
    "what is protected: one record of one client (sample level), neighbours by adding or removing it",
    "Poisson sampling: every local step takes each record with the sample rate, independent of everything",
    "noise: Gaussian with standard deviation noise multiplier x clipping norm, on the sum of clipped gradients",
    "steps: all local steps of all rounds that the client joins; client sampling does not lower the sample rate",
    "the adversary sees every update, as the server does; each client has an epsilon of its own, report the largest",
)
TOLERANCE = 1e-4


def epsilon(sample_rate: float, noise_multiplier: float, steps: int, delta: float, accountant: str = "pld") -> float:
    """Epsilon of `steps` steps at this delta.

    Raises:
        InputError: a value out of its range, or an unknown accountant.
    """
    _check(sample_rate=sample_rate, delta=delta, steps=steps, noise_multiplier=noise_multiplier)
    _known(accountant)
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

    step = PoissonSampledDpEvent(sample_rate, GaussianDpEvent(noise_multiplier))
    return float(_fresh(accountant).compose(SelfComposedDpEvent(step, steps)).get_epsilon(delta))


def noise_multiplier(sample_rate: float, epsilon: float, steps: int, delta: float, accountant: str = "pld") -> float:
    """The smallest noise multiplier (up to 1e-4 too large) at which `steps` steps cost at most `epsilon`.

    Raises:
        InputError: a value out of its range, or an unknown accountant.
    """
    _check(sample_rate=sample_rate, delta=delta, steps=steps, epsilon=epsilon)
    _known(accountant)
    from dp_accounting import (
        ExplicitBracketInterval,
        GaussianDpEvent,
        LowerEndpointAndGuess,
        PoissonSampledDpEvent,
        SelfComposedDpEvent,
        calibrate_dp_mechanism,
    )

    def calibrated(name: str, bracket: Any) -> float:
        return float(
            calibrate_dp_mechanism(
                lambda: _fresh(name),
                lambda noise: SelfComposedDpEvent(PoissonSampledDpEvent(sample_rate, GaussianDpEvent(noise)), steps),
                epsilon,
                delta,
                bracket,
                tol=TOLERANCE,
            )
        )

    # The Renyi bound is quick and never below: it gives the slower accountant a narrow bracket.
    bound = calibrated("rdp", LowerEndpointAndGuess(0.1, 1.0))
    return bound if accountant == "rdp" else calibrated(accountant, ExplicitBracketInterval(0.6 * bound, bound))


def _known(accountant: str) -> None:
    if accountant not in ACCOUNTANTS:
        raise InputError(unknown("--accountant", accountant, ACCOUNTANTS))


def _fresh(accountant: str) -> Any:
    from dp_accounting import pld, rdp

    # It warns of every fractional order whose series does not converge, and leaves it out: a looser bound, still valid.
    logging.getLogger("absl").setLevel(logging.ERROR)
    library: Any = rdp if accountant == "rdp" else pld
    return library.RdpAccountant() if accountant == "rdp" else library.PLDAccountant(value_discretization_interval=1e-4)


def _check(**values: float) -> None:
    highest = {"sample_rate": 1.0, "delta": math.nextafter(1.0, 0.0)}
    allowed = {"sample_rate": "in (0, 1]", "delta": "in (0, 1)", "steps": "a whole number, at least 1"}
    for name, value in values.items():
        whole = name != "steps" or value == int(value)
        if not (math.isfinite(value) and 0 < value <= highest.get(name, math.inf) and whole):
            raise InputError(f"--{name.replace('_', '-')}: {value} is not {allowed.get(name, 'positive and finite')}.")
