"""Pictures as a model takes them: float32 [N, C, H, W], through its processor; decoded batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft import seeds
from fedpeft.data.augment import augment
from fedpeft.data.stored import choose_rows
from fedpeft.errors import InputError

TOGETHER = 2**25  # bytes of pictures that a processor is given at once
FEW = 2**26  # bytes of pixels up to which a whole set is made once and kept: a pass over it is then no decoding


class Images:
    """Pictures that lie encoded or as arrays, and become pixels when a batch asks for them.

    Args:
        pictures: [N, H, W, C], or N of [H, W, C].
        processor: an image processor; None where they go in as they are.
        labels: int64 [N].
        augment: what is done to pictures that are trained on.
    """

    def __init__(self, pictures: Any, processor: Any, labels: Tensor, augment: Sequence[str] = ()) -> None:
        self.pictures, self.processor, self.labels, self.augment = pictures, processor, labels, tuple(augment)
        require_one_size(pictures, processor)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.ones(len(self), dtype=np.int64)

    @cached_property
    def teaches(self) -> np.ndarray:
        return np.ones(len(self), dtype=bool)

    @cached_property
    def form(self) -> Tensor:
        """Pixels of no picture [0, C, H, W]."""
        return encode_images(self.pictures[:1], self.processor)[:0]

    @cached_property
    def ready(self) -> Tensor | None:
        """All pixels, where they are few."""
        few = len(self) * int(np.prod(self.form.shape[1:])) * 4 <= FEW
        return encode_images(self.pictures, self.processor) if few else None

    def inputs_of(self, rows: np.ndarray | None) -> dict[str, Tensor]:
        if rows is not None and not len(rows):
            return {"pixel_values": self.form.clone()}
        if self.ready is not None:
            return {"pixel_values": choose_rows(self.ready, rows)}
        places = range(len(self)) if rows is None else rows.tolist()
        return {"pixel_values": self._make_pixels((self.pictures[place] for place in places), len(places))}

    def labels_of(self, rows: np.ndarray | None) -> Tensor:
        return choose_rows(self.labels, rows)

    def augmented(self, rows: np.ndarray, seed: int) -> dict[str, Tensor]:
        """As `inputs_of`, each picture changed by its number and the seed."""
        if not len(rows):
            return {"pixel_values": self.form.clone()}
        changed = (
            augment(self.pictures[row], self.augment, seeds.numpy_generator(seed, "augment", row))
            for row in rows.tolist()
        )
        return {"pixel_values": self._make_pixels(changed, len(rows))}

    def _make_pixels(self, pictures: Iterable[np.ndarray], count: int) -> Tensor:
        """Of pictures that are made one by one."""
        return (
            _to_plain_tensor(list(pictures))
            if self.processor is None
            else _process_images(pictures, count, self.processor)
        )


def require_one_size(pictures: Any, processor: Any) -> None:
    """Raise InputError where pictures differ in size and nothing brings them to one."""
    if isinstance(pictures, np.ndarray) or not len(pictures) or getattr(pictures, "uniform", False):
        return
    first = pictures[0]
    other = next((number for number in range(1, len(pictures)) if pictures[number].shape != first.shape), None)
    if other is None:
        return
    if processor is None:
        _to_plain_tensor([first] * other + [pictures[other]])
    _process_images([first, pictures[other]], 2, processor)


def encode_images(images: Any, processor: Any) -> Tensor:
    """Pixels float32 [N, C, H, W] of images [N, H, W, C], or of a sequence of images that differ in size."""
    if processor is None:
        return _to_plain_tensor(images if isinstance(images, np.ndarray) else list(images))
    return _process_images(images, len(images), processor)


def _to_plain_tensor(images: Any) -> Tensor:
    if not isinstance(images, np.ndarray) and len({image.shape for image in images}) > 1:
        first, number = images[0], next(n for n, image in enumerate(images, 1) if image.shape != images[0].shape)
        other = images[number - 1]
        raise InputError(
            f"images differ in size: record 1 is {first.shape[1]}x{first.shape[0]}, record {number} is "
            f"{other.shape[1]}x{other.shape[0]}, and the model has no image processor that brings them to one. Resize "
            "them, or take a model with a processor."
        )
    images = np.asarray(images)
    scaled = images.astype(np.float32) / 255 if images.dtype == np.uint8 else images.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))


def _process_images(images: Iterable[np.ndarray], count: int, processor: Any) -> Tensor:
    """Through a transformers image processor; what becomes of a picture must not hang on the others of its batch. Grey
    images get as many channels as it normalises.
    """
    pixels: Tensor | None = None
    for places, alike in _group_alike(images, processor):
        found = _process_together(alike, processor)
        if len(places) == count:
            return found
        if pixels is None:
            pixels = torch.empty(count, *found.shape[1:])
        _require_one({tuple(pixels.shape[1:]), tuple(found.shape[1:])})
        for place, each in zip(places, found, strict=True):
            pixels[place] = each
    assert pixels is not None
    return pixels


def _group_alike(images: Iterable[np.ndarray], processor: Any) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """Images with their places, of some neighbours at a time, as few are to be in memory at once: of one size, or of
    any where the processor is known to take each by itself.
    """
    groups: dict[Any, tuple[list[int], list[np.ndarray]]] = {}
    size = 0
    for place, image in enumerate(images):
        places, alike = groups.setdefault(image.shape if _values_for(image, processor) is None else None, ([], []))
        places.append(place)
        alike.append(image)
        size += image.nbytes
        if size >= TOGETHER:
            yield from groups.values()
            groups, size = {}, 0
    yield from groups.values()


def _process_together(images: list[np.ndarray], processor: Any) -> Tensor:
    """Pixels of images that go through together."""
    first = images[0]
    values, channels = _values_for(first, processor), _count_channels(first, processor)
    if first.shape[2] < channels:
        images = [np.repeat(image, channels, axis=2) for image in images]
    form = {"input_data_format": "channels_last"}
    if values is not None:
        found = processor(images, do_rescale=False, do_normalize=False, **form)["pixel_values"]
        _require_one({image.shape for image in found})
        return _looked_up(values, found)
    scaling = {} if first.dtype == np.uint8 else {"do_rescale": False}
    pixels: Tensor = processor(images, return_tensors="pt", **form, **scaling)["pixel_values"]
    return pixels.float()


def _require_one(sizes: set[tuple[int, ...]]) -> None:
    if len(sizes) > 1:
        raise InputError(f"the model's image processor does not bring images to one size: {sorted(sizes)[:3]}.")


def _count_channels(image: np.ndarray, processor: Any) -> int:
    """Of an image as it goes in: grey ones get as many as are normalised."""
    mean = getattr(processor, "image_mean", None)
    return len(mean) if image.shape[2] == 1 and isinstance(mean, list | tuple) else image.shape[2]


def _values_for(image: np.ndarray, processor: Any) -> np.ndarray | None:
    """`values_of` for such an image."""
    return values_of(processor, _count_channels(image, processor)) if image.dtype == np.uint8 else None


@lru_cache(maxsize=8)
def values_of(processor: Any, channels: int) -> np.ndarray | None:
    """What a processor makes of each value 0 to 255 of each channel, float32 [C, 256]; None where it is not known to
    end in that and nothing else. It takes some five passes over every picture, in float64; looking up takes one.
    """
    try:
        from transformers.image_processing_backends import PilBackend
    except ImportError:  # older ones
        return None
    steps = ("__call__", "preprocess", "_preprocess_image_like_inputs", "_preprocess", "rescale", "normalize")
    plain = isinstance(processor, PilBackend) and all(
        getattr(type(processor), name) is getattr(PilBackend, name) for name in steps
    )
    if not plain or processor.do_pad:
        return None
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(channels, axis=2)
    form = {"input_data_format": "channels_last", "do_resize": False, "do_center_crop": False}
    values = np.array(processor([every], **form)["pixel_values"], dtype=np.float32)
    return values.reshape(channels, 256)


def _looked_up(values: np.ndarray, images: list[np.ndarray]) -> Tensor:
    """Pixels of images [C, H, W], uint8."""
    pixels = np.empty((len(images), *images[0].shape), dtype=np.float32)
    for made, image in zip(pixels, images, strict=True):
        for of_channel, row, channel in zip(values, made, image, strict=True):
            of_channel.take(channel, out=row, mode="clip")  # without a check, as there is none of 256 values to be made
    return torch.from_numpy(pixels)
