"""Renyi accounting of the toy's private steps: sample-level, Poisson-sampled Gaussian, add-or-remove neighbours."""

from __future__ import annotations

from functools import cache

from fedpeft.errors import InputError

# Whole orders are exact and fast; fewer orders only raise epsilon.
ORDERS = [*range(2, 20), 20, 22, 24, 28, 32, 40, 48, 64, 96, 128]


@cache
def sigma(records: int, batch: int, steps: int, epsilon: float, delta: float) -> float:
    """Noise multiplier (up to 0.1 % too large) at which `steps` steps cost at most `epsilon`."""
    low, high = 0.2, 1.0
    while spent(high, records, batch, steps, delta) > epsilon:
        low, high = high, 2 * high
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle, records, batch, steps, delta) > epsilon else (low, middle)
    return high


@cache
def spent(noise: float, records: int, batch: int, steps: int, delta: float) -> float:
    """Epsilon of `steps` steps at noise multiplier `noise` and sampling rate min(1, batch / records)."""
    try:
        from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
        from dp_accounting.rdp import RdpAccountant
    except ImportError as error:
        raise InputError("the private experiments need the package dp-accounting: pip install dp-accounting") from error
    step = PoissonSampledDpEvent(min(1.0, batch / records), GaussianDpEvent(noise))
    return float(RdpAccountant(ORDERS).compose(SelfComposedDpEvent(step, steps)).get_epsilon(delta))
