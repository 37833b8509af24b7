"""Classes made from numbers: 1-D signals in the style of MNIST-1D, and 8x8 drawings of random strokes.

A signal class is a template of 16 random knots. A record of it is the template, stretched by up to 25 %, shifted by up
to 3 of 64 places, on a random slope, with correlated noise (Greydanus & Kobak, arXiv 2011.14439, use ten hand-made
templates). A stroke class is a few random quadratic curves; a record is drawn with a random affine map and thickness on
32x32 and averaged in 4x4 blocks, as scikit-learn's `digits` were made from scans.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> signals(templates(3, rng), np.array([0, 0, 2]), rng).shape, drawings(curves(2, rng), np.array([1]), rng).shape
    ((3, 64), (1, 8, 8))
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LENGTH, KNOTS = 64, 16
SIDE, FINE, POINTS = 8, 32, 48
NOISE, SHIFT, STRETCH, SLOPE = 0.4, 3.0, 0.25, 0.75  # deviation; places of 64; share of the length; half the rise

Warp = Callable[[np.ndarray], np.ndarray]


def templates(classes: int, rng: np.random.Generator) -> np.ndarray:
    """Knots [classes, 16] of mean 0 and deviation 1."""
    knots = rng.normal(size=(classes, KNOTS))
    centred: np.ndarray = knots - knots.mean(1, keepdims=True)
    scaled: np.ndarray = centred / centred.std(1, keepdims=True)
    return scaled


def signals(
    knots: np.ndarray,
    labels: np.ndarray,
    rng: np.random.Generator,
    warp: Warp | None = None,
    noise: float = 0.5,
    slope: float = SLOPE,
) -> np.ndarray:
    """Records [N, 64], float32.

    Args:
        warp: time [64] in [0, 1] -> time, applied before stretch and shift.
        noise: correlation of neighbouring noise values, -1 to 1; its deviation is 0.4 whatever this is.
        slope: half the rise over the whole signal is uniform in [-slope, slope].
    """
    count = len(labels)
    time = np.linspace(0, 1, LENGTH)
    stretch = rng.uniform(1 - STRETCH, 1 + STRETCH, (count, 1))
    shift = rng.uniform(-SHIFT, SHIFT, (count, 1)) / LENGTH
    at = ((warp(time) if warp else time)[None] - 0.5 - shift) / stretch + 0.5
    values = _interpolate_knots(knots[labels], at) + rng.uniform(-slope, slope, (count, 1)) * np.linspace(-1, 1, LENGTH)
    return (values + NOISE * coloured(count, noise, rng)).astype(np.float32)


def coloured(count: int, correlation: float, rng: np.random.Generator) -> np.ndarray:
    """Noise [count, 64] of deviation 1 whose neighbours correlate (an AR(1) process)."""
    white = rng.normal(size=(count, LENGTH))
    found = white.copy()
    for place in range(1, LENGTH):
        # The root keeps the deviation at 1, whatever the correlation is.
        found[:, place] = correlation * found[:, place - 1] + np.sqrt(1 - correlation**2) * white[:, place]
    return found


def _interpolate_knots(knots: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Knots [N, 16] at times [N, 64], linear between them and 0 outside."""
    place = np.clip(at, 0, 1) * (KNOTS - 1)
    left = np.minimum(place.astype(np.int64), KNOTS - 2)
    part = place - left
    values: np.ndarray = np.take_along_axis(knots, left, 1) * (1 - part) + np.take_along_axis(knots, left + 1, 1) * part
    return np.where((at >= 0) & (at <= 1), values, 0.0)


def curves(classes: int, rng: np.random.Generator) -> np.ndarray:
    """Points [classes, 48, 2] on three joined or loose quadratic curves each, within [-1, 1]."""
    found = np.empty((classes, POINTS, 2))
    t = np.linspace(0, 1, POINTS // 3)[:, None]
    for number in range(classes):
        ends = rng.uniform(-0.9, 0.9, (3, 3, 2))
        for curve in range(1, 3):
            # A pen that mostly goes on where it is, and is sometimes lifted.
            if rng.random() < 0.7:
                ends[curve, 0] = ends[curve - 1, 2]
        found[number] = np.concatenate([(1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c for a, b, c in ends])
    return found


def drawings(points: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images [N, 8, 8] in [0, 1], float32."""
    count = len(labels)
    # 15 degrees, which leaves a drawing upright.
    angle = rng.uniform(-0.26, 0.26, count)
    size, shear = rng.uniform(0.75, 1.05, (count, 2)), rng.uniform(-0.3, 0.3, count)
    turn = np.stack([np.stack([np.cos(angle), -np.sin(angle)], -1), np.stack([np.sin(angle), np.cos(angle)], -1)], 1)
    lean = np.stack([np.stack([size[:, 0], shear], -1), np.stack([np.zeros(count), size[:, 1]], -1)], 1)
    placed = points[labels] @ (turn @ lean).transpose(0, 2, 1) + rng.uniform(-0.12, 0.12, (count, 1, 2))
    placed = placed.astype(np.float32)
    width = rng.uniform(0.1, 0.2, count)
    axis = np.linspace(-1.1, 1.1, FINE, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    ink = np.empty((count, FINE * FINE), dtype=np.float32)
    for row in range(count):
        # |p - q|^2 by products: a table of all differences would be FINE^2 x POINTS x 2 for every record.
        apart = ((grid**2).sum(1)[:, None] - 2 * grid @ placed[row].T + (placed[row] ** 2).sum(1)[None]).min(1)
        ink[row] = apart < width[row] ** 2
    blocks = FINE // SIDE
    grey: np.ndarray = ink.reshape(count, SIDE, blocks, SIDE, blocks).mean((2, 4))
    return grey
