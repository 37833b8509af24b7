"""Records as tensors: texts tokenized and padded on the right, images as float32 [N, C, H, W].

>>> import numpy as np
>>> from fedpeft.data.source import Records
>>> images = np.full((2, 4, 4, 1), 255, dtype=np.uint8)
>>> data = encode(Records(images, np.array([0, 1]), ["a", "b"], {}, "image"), None, "image-classification", 128)
>>> inputs, labels = data.batch(np.array([1]))
>>> tuple(inputs["pixel_values"].shape), float(inputs["pixel_values"].max()), labels.tolist()
((1, 1, 4, 4), 1.0, [1])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft.data.source import Records
from fedpeft.errors import InputError

IGNORE = -100
CHUNK = 256


@dataclass(frozen=True)
class Encoded:
    """Model inputs by name, each [N, ...], and labels.

    `labels` is int64 [N]; for causal-lm [N, T], the input ids with IGNORE at the padding.
    """

    inputs: dict[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> Encoded:
        """The records with these numbers, in this order."""
        index = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        return Encoded({name: value[index] for name, value in self.inputs.items()}, self.labels[index])

    def batch(self, indices: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs and labels of these records; texts are cut to the longest of them."""
        chosen = self.subset(indices)
        mask = chosen.inputs.get("attention_mask")
        if mask is None:
            return chosen.inputs, chosen.labels
        longest = max(1, int(mask.sum(1).max()))
        labels = chosen.labels[:, :longest] if chosen.labels.ndim == 2 else chosen.labels
        return {name: value[:, :longest] for name, value in chosen.inputs.items()}, labels


def encode(records: Records, processor: Any, task: str, max_length: int) -> Encoded:
    """All records as tensors.

    Args:
        processor: a transformers tokenizer for texts; an image processor, or None for images that go in as they are
            (uint8 scaled to [0, 1]).
        max_length: longest text in tokens; longer ones lose their end.

    Raises:
        InputError: the records are of a kind that the task or the processor does not take.
    """
    if (records.kind == "image") != (task == "image-classification"):
        raise InputError(f"model.task={task} does not take {records.kind}s.")
    if records.kind == "image":
        images = np.asarray(records.inputs)
        pixels = _plain(images) if processor is None else _processed(images, processor)
        return Encoded({"pixel_values": pixels}, torch.from_numpy(records.labels))
    if processor is None:
        raise InputError(f"model.task={task}: the model has no tokenizer.")
    tokens = processor(
        list(records.inputs),
        padding=True,
        truncation=True,
        max_length=max_length,
        padding_side="right",
        return_tensors="pt",
    )
    inputs = {name: tokens[name] for name in processor.model_input_names if name in tokens}
    if task == "causal-lm":
        return Encoded(inputs, inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE))
    return Encoded(inputs, torch.from_numpy(records.labels))


def _plain(images: np.ndarray) -> Tensor:
    scaled = images.astype(np.float32) / 255 if images.dtype == np.uint8 else images.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))


def _processed(images: np.ndarray, processor: Any) -> Tensor:
    """Through a transformers image processor; grey images get as many channels as it normalises."""
    channels = (
        len(processor.image_mean)
        if isinstance(getattr(processor, "image_mean", None), list | tuple)
        else images.shape[3]
    )
    if images.shape[3] == 1 and channels > 1:
        images = np.repeat(images, channels, axis=3)
    scaling = {} if images.dtype == np.uint8 else {"do_rescale": False}
    done = [
        processor(
            list(images[start : start + CHUNK]), return_tensors="pt", input_data_format="channels_last", **scaling
        )["pixel_values"]
        for start in range(0, len(images), CHUNK)
    ]
    return torch.cat(done).float()
