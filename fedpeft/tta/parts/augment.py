"""Views of a batch, all drawn from one generator: one draw is shared by the whole batch (noise aside).

>>> import torch
>>> from fedpeft.tta.deployed import batch_size
>>> images = torch.rand(3, 1, 8, 8)
>>> view = augment_batch("image", images, torch.Generator().manual_seed(0))
>>> same = augment_batch("identity", images, torch.Generator())
>>> tuple(view.shape), bool(view.equal(images)), bool(same.equal(images))
((3, 1, 8, 8), False, True)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft.errors import InputError
from fedpeft.tta.deployed import Batch

KINDS = ("image", "image_flip", "small_image", "tokens", "identity")
SMALL = 0.3  # `small_image`: share of the geometry, for images of few pixels
DROP = 0.1  # share of tokens that a view of a text loses


def augment_batch(kind: str, batch: Batch, generator: torch.Generator) -> Batch:
    """One view of a batch.

    `image`, `image_flip` (also mirrored) and `small_image` (milder geometry) take the image tensor [N, C, H, W] and
    leave the rest of the batch as it is; `tokens` hides a tenth of the attended tokens of `input_ids` [N, T], never the
    first or the last.

    Raises:
        InputError: the batch has nothing of this kind.
    """
    if kind == "identity":
        return batch
    if kind == "tokens":
        return _drop_tokens(batch, generator)
    if isinstance(batch, Tensor):
        return _augment_image(batch, generator, kind)
    keys = [key for key, value in batch.items() if value.ndim == 4]
    if not keys:
        raise InputError(
            f"augment={kind}: the batch ({', '.join(batch)}) has no image tensor [N, C, H, W]. "
            f"Allowed: {', '.join(KINDS)}."
        )
    return {**batch, keys[0]: _augment_image(batch[keys[0]], generator, kind)}


def _augment_image(images: Tensor, generator: torch.Generator, kind: str) -> Tensor:
    """Gamma, contrast, brightness, rotation to 15 degrees, shift by 1/16, scale 0.9 to 1.1, blur, noise (and flip).

    Nothing is clipped: on inputs that a corruption pushed to one end of their range clipping would erase the rest.
    """
    if images.ndim != 4:
        raise InputError(f"augment: images must be [N, C, H, W], not {list(images.shape)}.")
    # As many draws for every kind, so that the next view does not hang on this one's.
    draw = torch.rand(9, generator=generator).tolist()
    noise = torch.randn(images.shape, generator=generator).to(images)
    low, span = images.min(), (images.max() - images.min()).clamp(min=1e-6)
    view = ((images - low) / span) ** _map_between(draw[2], 0.85, 1.15)
    mean = view.mean((1, 2, 3), keepdim=True)
    view = (view - mean) * _map_between(draw[0], 0.85, 1.15) + mean * _map_between(draw[1], 0.9, 1.1)
    size = SMALL if kind == "small_image" else 1.0
    angle, scale = size * math.radians(_map_between(draw[3], -15, 15)), 1 + size * _map_between(draw[4], -0.1, 0.1)
    shift = [size * _map_between(draw[axis], -0.125, 0.125) for axis in (5, 6)]  # of half the width: 1/16 of it all
    turn = torch.tensor(
        [
            [math.cos(angle) / scale, -math.sin(angle) / scale, shift[0]],
            [math.sin(angle) / scale, math.cos(angle) / scale, shift[1]],
        ]
    )
    grid = F.affine_grid(turn.expand(len(images), 2, 3).to(images), list(images.shape), align_corners=False)
    view = F.grid_sample(view, grid, padding_mode="border", align_corners=False)
    view = _blur_images(view, 0.001 + 0.5 * size * draw[7])  # a deviation of 0 is divided by
    if kind == "image_flip" and draw[8] < 0.5:
        view = view.flip(-1)
    return ((view + 0.005 * noise) * span + low).to(images)


def _blur_images(images: Tensor, sigma: float) -> Tensor:
    """Gaussian of three pixels a side."""
    side = math.exp(-0.5 / sigma**2)
    kernel = torch.tensor([side, 1.0, side]) / (1 + 2 * side)
    channels = images.shape[1]
    square = (kernel[:, None] * kernel[None]).to(images).expand(channels, 1, 3, 3)
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), square, groups=channels)


def _drop_tokens(batch: Batch, generator: torch.Generator) -> Batch:
    if isinstance(batch, Tensor) or "attention_mask" not in batch:
        raise InputError("augment=tokens: the batch must have input_ids and attention_mask.")
    mask = batch["attention_mask"]
    kept = (torch.rand(mask.shape, generator=generator) >= DROP).to(mask)
    # The ends stay: an encoder answers by its first token, a language model by what follows the last real one. Without
    # that one a view would ask for another word.
    kept[:, 0] = 1
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
    kept[torch.arange(len(mask), device=mask.device), last] = 1
    return {**batch, "attention_mask": mask * kept}


def _map_between(draw: float, low: float, high: float) -> float:
    return low + draw * (high - low)
