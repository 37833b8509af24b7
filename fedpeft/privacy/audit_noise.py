"""Is the noise of released steps Gaussian, sigma C / b, and fresh: everywhere, not only on average?

What is tested is a step's release minus the clipped mean that an auditor has computed from the records taken, divided
by sigma C / b. All of that should be independent standard normal values. So, each with its own alarm rate (`tails`):

    size     over everything; by engine, client, round, step, with records and without; of each tensor, step, coordinate
    shape    Kolmogorov's distance; how many are far out
    fresh    inner products of all pairs of steps, and of all steps that differ in their number, round, client or run
             only, also tensor by tensor; steps whose values are another's in another order
    apart    inner products of coordinates over steps; the sum of squares of all inner products of steps, which is too
             large if coordinates have anything in common
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedpeft.privacy.audit import Check
from fedpeft.privacy.tails import alarm_limit, binomial_deviation, chi_square, kolmogorov_limit, worst_of

FAR = (2.0, 3.0, 3.5)
AXES = ("run", "client", "round", "step")
COLUMNS, VALUES, PAIRS = 2048, 2_000_000, 64  # coordinates paired; values of the shape; least values of paired steps
REORDERED = 2e-3  # squared distance of two steps' sorted sizes; 1e-100 would be the chance of two that are independent


@dataclass(frozen=True)
class NoiseBlock:
    """Noise in its own standard deviations [runs, clients, rounds, steps, values]."""

    engine: str
    drawn: bool
    values: Tensor

    @property
    def name(self) -> str:
        """Engine and whether records were drawn, as checks name the block."""
        return f"{self.engine}, {'with records' if self.drawn else 'no records'}"


def check_noise(blocks: Sequence[NoiseBlock], sizes: dict[str, int]) -> list[Check]:
    """All checks.

    Args:
        sizes: number of values of each tensor, in their order.
    """
    rows = torch.cat([block.values.flatten(0, 3) for block in blocks])
    parts = [block.values.split(list(sizes.values()), -1) for block in blocks]
    squares = [torch.stack([part.double().square().sum(-1) for part in some], -1) for some in parts]  # [..., tensors]
    return [
        _check_size(rows),
        _check_groups(blocks, squares, sizes),
        _check_steps(squares, rows.shape[1]),
        _check_coordinates(blocks, rows),
        *_check_shape(rows),
        *_check_fresh(blocks, rows, sizes),
        *_check_apart(blocks, rows),
    ]


def _check_size(rows: Tensor) -> Check:
    count = rows.numel()
    margin = alarm_limit() / math.sqrt(2 * count)
    return Check(
        "noise size",
        math.sqrt(float(rows.double().square().mean())),
        1 - margin,
        1 + margin,
        f"standard deviation over sigma clip / expected batch, of {count} values",
    )


def _check_groups(blocks: Sequence[NoiseBlock], squares: list[Tensor], sizes: dict[str, int]) -> Check:
    found = {}
    for block, square in zip(blocks, squares, strict=True):
        cells = square[..., 0].numel()
        for tensor, size in enumerate(sizes.values()):
            found[f"{list(sizes)[tensor]}: {block.name}"] = chi_square(square[..., tensor].sum(), size * cells)
        whole, width = square.sum(-1), sum(sizes.values())
        found[block.name] = chi_square(whole.sum(), width * cells)
        for axis, kind in enumerate(AXES):
            for index, part in enumerate(whole.unbind(axis)):
                found[f"{kind} {index + 1}: {block.name}"] = chi_square(part.sum(), width * part.numel())
    name = max(found, key=lambda key: (math.isnan(found[key]), abs(float(found[key]))))
    return Check(
        "noise of each part",
        float(found[name]),
        -alarm_limit(len(found)),
        alarm_limit(len(found)),
        f"size by tensor, client, round, step, with and without records; worst of {len(found)}: {name}; in "
        "standard errors",
    )


def _check_steps(squares: list[Tensor], width: int) -> Check:
    each = chi_square(torch.cat([square.sum(-1).flatten() for square in squares]), width)
    return Check(
        "noise of each step",
        worst_of(each.tolist()),
        -alarm_limit(len(each)),
        alarm_limit(len(each)),
        f"size in the step that is farthest off, of {len(each)}; in standard errors",
    )


def _check_coordinates(blocks: Sequence[NoiseBlock], rows: Tensor) -> Check:
    parts = [rows, *(block.values.flatten(0, 3) for block in blocks)]
    each = torch.cat([chi_square(part.double().square().sum(0), len(part)) for part in parts])
    return Check(
        "noise of each value",
        worst_of(each.tolist()),
        -alarm_limit(len(each)),
        alarm_limit(len(each)),
        f"size in the coordinate that is farthest off, of {rows.shape[1]}; in standard errors",
    )


def _check_shape(rows: Tensor) -> Iterator[Check]:
    values = rows.flatten()
    values = values[:: max(1, len(values) // VALUES)].double()
    places = (torch.arange(len(values)) + 0.5) / len(values)
    distance = float((torch.special.ndtr(values.sort().values) - places).abs().max())
    yield Check(
        "noise shape",
        distance * math.sqrt(len(values)),
        0.0,
        kolmogorov_limit() + 0.5 / math.sqrt(len(values)),
        "distance to the normal distribution (Kolmogorov)",
    )
    beyond = [
        float(
            binomial_deviation(np.array(int((values.abs() > far).sum())), len(values), math.erfc(far / math.sqrt(2)))[0]
        )
        for far in FAR
    ]
    yield Check(
        "noise tails",
        worst_of(beyond),
        -alarm_limit(len(FAR)),
        alarm_limit(len(FAR)),
        f"values beyond {', '.join(f'{far:g}' for far in FAR)} standard deviations; in standard errors",
    )


def _check_fresh(blocks: Sequence[NoiseBlock], rows: Tensor, sizes: dict[str, int]) -> list[Check]:
    parts = [rows, *(part for part in rows.split(list(sizes.values()), 1) if part.shape[1] >= PAIRS)]
    found = [find_alike(part) for part in parts]
    for block in blocks:
        for axis in range(len(AXES)):
            lines = block.values.movedim(axis, 0)
            if len(lines) > 1:
                found += [find_alike(part.flatten(1)) for part in (lines, *lines.split(list(sizes.values()), -1))]
    pairs = sum(count for _, count in found)
    return [
        Check(
            "noise is fresh",
            worst_of([value for value, _ in found]),
            -alarm_limit(pairs),
            alarm_limit(pairs),
            f"inner product of the noise of two steps, clients, rounds, runs; worst of {pairs}; in standard errors",
        ),
        Check(
            "noise is not reordered",
            _distance_reordered(rows),
            REORDERED,
            math.inf,
            f"squared distance of two steps' sorted sizes of values; least of all pairs of {len(rows)} steps",
        ),
    ]


def find_alike(rows: Tensor) -> tuple[float, int]:
    """The largest inner product of two rows over the larger norm, standard normal if the other is; and of how many."""
    norms = torch.linalg.vector_norm(rows, dim=1)
    found = rows @ rows.T / torch.maximum(norms[:, None], norms).clamp(min=1e-30)
    found.fill_diagonal_(0.0)
    return worst_of([float(found.min()), float(found.max())]), len(rows) * (len(rows) - 1) // 2


def _distance_reordered(rows: Tensor) -> float:
    if rows.shape[1] < PAIRS or len(rows) < 2:
        return math.inf
    sorted_ = rows.abs().sort(1).values
    sorted_ = sorted_ - sorted_.mean(0)
    norms = sorted_.square().sum(1)
    distance = norms[:, None] + norms - 2 * sorted_ @ sorted_.T
    distance.fill_diagonal_(math.inf)
    return float(distance.min().clamp(min=0.0))


def _check_apart(blocks: Sequence[NoiseBlock], rows: Tensor) -> Iterator[Check]:
    width = rows.shape[1]
    chosen = np.sort(np.random.default_rng(0).permutation(width)[:COLUMNS])
    drawn = [block.values.flatten(0, 3) for block in blocks if block.drawn]
    found = [find_alike(part[:, chosen].T) for part in (rows, torch.cat(drawn) if drawn else rows)]
    pairs = sum(count for _, count in found)
    yield Check(
        "coordinates are apart",
        worst_of([value for value, _ in found]),
        -alarm_limit(pairs),
        alarm_limit(pairs),
        f"inner product over steps of two coordinates of {len(chosen)}; worst of {pairs}, in standard errors",
    )
    each = [(block.name, _sum_overlap(block.values.flatten(0, 3))) for block in blocks]
    name, value = max(each, key=lambda item: (math.isnan(item[1]), abs(item[1])))
    most = alarm_limit(len(each)) + 1.0  # its tails are a little longer than normal ones
    yield Check(
        "nothing in common",
        value,
        -most,
        most,
        f"squared inner products of all pairs of steps; worst of {len(each)}: {name}; in standard errors",
    )


def _sum_overlap(rows: Tensor) -> float:
    """Sum of the squared inner products of all pairs of n rows [P], in standard errors: of n (n - 1) / 2 with mean P,
    variance 2 P^2 + 6 P, and covariance 2 P of two that share a row.
    """
    count, width = rows.shape
    pairs = count * (count - 1) / 2
    gram = rows.double() @ rows.double().T
    total = float((gram.square().sum() - gram.diagonal().square().sum()) / 2)
    variance = pairs * (2 * width**2 + 6 * width) + count * (count - 1) * (count - 2) * 2 * width
    return (total - pairs * width) / math.sqrt(max(variance, 1e-30))
