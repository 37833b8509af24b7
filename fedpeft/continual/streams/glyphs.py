"""Letters and digits in display fonts, 36 real classes, on a ViT pre-trained on text fonts: a shift of style.

The prepared `glyphs` have some 460 display fonts (package fonts-aenigma) and 80 text fonts. A small ViT is pre-trained
on the text fonts once, with random affine maps, and cached beside the data. The stream has display fonts only, other
ones in training and test. No font is known to the ViT, all classes are, as ImageNet-R's classes are to an ImageNet
model: what is hard is the style. Lower and upper case are one class, as size is normalised away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpeft import seeds
from fedpeft.config import DataConfig, option
from fedpeft.continual.streams import cache
from fedpeft.continual.streams.base import Material, StreamSource, per_class
from fedpeft.data import source
from fedpeft.data.encode import encode
from fedpeft.data.records import Records
from fedpeft.models.base import Base

CLASSES, TASK, LAYERS = 36, "image-classification", ["q_proj", "v_proj"]
DISPLAY = "fonts-aenigma"
SHAPE = {
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 1,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 192,
}
EPOCHS, BATCH, RATE = 30, 64, 2e-3
VERSION = 1  # of the pre-training: cached weights of another one are not read


class Glyphs(StreamSource):
    """Rendered characters 32x32; needs the prepared `glyphs`."""

    name = "glyphs"
    summary = "characters in display fonts, 36 classes in 12 tasks, ViT pre-trained on text fonts"

    @dataclass
    class Config:
        tasks: int = option(12, "tasks that the classes are cut into", low=1, high=CLASSES)
        train: int = option(120, "training records a class, at most", low=2)
        test: int = option(50, "test records a class, at most", low=1)

    def records(self, seed: int) -> Material:
        whole, weights = read_characters()
        chosen = []
        for which, part in zip(("train", "test"), map(take_display_fonts, whole), strict=True):
            places = per_class(part.labels, getattr(self.config, which), seed, which)
            # No processor and no length: images go in as they are.
            chosen.append(encode(part.take(places), None, TASK, 1))
        return Material(chosen[0], chosen[1], make_base(weights), LAYERS, label_names=whole[0].label_names)


def read_characters() -> tuple[tuple[Records, Records], dict[str, Tensor]]:
    """Training and test characters in all fonts, and the weights of the ViT that was pre-trained on text fonts.

    Raises:
        InputError: `glyphs` is not prepared.
    """
    cache.about("glyphs")
    whole = source.load(DataConfig(source="glyphs"), TASK, 0)
    settings = {**SHAPE, "epochs": EPOCHS, "batch": BATCH, "rate": RATE, "version": VERSION}
    return whole, cache.tensors("vit", "glyphs", settings, lambda: pretrain(text_fonts(whole)))


def take_display_fonts(part: Records) -> Records:
    """The characters whose fonts the ViT has not seen."""
    return part.take(np.flatnonzero(part.columns["package"] == DISPLAY))


def text_fonts(parts: tuple[Records, Records]) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 32, 32] and labels of all fonts that the stream does not have."""
    other = [encode(part.take(np.flatnonzero(part.columns["package"] != DISPLAY)), None, TASK, 1) for part in parts]
    return torch.cat([part.inputs["pixel_values"] for part in other]), torch.cat([part.labels for part in other])


def pretrain(data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Weights of the ViT after EPOCHS passes, every image under a new affine map each time."""
    images, labels = data
    rng = seeds.numpy_generator(0, "glyphs", "pretrain")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(0, "glyphs", "start"))
        model = _build_vit()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.from_numpy(rng.permutation(len(images)))
        for start in range(0, len(images) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            logits = model(pixel_values=moved(images[chosen], rng)).logits
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[chosen], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def moved(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Images [N, 1, S, S] rotated by up to 15 degrees, stretched, sheared, shifted by up to 2 pixels, inked anew."""
    count = len(images)
    angle, shear = rng.uniform(-0.26, 0.26, count), rng.uniform(-0.3, 0.3, count)
    width, height = np.exp(rng.uniform(-0.3, 0.3, (2, count)))
    maps = np.empty((count, 2, 3))
    maps[:, 0, 0], maps[:, 0, 1] = np.cos(angle) * width, (shear - np.sin(angle)) * height
    maps[:, 1, 0], maps[:, 1, 1] = np.sin(angle) * width, np.cos(angle) * height
    maps[:, :, 2] = rng.uniform(-0.125, 0.125, (count, 2))
    grid = F.affine_grid(torch.from_numpy(maps.astype(np.float32)), list(images.shape), align_corners=False)
    found = F.grid_sample(images, grid, align_corners=False)
    ink = torch.from_numpy(rng.uniform(0.6, 1.6, (count, 1, 1, 1)).astype(np.float32))
    return found.clamp(0, 1) ** ink


def _build_vit() -> Any:
    import transformers

    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**SHAPE, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )


def make_base(weights: dict[str, Tensor]) -> Base:
    """The ViT of these weights with its head, frozen."""
    model = _build_vit()
    model.load_state_dict(weights)
    model.requires_grad_(False).eval()
    head: nn.Module = model.classifier
    return Base(model, lambda batch: model(**batch).logits, {"classifier": head}, None, "glyphs-vit", TASK)
