"""A second opinion on epsilon, that shares nothing with `fedpeft.privacy.accounting`: the audit's.

Of one step the privacy loss L = log P / Q is put on a grid, for P a Gaussian mixed with rate q against Q without the
record, and the other way round. The sum of T losses is T-fold convolution, by FFT, and

    delta(epsilon) = E[max(0, 1 - e^(epsilon - L))]       (Sommer, Meiser, Mohammadi 2019; Koskela et al. 2020)

Masses are split between their two neighbours on the grid, so that means are kept. It is no bound: near the true value.
"""

from __future__ import annotations

import math

import numpy as np
import torch

POINTS, CELLS, REACH = 100_001, 1 << 18, 12.0  # of the Gaussian, of the losses' grid; standard deviations


def epsilon(sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """Epsilon of Poisson-sampled Gaussian steps, adding or removing one record.

    >>> round(epsilon(1.0, 1.0, 1, 1e-5), 2), round(epsilon(0.01, 1.0, 1000, 1e-5), 2)
    (4.38, 1.83)
    """
    return max(_one_way(sample_rate, noise_multiplier, steps, delta, removed) for removed in (False, True))


def _one_way(q: float, sigma: float, steps: int, delta: float, removed: bool) -> float:
    edges = np.linspace(-REACH * sigma, 1 + REACH * sigma, POINTS)
    x = (edges[1:] + edges[:-1]) / 2

    def mass(mean: float) -> np.ndarray:
        return np.diff(torch.special.ndtr(torch.from_numpy((edges - mean) / sigma)).numpy())

    exponent = (2 * x - 1) / (2 * sigma**2)
    ratio = np.logaddexp(math.log1p(-q), math.log(q) + exponent) if q < 1 else exponent
    losses, masses = (ratio, (1 - q) * mass(0.0) + q * mass(1.0)) if removed else (-ratio, mass(0.0))
    mean = float(losses @ masses)
    spread = math.sqrt(float((losses - mean) ** 2 @ masses) * steps)
    width = abs(mean) * steps + REACH * spread + float(np.abs(losses[masses > 1e-15]).max())
    cell = 2 * width / CELLS
    place = np.clip(losses / cell, -CELLS / 2 + 1, CELLS / 2 - 2)
    low = np.floor(place).astype(np.int64)
    grid = np.zeros(CELLS)
    # Not `+=`, which adds once where several losses share a cell.
    np.add.at(grid, low % CELLS, masses * (1 - (place - low)))
    np.add.at(grid, (low + 1) % CELLS, masses * (place - low))
    together = np.fft.fftshift(np.fft.irfft(np.fft.rfft(grid) ** steps, CELLS)).clip(min=0.0)
    values = (np.arange(CELLS) - CELLS // 2) * cell
    gains = values > 0
    values, together = values[gains], together[gains]
    beyond = together[::-1].cumsum()[::-1] - np.exp(values) * (together * np.exp(-values))[::-1].cumsum()[::-1]
    small = np.flatnonzero(beyond <= delta)  # it falls
    return float(values[small[0]]) if len(small) else width
