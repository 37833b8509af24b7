"""Source models of the real streams, made from a seed: a convolution network with batch norms, and a sentence encoder
with a linear head on its mean-pooled features, LoRA-tuned or head only.

What was trained is saved and read again; steps, rates and widths were fixed before any stream was looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpeft import files, registry, seeds
from fedpeft.adapters.adapted import Adapted, build
from fedpeft.config import AdapterConfig, ModelConfig
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from fedpeft.models import loading
from fedpeft.models.base import Base
from fedpeft.simulations.benchmarks import digits_c
from fedpeft.tta.deployed import Deployed, deploy

WIDTHS = (32, 64, 128)
IMAGE_EPOCHS, IMAGE_RATE = 10, 2e-3
TEXT_EPOCHS, TEXT_RATE, TEXT_ROWS, RANK = 2, 1e-3, 16, 8
HEAD_EPOCHS, HEAD_RATE = 20, 1e-2


class ConvNet(nn.Module):
    """Three convolutions with batch norms, each halving the image [N, 1, S, S], and a linear head."""

    def __init__(self, side: int, classes: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2))
                for before, after in zip((1, *WIDTHS), WIDTHS, strict=False)
            )
        )
        self.head = nn.Linear(WIDTHS[-1] * (side // 2 ** len(WIDTHS)) ** 2, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(pixel_values).flatten(1))
        return logits


def image_model(data: Encoded, classes: int, seed: int, path: Path, epochs: int = IMAGE_EPOCHS) -> Deployed:
    """`cnn`: all of it trained on `data`; read from `path` where that has been done."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "bench", "tta", "cnn"))
        module = ConvNet(data.inputs["pixel_values"].shape[-1], classes)
        if not path.exists():
            digits_c.train(module, data, epochs, IMAGE_RATE, seed)
            files.write_tensors(path, module.state_dict())
    module.load_state_dict(_read(path))
    module.requires_grad_(False).eval()
    return deploy(module, head="head")


def text_model(
    kind: str, encoder: str, data: Encoded, classes: int, seed: int, path: Path, tokens: int, epochs: int = TEXT_EPOCHS
) -> Deployed:
    """`lora`: adapter and head trained on `data`, `head`: the head only; dropout stays off.

    Raises:
        InputError: another kind, or an encoder that is not prepared.
    """
    if kind not in ("lora", "head"):
        raise InputError(registry.unknown("--models", kind, ("lora", "head")))
    config = ModelConfig(name=encoder, task="sequence-classification", pooling="mean", max_length=tokens)
    model: Adapted | Base
    if kind == "lora":
        model = build(config, AdapterConfig(r=RANK, alpha=2.0 * RANK), classes, seed)
        trained = model.train_roles(("A", "B", "weight", "bias"))
        work = Work(model.logits, data, epochs, TEXT_RATE)
    else:
        model = loading.load(config, classes, seed)
        head = model.heads["classifier"]
        trained = dict(head.named_parameters())
        work = Work(lambda batch: head(batch["features"]), data, HEAD_EPOCHS, HEAD_RATE)
    if path.exists():
        found = _read(path)
        for name, value in trained.items():
            value.data.copy_(found[name])
    else:
        fit(trained, work if kind == "lora" else replace(work, data=_features(deploy(model), data)), seed)
        files.write_tensors(path, dict(trained))
    for value in trained.values():
        value.requires_grad_(False)
    return deploy(model)


@dataclass(frozen=True)
class Work:
    """What is trained how long."""

    forward: Callable[[dict[str, Tensor]], Tensor]
    data: Encoded
    epochs: int
    rate: float


def fit(trained: dict[str, nn.Parameter], work: Work, seed: int) -> None:
    """Adam on the mean cross entropy with a rate that falls linearly to 0."""
    for value in trained.values():
        value.requires_grad_(True)
    optimizer = torch.optim.Adam(trained.values(), work.rate)
    orders = [
        seeds.numpy_generator(seed, "bench", "tta", "epoch", epoch).permutation(len(work.data))
        for epoch in range(work.epochs)
    ]
    chunks = [rows for order in orders for rows in np.split(order, range(TEXT_ROWS, len(order), TEXT_ROWS))]
    for number, rows in enumerate(chunks):
        optimizer.param_groups[0]["lr"] = work.rate * (1 - number / len(chunks))
        inputs, labels = work.data.batch(rows)
        optimizer.zero_grad()
        F.cross_entropy(work.forward(inputs), labels).backward()
        optimizer.step()


def fingerprint(model: Deployed) -> str:
    """sha256 of all tensors of a deployed model, buffers included."""
    digest = hashlib.sha256()
    for name, part in model.modules.items():
        for key, value in [*part._parameters.items(), *part._buffers.items()]:
            if value is not None:
                digest.update(f"{name}.{key}{tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def parameters(model: Deployed) -> int:
    """Numbers in a model's parameters."""
    return sum(model.tensor(name).numel() for name in model.slots)


def _features(model: Deployed, data: Encoded) -> Encoded:
    """What enters the head, once for all epochs."""
    chunks = np.split(np.arange(len(data)), range(64, len(data), 64))
    with torch.no_grad():
        found = [model(data.batch(rows)[0])[1] for rows in chunks]
    return Encoded({"features": torch.cat([part for part in found if part is not None])}, data.labels)


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)
