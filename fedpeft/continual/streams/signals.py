"""Labelled 1-D signals for the glyph1d streams, and the six ways in which a domain changes them.

shear    slopes three times as steep          flip     sign changed
warp     time runs quadratically              noise    strongly correlated instead of nearly white
clip     values cut at +-0.7                  permute  eight segments in another order, the same for all records
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fedpeft import seeds
from fedpeft.continual import procedural
from fedpeft.data.encode import Encoded

SEGMENTS, CLIP = 8, 0.7
DOMAINS = ("shear", "warp", "flip", "noise", "clip", "permute")


def draw_signals(classes: int, count: int, seed: int, purpose: str, domain: str | None = None) -> Encoded:
    """`count` records of each class; the classes are those of the seed, whatever the purpose and the domain."""
    knots = procedural.templates(classes, seeds.numpy_generator(seed, "stream", "templates"))
    labels = np.repeat(np.arange(classes), count)
    rng = seeds.numpy_generator(seed, "stream", "records", purpose, domain or "plain")
    if domain == "shear":
        values = procedural.signals(knots, labels, rng, slope=3 * procedural.SLOPE)
    elif domain == "warp":
        values = procedural.signals(knots, labels, rng, warp=_bend_time)
    elif domain == "noise":
        values = procedural.signals(knots, labels, rng, noise=0.95)
    else:
        values = procedural.signals(knots, labels, rng)
        # After the noise, which is cut, turned and moved along with the signal.
        values = AFTER[domain](values, seed) if domain in AFTER else values
    return Encoded({"signal": torch.from_numpy(values.astype(np.float32))}, torch.from_numpy(labels))


def _bend_time(time: np.ndarray) -> np.ndarray:
    # From 0 to 1 and never back: time runs 0.4 times as fast at first, 1.6 times in the end.
    bent: np.ndarray = 0.4 * time + 0.6 * time**2
    return bent


def _permute_segments(values: np.ndarray, seed: int) -> np.ndarray:
    order = seeds.numpy_generator(seed, "stream", "segments").permutation(SEGMENTS)
    return values.reshape(len(values), SEGMENTS, -1)[:, order].reshape(len(values), -1)


AFTER: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "flip": lambda values, seed: -values,
    "clip": lambda values, seed: values.clip(-CLIP, CLIP),
    "permute": _permute_segments,
}
