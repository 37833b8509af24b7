"""Does DP-SGD do what its accountant assumes? Exact tests of each assumption, and a measured lower bound of epsilon.

It believes four things of a step: one record changes the sum by at most C; the noise on it is Gaussian, sigma C, fresh
in every coordinate, step and client; every record joins on its own with probability q; all steps are counted. Each is
tested as what it is: sensitivity without noise, on neighbours that differ by an adversary's record; noise, sampling and
counting as statistics of steps really taken, within five standard errors.

The canary audit (Steinke, Nasr, Jagielski 2023, arXiv 2305.08846) bounds epsilon from below in one run. m canaries,
each inside by a fair coin, have gradients along axes of their own; after the run the r/2 with the highest sums are
guessed inside, the r/2 with the lowest outside. Under (epsilon, delta), of r guesses v or more are right with
probability at most

    P[X >= v] + 2 m delta max_i P[v - i <= X < v] / i,      X ~ Binomial(r, e^epsilon / (1 + e^epsilon)).

m and r are fixed here, so that nothing is picked for its result. A canary's gradient is 5 C: clipping has work to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fedpeft.privacy.noise import Randomness
from fedpeft.privacy.plan import Plan

Records = TypeVar("Records")
CANARIES, GUESSES, LOUDNESS, PIECE = 2000, 400, 5.0, 256
ERRORS = 5.0  # standard errors allowed: a false alarm in two million
ROUNDING = 1e-3  # of float32, in units of C
LIMITS = ("The canary audit sees gross errors only: a factor 2 in the sensitivity, or clipping of the batch mean, goes "
          "unseen at large claims. The exact checks are for those.")


@dataclass(frozen=True)
class Check:
    """One assumption: what was measured, the interval [low, high] that is allowed, and what that means."""

    name: str
    measured: float
    low: float
    high: float
    what: str

    @property
    def passed(self) -> bool:
        return self.low <= self.measured <= self.high  # not for NaN


def sensitivity(name: str, step: Callable[[Plan, Records], Tensor], plan: Plan,
                cases: Iterable[tuple[Records, list[Records]]], rounding: float = ROUNDING) -> Check:
    """The largest change of a step by one record, in units of C / b.

    Args:
        step: what it releases [P] of these records by this plan.
        cases: a set of records, and neighbours of it with one record more.
    """
    plan = replace(plan, sample_rate=1.0, noise_multiplier=0.0)
    changes = [(after - before).norm() for before, neighbours in
               ((step(plan, some).double(), more) for some, more in cases)
               for after in (step(plan, records).double() for records in neighbours)]
    measured = float(torch.stack(changes).max()) * plan.expected_batch / plan.clip
    return Check(name, measured, 0.0, 1.0 + rounding,
                 f"change by one record, over clip / expected batch; worst of {len(changes)} pairs of neighbours")


def noise(streams: Sequence[Sequence[dict[str, Tensor]]], plan: Plan) -> list[Check]:
    """Size, shape and freshness of the noise, in steps that drew no record.

    Each stream has the steps of one client in one round, by parameter name; there are two or more, of one length.
    """
    expected = plan.noise_multiplier * plan.clip / plan.expected_batch
    names = list(streams[0][0])
    scaled = [{name: torch.stack([step[name].double().flatten().cpu() for step in steps]) / expected for name in names}
              for steps in streams]  # [steps, values]
    flat = [torch.cat(list(stream.values()), dim=1) for stream in scaled]
    values = torch.cat(flat).flatten()
    count, margin = len(values), ERRORS / math.sqrt(2 * len(values))
    shape = float((torch.special.ndtr(values.sort().values) - (torch.arange(count) + 0.5) / count).abs().max())
    worst = max((_standard_errors(torch.cat([stream[name].flatten() for stream in scaled])) for name in names), key=abs)
    same = [(one, other) for k, one in enumerate(flat) for other in flat[k + 1 :]]
    same += [(steps[1:], steps[:-1]) for steps in flat]
    same += [(stream[one], stream[other]) for stream in scaled for one, other in pairwise(names)]
    return [
        Check("noise size", float(values.square().mean().sqrt()), 1 - margin, 1 + margin,
              f"standard deviation over sigma clip / expected batch, of {count} values"),
        Check("noise of each tensor", worst, -ERRORS, ERRORS,
              f"size in the tensor that is farthest off, of {len(names)}; in standard errors"),
        Check("noise shape", shape * math.sqrt(count), 0.0, 2.7, "distance to the normal distribution (Kolmogorov)"),
        Check("noise is fresh", max(_alike(one, other) for one, other in same), 0.0, ERRORS,
              "correlation between clients, rounds, steps or tensors, the largest; in standard errors"),
    ]


def sampler(draws: Sequence[np.ndarray], count: int, rate: float) -> list[Check]:
    """Whether these draws from `count` records are Poisson samples: how often, how many at once, anew in each step."""
    drawn = np.zeros((len(draws), count))
    for row, indices in zip(drawn, draws, strict=True):
        np.add.at(row, indices, 1.0)
    one, sizes = rate * (1 - rate), drawn.sum(1)  # the variance of one record's inclusion
    error = ERRORS * math.sqrt(one / drawn.size)
    # A binomial's fourth moment is 3 v^2 + v (1 - 6 q (1 - q)), with v = n q (1 - q).
    spread = ERRORS * math.sqrt((2 + (1 - 6 * one) / (count * one)) / len(draws)) if one else 0.0
    variance = float(((sizes - count * rate) ** 2).mean()) / (count * one) if one else 1.0 + float(sizes.var())
    centred = drawn - rate
    again = float((centred[1:] * centred[:-1]).mean()) / one if one else 0.0
    apart = ERRORS / math.sqrt(max(1, (len(draws) - 1) * count))
    return [
        Check("sampling rate", float(drawn.mean()), rate - error, rate + error,
              f"share of records in a batch; planned q = {rate:.4g}"),
        Check("batch size", variance, max(0.0, 1 - spread), 1 + spread,
              "variance over n q (1 - q); 0 for batches of a fixed size"),
        Check("batches are independent", again, -apart, apart, "correlation of a record's inclusion in steps in a row"),
    ]


def empty(draws: Sequence[np.ndarray], steps: int, count: int, rate: float) -> Check:
    """Whether empty batches are as frequent as they must be, none of `steps` left out or drawn again."""
    chance, found = (1 - rate) ** count, sum(len(indices) == 0 for indices in draws) / steps
    error = ERRORS * math.sqrt(chance * (1 - chance) / steps)
    return Check("empty batches", found, chance - error, chance + error, f"share of {steps} steps on {count} records")


def coverage(before: dict[str, Tensor], after: dict[str, Tensor], trains: set[str], noised: int) -> list[Check]:
    """Whether what trains is noised and moves, and nothing else moves.

    Args:
        before, after: every parameter and buffer of the model, around a client's round.
        trains: names of those that require gradients.
        noised: values in the clipped and noised vector.
    """
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    outside = sum(after[name].numel() for name in trains) - noised
    return [
        Check("trained and noised", float(outside), 0.0, 0.0, "values that train outside of the noised vector"),
        Check("trained tensors move", float(len(trains - moved)), 0.0, 0.0, f"of {len(trains)} stood still"),
        Check("frozen tensors rest", float(len(moved - trains)), 0.0, 0.0, f"of {len(after) - len(trains)} moved"),
    ]


def ledger(reserved: int, taken: int) -> Check:
    return Check("ledger", float(reserved), float(taken), float(taken), "steps reserved; allowed: noisy steps taken")


def one_run(plan: Plan, source: Randomness) -> float:
    """Lower bound of epsilon, at 95 %, from one run of the plan's sampling, clipping and noise on canaries."""
    inside = source.uniform(CANARIES) < 0.5
    members = np.flatnonzero(inside)
    scores = np.zeros(CANARIES)
    for _ in range(plan.steps):
        drawn = members[plan.sample(len(members), source)]
        total = torch.zeros(CANARIES)
        for start in range(0, len(drawn), PIECE):
            piece = torch.from_numpy(drawn[start : start + PIECE])
            total += plan.clipped_sum(torch.nn.functional.one_hot(piece, CANARIES) * (LOUDNESS * plan.clip))
        scores += plan.noised_mean(total, source).double().numpy()
    order, half = np.argsort(scores), GUESSES // 2
    right = int(inside[order[-half:]].sum() + (~inside[order[:half]]).sum())
    return lower_bound(CANARIES, GUESSES, right, plan.budget.delta)


def lower_bound(canaries: int, guesses: int, right: int, delta: float, error: float = 0.05) -> float:
    """The largest epsilon that this many right guesses refute, with at most this chance of error; 0 for none.

    >>> round(lower_bound(2000, 400, 400, 1e-5), 2), lower_bound(2000, 400, 200, 1e-5)
    (4.84, 0.0)
    """
    low, high = 0.0, 40.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _chance(canaries, guesses, right, middle, delta) <= error else (low, middle)
    return low


def _chance(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Bound of the chance of `right` or more right guesses under (epsilon, delta)."""
    one = 1 / (1 + math.exp(-epsilon))
    mass = [math.exp(math.lgamma(guesses + 1) - math.lgamma(k + 1) - math.lgamma(guesses - k + 1) + k * math.log(one)
                     - (guesses - k) * (epsilon + math.log1p(math.exp(-epsilon)))) for k in range(guesses + 1)]
    below = np.cumsum(mass[:right][::-1]) / np.arange(1, right + 1)
    return math.fsum(mass[right:]) + 2 * canaries * delta * float(below.max(initial=0.0))


def _alike(one: Tensor, other: Tensor) -> float:
    """Correlation of two blocks [steps, values], cut to the narrower, in standard errors."""
    width = min(one.shape[1], other.shape[1])
    one, other = one[:, :width].flatten(), other[:, :width].flatten()
    return float((one @ other).abs() / (one.norm() * other.norm()).clamp(min=1e-300)) * math.sqrt(len(one))


def _standard_errors(values: Tensor) -> float:
    """How far the mean square of standard normal values is from 1 (Wilson and Hilferty's normal form of chi-square)."""
    slack = 2 / (9 * len(values))
    return (math.cbrt(float(values.square().mean())) - (1 - slack)) / math.sqrt(slack)
