"""Passes over a folder of photos as one writes it with other libraries: `datasets`, torch's DataLoader, an image
processor of transformers, LoRA of peft, AdamW. Nothing of fedpeft is in it but the change of photos, where they are to
be changed, as the work is to be the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification

LABELS = 4


Processed = Callable[[dict[str, list[Any]]], dict[str, Any]]


def train(
    model: str,
    source: str,
    cache: str,
    batch: int,
    passes: int,
    lr: float,
    lora: dict[str, Any],
    augment: list[str],
    done: Callable[[], None],
) -> tuple[Any, Processed]:
    """Train on every photo once a pass, in one thread; the order is drawn.

    Args:
        model: folder of the model and its image processor.
        source: folder of photos in folders of their labels.
        cache: folder for what `datasets` keeps.
        lora: its rank and alpha.
        augment: how photos are changed.
        done: is called after every pass.

    Returns:
        The trained model, and what makes its inputs of unchanged photos.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    processor = AutoImageProcessor.from_pretrained(model)
    draws = np.random.default_rng(0)

    def processed(rows: dict[str, list[Any]]) -> dict[str, Any]:
        photos = [photo if isinstance(photo, np.ndarray) else photo.convert("RGB") for photo in rows["image"]]
        return {"pixel_values": processor(photos, return_tensors="pt")["pixel_values"], "labels": rows["label"]}

    def changed(rows: dict[str, list[Any]]) -> dict[str, Any]:
        from fedpeft.data.augment import augment as change

        photos = [change(np.asarray(photo.convert("RGB")), augment, draws) for photo in rows["image"]]
        return processed({**rows, "image": photos})

    base = AutoModelForImageClassification.from_pretrained(model, num_labels=LABELS)
    config = LoraConfig(
        r=lora["r"],
        lora_alpha=lora["alpha"],
        target_modules=["query", "value", "q_proj", "v_proj"],
        modules_to_save=["classifier"],
    )
    local = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([value for value in local.parameters() if value.requires_grad], lr=lr)
    photos = _read(source, cache).with_transform(changed if augment else processed)
    for _ in range(passes):
        for rows in DataLoader(photos, batch_size=batch, shuffle=True):
            optimizer.zero_grad()
            local(**rows).loss.backward()
            optimizer.step()
        done()
    return local, processed


def accuracy(local: Any, processed: Processed, source: str, cache: str, batch: int) -> float:
    """The share of a folder's photos whose label a trained model gives."""
    local.eval()
    right = count = 0
    with torch.no_grad():
        for rows in DataLoader(_read(source, cache).with_transform(processed), batch_size=batch):
            labels = rows.pop("labels")
            right, count = right + int((local(**rows).logits.argmax(1) == labels).sum()), count + len(labels)
    return right / count


def _read(source: str, cache: str) -> Any:
    return datasets.load_dataset("imagefolder", data_dir=source, split="train", cache_dir=cache)
