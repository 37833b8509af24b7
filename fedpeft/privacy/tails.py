"""How unlikely a number is, in standard errors: what an audit's measures are compared in.

A check passes a right program with probability 1 - ALARM; the limit of a check that looks at the worst of `count`
numbers is that of ALARM / count for each (Bonferroni), which holds whatever they have to do with each other.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

ALARM = 1e-6
EXACT = 2000  # values up to which the chi-square distribution itself is taken, not its normal form
LEAST = 1e-300


def alarm_limit(count: int = 1) -> float:
    """Standard errors that the largest of `count` numbers passes with probability ALARM at most, of either sign.

    >>> round(alarm_limit(), 2), round(alarm_limit(1000), 2)
    (4.89, 6.11)
    """
    return -float(torch.special.ndtri(torch.tensor(ALARM / 2 / max(1, count), dtype=torch.float64)))


def kolmogorov_limit(count: int = 1) -> float:
    """The same limit for `count` Kolmogorov distances times the root of their numbers of values (Massart's bound)."""
    return math.sqrt(math.log(2 * max(1, count) / ALARM) / 2)


def chi_square(squares: Tensor, count: int) -> Tensor:
    """Sums of `count` squares of standard normal values, in standard errors (Wilson and Hilferty's form for many)."""
    squares = squares.double()
    if count > EXACT:
        slack = 2 / (9 * count)
        return ((squares / count).pow(1 / 3) - (1 - slack)) / math.sqrt(slack)
    half = torch.full_like(squares, count / 2)
    low = torch.special.gammainc(half, squares / 2).clamp(min=LEAST)
    high = torch.special.gammaincc(half, squares / 2).clamp(min=LEAST)
    return torch.where(squares < count, torch.special.ndtri(low), -torch.special.ndtri(high))


def binomial_deviation(counts: np.ndarray, trials: int, chance: float) -> np.ndarray:
    """Counts of successes [...], in standard errors from their exact tails; 0 in the middle."""
    counts = np.atleast_1d(np.asarray(counts, dtype=np.int64))
    if chance >= 1.0 or trials == 0:
        return np.where(counts == trials, 0.0, math.inf)
    k = torch.arange(trials + 1, dtype=torch.float64)
    whole = torch.tensor(trials + 1.0, dtype=torch.float64)
    masses = (
        torch.lgamma(whole)
        - torch.lgamma(k + 1)
        - torch.lgamma(whole - k)
        + k * math.log(chance)
        + (trials - k) * math.log1p(-chance)
    ).exp()
    low = masses.cumsum(0).clamp(min=LEAST, max=1.0)
    high = masses.flip(0).cumsum(0).flip(0).clamp(min=LEAST, max=1.0)
    found = torch.as_tensor(counts.clip(0, trials))
    below, above = -torch.special.ndtri(low[found]), -torch.special.ndtri(high[found])
    z = torch.where(above > below, above, -below).numpy()
    return np.where(np.maximum(above.numpy(), below.numpy()) <= 0, 0.0, np.where(counts > trials, math.inf, z))


def worst_of(values: list[float]) -> float:
    """The one farthest from 0; not a number if one is not."""
    return max(values, key=lambda value: (math.isnan(value), abs(value)), default=0.0)
