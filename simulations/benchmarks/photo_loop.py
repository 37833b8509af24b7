"""Passes over a folder of photos as one writes it with other libraries: `datasets`, torch's DataLoader, an image
processor of transformers, LoRA of peft, AdamW. Nothing of fedpeft is in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification

LABELS = 4


def train(
    model: str,
    source: str,
    cache: str,
    batch: int,
    passes: int,
    lr: float,
    lora: dict[str, Any],
    done: Callable[[], None],
) -> None:
    """Train on every photo once a pass, in one thread; the order is drawn.

    Args:
        model: folder of the model and its image processor.
        source: folder of photos in folders of their labels.
        cache: folder for what `datasets` keeps.
        lora: its rank and alpha.
        done: is called after every pass.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    processor = AutoImageProcessor.from_pretrained(model)
    photos = datasets.load_dataset("imagefolder", data_dir=source, split="train", cache_dir=cache)

    def processed(rows: dict[str, list[Any]]) -> dict[str, Any]:
        pixels = processor([photo.convert("RGB") for photo in rows["image"]], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": rows["label"]}

    base = AutoModelForImageClassification.from_pretrained(model, num_labels=LABELS)
    config = LoraConfig(
        r=lora["r"],
        lora_alpha=lora["alpha"],
        target_modules=["query", "value", "q_proj", "v_proj"],
        modules_to_save=["classifier"],
    )
    local = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([value for value in local.parameters() if value.requires_grad], lr=lr)
    for _ in range(passes):
        for rows in DataLoader(photos.with_transform(processed), batch_size=batch, shuffle=True):
            optimizer.zero_grad()
            local(**rows).loss.backward()
            optimizer.step()
        done()
