"""The two source models of digits-C, made from a seed: a small convolutional network with batch norms, and the shipped
tiny-vit (layer norms) fine-tuned for a moment."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpeft import registry, seeds
from fedpeft.config import ModelConfig
from fedpeft.data.drift import split_digits, thin_classes
from fedpeft.data.encode import Encoded, encode
from fedpeft.errors import InputError
from fedpeft.models.loading import load
from fedpeft.tta.deployed import Deployed, deploy

MODELS = ("cnn", "vit")
CLASSES = 10
EPOCHS, RATE, ROWS = {"cnn": 25, "vit": 12}, {"cnn": 2e-3, "vit": 1e-3}, 64


class SmallConv(nn.Module):
    """Three convolutions with batch norms for images [N, 1, 8, 8]; 15.6 thousand weights."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())
                for before, after in ((1, 16), (16, 32), (32, 32))
            )
        )
        self.head = nn.Linear(128, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = pixel_values
        for number, block in enumerate(self.blocks):
            hidden = block(hidden) if number == 0 else F.max_pool2d(block(hidden), 2)
        logits: Tensor = self.head(hidden.flatten(1))
        return logits


def source_data(imbalance: float = 1.0) -> Encoded:
    """The 1,000 training digits; with `imbalance` > 1 class 0 has that many times the records of class 9."""
    train = split_digits()[0]
    if imbalance > 1:
        train = train.take(thin_classes(train.labels, "forward", imbalance))
    return encode(train, None, "image-classification", 1)


def source_model(name: str, seed: int = 0, imbalance: float = 1.0, epochs: int | None = None) -> Deployed:
    """`cnn` or `vit`, trained on `source_data(imbalance)`; the same weights for the same arguments.

    Raises:
        InputError: no such model.
    """
    if name not in MODELS:
        raise InputError(registry.unknown("source model", name, MODELS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "digits-c", name))
        module = SmallConv() if name == "cnn" else load(ModelConfig(), CLASSES, seed).backbone
        train(module, source_data(imbalance), epochs or EPOCHS[name], RATE[name], seed)
    return deploy(module, head="head" if name == "cnn" else "classifier")


def train(module: nn.Module, data: Encoded, epochs: int, rate: float, seed: int) -> None:
    """Adam with a rate that falls linearly to 0; leaves the module frozen, in evaluation mode."""
    module.requires_grad_(True).train()
    optimizer = torch.optim.Adam(module.parameters(), rate)
    orders = [seeds.numpy_generator(seed, "digits-c", "epoch", epoch).permutation(len(data)) for epoch in range(epochs)]
    chunks = [rows for order in orders for rows in np.split(order, range(ROWS, len(order), ROWS)) if len(rows) > 1]
    for number, rows in enumerate(chunks):
        optimizer.param_groups[0]["lr"] = rate * (1 - number / len(chunks))
        inputs, labels = data.batch(rows)
        out = module(**inputs)
        loss = F.cross_entropy(getattr(out, "logits", out), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module.requires_grad_(False).eval()
