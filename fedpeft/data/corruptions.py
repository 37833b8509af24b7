"""Nine corruptions of grey images in five severities, for digits-C: functions of image, severity and generator.

>>> import numpy as np
>>> image = np.linspace(0, 1, 64).reshape(8, 8)
>>> bad = corrupt_image(image, "contrast", 5, np.random.default_rng(0))
>>> same = corrupt_image(image, "clean", 0, np.random.default_rng(0))
>>> bad.shape, bool(np.ptp(bad) < 0.2), bool((same == image).all())
((8, 8), True, True)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedpeft import registry
from fedpeft.errors import InputError

Draws = np.random.Generator
CLEAN = "clean"
SEVERITIES = 5


def gaussian(image: np.ndarray, level: int, draws: Draws) -> np.ndarray:
    """Independent Gaussian noise on every pixel, standard deviation 0.08 to 0.4."""
    return image + draws.normal(0, (0.08, 0.16, 0.24, 0.32, 0.4)[level], image.shape)


def shot(image: np.ndarray, level: int, draws: Draws) -> np.ndarray:
    """Poisson counts; the background has a little light of its own."""
    photons = (24, 12, 6, 4, 2.5)[level]
    return np.asarray(draws.poisson((image + 0.1) * photons) / photons - 0.1)


def impulse(image: np.ndarray, level: int, draws: Draws) -> np.ndarray:
    """Salt and pepper: 5 % to 32 % of the pixels become 0 or 1, each with probability 1/2."""
    hit = draws.random(image.shape) < (0.05, 0.1, 0.17, 0.24, 0.32)[level]
    return np.where(hit, (draws.random(image.shape) < 0.5).astype(float), image)


def blur(image: np.ndarray, level: int, draws: Draws) -> np.ndarray:
    """Gaussian blur, sigma 0.5 to 1.4 pixels, edges repeated."""
    return _blur_image(image, (0.5, 0.7, 0.9, 1.15, 1.4)[level])


def contrast(image: np.ndarray, level: int, draws: Draws) -> np.ndarray:
    """Distances to the image's mean shrink to 60 % to 12 %."""
    return np.asarray((image - image.mean()) * (0.6, 0.45, 0.3, 0.2, 0.12)[level] + image.mean())


def brightness(image: np.ndarray, level: int, draws: Draws) -> np.ndarray:
    """The same value, 0.1 to 0.65, on every pixel; `corrupt` cuts what passes 1."""
    return image + (0.1, 0.2, 0.35, 0.5, 0.65)[level]


def pixelate(image: np.ndarray, level: int, draws: Draws) -> np.ndarray:
    """Means of 2x2 blocks, mixed in ever more."""
    rows, columns = image.shape
    blocks = image[: rows // 2 * 2, : columns // 2 * 2].reshape(rows // 2, 2, columns // 2, 2).mean((1, 3))
    coarse = image.copy()
    coarse[: rows // 2 * 2, : columns // 2 * 2] = np.kron(blocks, np.ones((2, 2)))
    mixed = image + (0.4, 0.6, 0.8, 1.0, 1.0)[level] * (coarse - image)
    return _blur_image(mixed, 0.6) if level == 4 else np.asarray(mixed)


def fog(image: np.ndarray, level: int, draws: Draws) -> np.ndarray:
    """A smooth random veil over the image."""
    veil = _blur_image(draws.random(image.shape), 1.2)
    veil = (veil - veil.min()) / np.ptp(veil)
    share = (0.2, 0.35, 0.5, 0.6, 0.7)[level]
    return np.asarray((1 - share) * image + share * veil)


def scanline(image: np.ndarray, level: int, draws: Draws) -> np.ndarray:
    """Every second row lights up."""
    lines = np.zeros_like(image)
    lines[int(draws.integers(2)) :: 2] = 1
    return np.asarray(np.maximum(image, (0.2, 0.35, 0.5, 0.65, 0.8)[level] * lines))


CORRUPTIONS: dict[str, Callable[[np.ndarray, int, Draws], np.ndarray]] = {
    "gaussian": gaussian,
    "shot": shot,
    "impulse": impulse,
    "blur": blur,
    "contrast": contrast,
    "brightness": brightness,
    "pixelate": pixelate,
    "fog": fog,
    "scanline": scanline,
}


def corrupt_image(image: np.ndarray, name: str, severity: int, draws: Draws) -> np.ndarray:
    """An image [H, W] in [0, 1] under a corruption of severity 1 to 5; `clean` leaves it as it is.

    Raises:
        InputError: no such corruption or severity.
    """
    if name == CLEAN:
        return image
    if name not in CORRUPTIONS:
        raise InputError(registry.unknown("corruption", name, [*CORRUPTIONS, CLEAN]))
    if not 1 <= severity <= SEVERITIES:
        raise InputError(f"severity: {severity} is out of range; allowed: 1 to {SEVERITIES}.")
    return np.asarray(np.clip(CORRUPTIONS[name](image.astype(np.float64), severity - 1, draws), 0, 1))


def _blur_image(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur, edges repeated."""
    reach = int(np.ceil(3 * sigma))
    kernel = np.exp(-np.square(np.arange(-reach, reach + 1)) / (2 * sigma**2))
    kernel /= kernel.sum()
    padded = np.pad(image, reach, mode="edge")
    rows = sum(weight * padded[shift : shift + image.shape[0]] for shift, weight in enumerate(kernel))
    return np.asarray(sum(weight * rows[:, shift : shift + image.shape[1]] for shift, weight in enumerate(kernel)))
