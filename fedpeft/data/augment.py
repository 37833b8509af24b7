"""Pictures made different at every round: a crop, a mirror image, other colours; for training alone.

>>> image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
>>> other = augment(image, ["crop", "flip", "colour"], np.random.default_rng(0))
>>> other.shape == image.shape, other.dtype, bool((other == image).all())
(True, dtype('uint8'), False)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

AREA, RATIO, COLOUR = (0.4, 1.0), (3 / 4, 4 / 3), (0.6, 1.4)


def augment(image: np.ndarray, names: Sequence[str], draws: np.random.Generator) -> np.ndarray:
    """A picture [H, W, C] changed at random; shape and type stay.

    crop: a rectangle of 40 % to 100 % of the area and of 3/4 to 4/3 of the shape, brought to the picture's size.
    flip: left and right are swapped, half the time. colour: brightness, contrast and, of colours, saturation times 0.6
    to 1.4 each.
    """
    scale = 255 if image.dtype == np.uint8 else 1
    pixels = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1) / scale
    # Drawn whether asked for or not: what one does must not hang on the others.
    area, shape, *places = draws.uniform(size=4)
    mirrored, factors = draws.uniform() < 0.5, draws.uniform(*COLOUR, size=3)
    if "crop" in names:
        pixels = _crop_pixels(pixels, area, shape, places)
    if "flip" in names and mirrored:
        pixels = pixels.flip(2)
    if "colour" in names:
        pixels = _jitter_colours(pixels, factors)
    changed = (pixels.clamp(0, 1) * scale).permute(1, 2, 0).numpy()
    return changed.round().astype(np.uint8) if image.dtype == np.uint8 else changed


def _crop_pixels(pixels: Tensor, area: float, shape: float, places: Sequence[float]) -> Tensor:
    height, width = pixels.shape[1:]
    part = AREA[0] + area * (AREA[1] - AREA[0])
    ratio = math.exp(math.log(RATIO[0]) + shape * math.log(RATIO[1] / RATIO[0]))
    rows = min(height, max(1, round(height * math.sqrt(part / ratio))))
    columns = min(width, max(1, round(width * math.sqrt(part * ratio))))
    top, left = (int(place * (room + 1)) for place, room in zip(places, (height - rows, width - columns), strict=True))
    piece = pixels[None, :, top : top + rows, left : left + columns]
    found: Tensor = F.interpolate(piece, (height, width), mode="bilinear", antialias=True)[0]
    return found


def _jitter_colours(pixels: Tensor, factors: np.ndarray) -> Tensor:
    brightness, contrast, saturation = factors.tolist()
    pixels = (pixels * brightness).clamp(0, 1)
    pixels = ((pixels - pixels.mean()) * contrast + pixels.mean()).clamp(0, 1)
    grey = pixels.mean(0, keepdim=True)
    mixed: Tensor = grey + (pixels - grey) * saturation
    return mixed
