"""Does DP-SGD do what its accountant assumes? Exact tests of each assumption, and a measured lower bound of epsilon.

It believes four things of a step: one record changes the sum by at most C; the noise on it is Gaussian, sigma C, fresh
in every coordinate, step and client; every record joins on its own with probability q; all steps are counted. Each is
tested as what it is: sensitivity without noise, on neighbours that differ by an adversary's record; noise
(`audit_noise`), sampling and counting as statistics of steps that clients really took. A right program fails a
statistical check with probability `tails.ALARM`; the others allow for rounding only.

The canary audit (Steinke, Nasr, Jagielski 2023, arXiv 2305.08846) bounds epsilon from below in one run. m canaries,
each inside by a fair coin, have gradients along axes of their own; after the run the r/2 with the highest sums are
guessed inside, the r/2 with the lowest outside. Under (epsilon, delta), of r guesses v or more are right with
probability at most

    P[X >= v] + 2 m delta max_i P[v - i <= X < v] / i,      X ~ Binomial(r, e^epsilon / (1 + e^epsilon)).

m and r are fixed here, so that nothing is picked for its result. A canary's gradient is 5 C: clipping has work to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fedpeft.privacy.noise import Randomness
from fedpeft.privacy.plan import Plan
from fedpeft.privacy.tails import alarm_limit, binomial_deviation, chi_square, kolmogorov_limit, worst_of

Records = TypeVar("Records")
CANARIES, GUESSES, LOUDNESS, PIECE = 2000, 400, 5.0, 256
COMPANY = 1024  # records of a client that are paired
ROUNDING = 1e-3  # of float32, in units of C
LIMITS = (
    "It runs the clients, rounds and engines named above. A fault in other ones, or that waits for a date, a value or "
    "a number of steps, it does not meet.",
    "Statistics see what is larger than the tolerances shown: noise of one coordinate that is a tenth too small, a "
    "rate a few percent too high in one client, a weak dependence between few values pass.",
    "Randomness is compared between clients, rounds, runs and processes of this machine. That a stream is fresh does "
    "not show that nobody can guess it: one seeded by the time or a process's number passes.",
    "Noise in the low bits of floating point, time, memory, message sizes and texts of errors, and whether a disk "
    "keeps what it was told to, are not measured. Nor are sums for heads, test-time adaptation and secure aggregation.",
    "Noise of the server (privacy.unit=client) has no audit.",
    "The canaries see gross errors only: a factor 2 in the sensitivity, or clipping of the batch mean, goes unseen at "
    "large claims. The exact checks are for those.",
)


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
        """Whether the measured value lies in [low, high]; NaN never does."""
        return self.low <= self.measured <= self.high  # not for NaN


def sensitivity(
    name: str,
    steps: Callable[[Plan, list[Records]], list[Tensor]],
    plan: Plan,
    cases: Iterable[tuple[Records, list[Records]]],
    rounding: float = ROUNDING,
) -> Check:
    """The largest change of a step by one record, in units of C / b.

    Args:
        steps: what a step releases [P] of each of these sets of records by this plan.
        cases: a set of records, and neighbours of it with one record more.
    """
    # All records and no noise: what is left between two releases is what one record changes.
    plan = replace(plan, sample_rate=1.0, noise_multiplier=0.0)
    changes = []
    for some, neighbours in cases:
        before, *after = (released.double() for released in steps(plan, [some, *neighbours]))
        changes += [(one - before).norm() for one in after]
    measured = float(torch.stack(changes).max()) * plan.expected_batch / plan.clip
    return Check(
        name,
        measured,
        0.0,
        1.0 + rounding,
        f"change by one record, over clip / expected batch; worst of {len(changes)} pairs of neighbours",
    )


@dataclass(frozen=True)
class Draws:
    """How often one client's steps took each of its records: counts [runs, rounds, steps, records]; its sample rate."""

    engine: str
    client: str
    counts: np.ndarray
    rate: float


def sampler(draws: Sequence[Draws]) -> list[Check]:
    """Whether these are Poisson samples: how often, once at most, how many, anew in each step, each record alone."""
    expected = sum(own.rate * own.counts.size for own in draws)
    variance = sum(own.rate * (1 - own.rate) * own.counts.size for own in draws)
    margin = alarm_limit() * math.sqrt(variance) / expected
    parts = {}
    for own in draws:
        named, cells = f"{own.client}, {own.engine}", own.counts[..., 0].size
        parts[named] = float(binomial_deviation(own.counts.sum(), own.counts.size, own.rate)[0])
        parts[f"a record of {named}"] = worst_of(
            binomial_deviation(own.counts.sum((0, 1, 2)), cells, own.rate).tolist()
        )
    name = max(parts, key=lambda key: abs(parts[key]))
    count = sum(own.counts.shape[-1] + 1 for own in draws)
    return [
        Check(
            "sampling rate",
            float(sum(own.counts.sum() for own in draws)) / expected,
            1 - margin,
            1 + margin,
            "records taken over those planned",
        ),
        Check(
            "rate of each part",
            parts[name],
            -alarm_limit(count),
            alarm_limit(count),
            f"by client, engine and record, {count} in all; worst: {name}; in standard errors",
        ),
        Check(
            "once in a batch",
            float(max(own.counts.max() for own in draws)),
            0.0,
            1.0,
            "times that a step took one record, at most",
        ),
        *_place_sizes(draws),
        _count_again(draws),
        _count_company(draws),
    ]


def _place_sizes(draws: Sequence[Draws]) -> Iterator[Check]:
    """Sizes at their places in the binomial distribution, uniform by a random share of the probability of each size."""
    generator, engines = np.random.default_rng(0), sorted({own.engine for own in draws})
    places: dict[str, list[np.ndarray]] = {engine: [] for engine in engines}
    for own in draws:
        sizes, count = own.counts.sum(-1).astype(np.int64).ravel(), own.counts.shape[-1]
        below = _cumulate_binomial(count, own.rate, int(sizes.max()))
        places[own.engine].append(below[sizes] + generator.random(len(sizes)) * (below[sizes + 1] - below[sizes]))
    lines = [np.sort(np.concatenate(places[engine])) for engine in engines]
    distances = [
        float(np.abs(line - (np.arange(len(line)) + 0.5) / len(line)).max()) * math.sqrt(len(line)) for line in lines
    ]
    least = min(map(len, lines))
    yield Check(
        "batch size",
        max(distances),
        0.0,
        kolmogorov_limit(len(engines)) + 0.5 / math.sqrt(least),
        f"distance of the sizes of {least} batches to the binomial distribution (Kolmogorov)",
    )
    every = torch.from_numpy(np.concatenate(lines)).clamp(1e-15, 1 - 1e-15)
    spread = float(chi_square(torch.special.ndtri(every).square().sum(), len(every)))
    yield Check(
        "batch size spread",
        spread,
        -alarm_limit(),
        alarm_limit(),
        f"how far the sizes of {len(every)} batches are spread: little if they are alike, much if records "
        "come together; in standard errors",
    )


def _cumulate_binomial(count: int, rate: float, most: int) -> np.ndarray:
    """P[X < k] for X ~ Binomial(count, rate) and k = 0 to the larger of count and `most`, and one more."""
    k = torch.arange(count + 1, dtype=torch.float64)
    masses = (k == count).double()
    if rate < 1:
        masses = (
            torch.lgamma(torch.tensor(count + 1.0, dtype=torch.float64))
            - torch.lgamma(k + 1)
            - torch.lgamma(count - k + 1)
            + k * math.log(rate)
            + (count - k) * math.log1p(-rate)
        ).exp()
    return np.concatenate([[0.0], masses.cumsum(0).numpy().clip(max=1.0), np.ones(max(0, most - count) + 1)])


def _count_again(draws: Sequence[Draws]) -> Check:
    """Records that two steps share, for steps of one client that differ in the round and step, or in the run, summed
    over the rest and over clients with one rate; and for two clients in the same step.
    """
    found: list[tuple[np.ndarray, int, float]] = []
    for engine, rate in sorted({(own.engine, own.rate) for own in draws}):
        flat = [
            own.counts.reshape(own.counts.shape[0], -1, own.counts.shape[-1])
            for own in draws
            if (own.engine, own.rate) == (engine, rate)
        ]
        for axis in (0, 1):
            lines = np.concatenate([np.moveaxis(counts, axis, 0).reshape(counts.shape[axis], -1) for counts in flat], 1)
            shared = (lines @ lines.T)[np.triu_indices(len(lines), 1)]
            found.append((shared, lines.shape[1], rate**2))
    for one, other in combinations(draws, 2):
        if one.engine == other.engine:
            width = min(one.counts.shape[-1], other.counts.shape[-1])
            both = one.counts[..., :width] * other.counts[..., :width]
            found.append((both.sum(), both.size, one.rate * other.rate))
    each = [value for counts, trials, chance in found for value in binomial_deviation(counts, trials, chance).tolist()]
    return Check(
        "batches are independent",
        worst_of(each),
        -alarm_limit(len(each)),
        alarm_limit(len(each)),
        f"records that two steps share, by step, round, run, client; worst of {len(each)}; in standard errors",
    )


def _count_company(draws: Sequence[Draws]) -> Check:
    """How often two records of a client are taken together."""
    together: dict[tuple[str, float], list[np.ndarray]] = {}
    for own in draws:
        rows = own.counts.reshape(-1, own.counts.shape[-1])[:, :COMPANY]
        together.setdefault((own.client, own.rate), []).append(rows)
    values, count = [], 0
    for (_, rate), parts in together.items():
        lines = np.concatenate(parts)
        pairs = (lines.T @ lines)[np.triu_indices(lines.shape[1], 1)]
        values.append(worst_of(binomial_deviation(pairs, len(lines), rate**2).tolist()))
        count += len(pairs)
    return Check(
        "records are independent",
        worst_of(values),
        -alarm_limit(count),
        alarm_limit(count),
        f"steps that take two records together; worst of {count} pairs; in standard errors",
    )


def empty(sizes: np.ndarray, count: int, rate: float) -> Check:
    """Whether batches of `count` records are empty as often as they must be, none left out or drawn again."""
    chance, found = (1 - rate) ** count, int((sizes == 0).sum())
    value = float(binomial_deviation(np.array(found), len(sizes), chance)[0]) if 0 < chance < 1 else 0.0
    return Check(
        "empty batches",
        value,
        -alarm_limit(),
        alarm_limit(),
        f"{found} of {len(sizes)} steps on {count} records; expected {chance * len(sizes):.1f}; in standard errors",
    )


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
        low, high = (middle, high) if _bound_chance(canaries, guesses, right, middle, delta) <= error else (low, middle)
    return low


def _bound_chance(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Bound of the chance of `right` or more right guesses under (epsilon, delta)."""
    one = 1 / (1 + math.exp(-epsilon))
    mass = [
        math.exp(
            math.lgamma(guesses + 1)
            - math.lgamma(k + 1)
            - math.lgamma(guesses - k + 1)
            + k * math.log(one)
            - (guesses - k) * (epsilon + math.log1p(math.exp(-epsilon)))
        )
        for k in range(guesses + 1)
    ]
    below = np.cumsum(mass[:right][::-1]) / np.arange(1, right + 1)
    return math.fsum(mass[right:]) + 2 * canaries * delta * float(below.max(initial=0.0))
