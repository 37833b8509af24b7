"""Small networks for the embedded streams, pre-trained on procedural classes that no stream has.

    f = LN(h_3),   h_0 = E x,   h_k = h_{k-1} + W2_k GELU(W1_k LN(h_{k-1}))        width 128, 64 inputs

Adapted are the second linear layers `W2_k` (`LAYERS`), the output projections of the residual blocks. Like a published
checkpoint a network is one for all runs: its seed is no seed of the run. A process trains it once, in a few seconds.

    >>> base = glyph_net("signals", classes=4)
    >>> base.forward({"signal": torch.zeros(2, 64)}).shape, sum(p.requires_grad for p in base.backbone.parameters())
    (torch.Size([2, 4]), 0)
"""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpeft import registry, seeds
from fedpeft.continual import procedural
from fedpeft.errors import InputError
from fedpeft.models.base import Base

INPUTS = {"signals": "signal", "drawings": "pixel_values"}  # what it was pre-trained on -> name of its input
LAYERS = ["fc2"]
WIDTH, BLOCKS = 128, 3
CLASSES, PER_CLASS, EPOCHS, BATCH, RATE = 60, 200, 8, 128, 3e-3


class Block(nn.Module):
    """A pre-LN residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return x + moved


class GlyphNet(nn.Module):
    """64 numbers (any shape) -> logits."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(procedural.LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.classifier = nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.norm(self.blocks(self.embedding(x.flatten(1)))))
        return logits


def glyph_net(kind: str, classes: int, seed: int = 0) -> Base:
    """A frozen copy of a pre-trained network, with a new head for `classes` classes.

    Args:
        kind: "signals" or "drawings".
        seed: of the pre-training; the same for all runs that are compared.
    """
    if kind not in INPUTS:
        raise InputError(registry.unknown("net", kind, INPUTS))
    # A copy: the cached net would keep the head of whoever asked first.
    net = copy.deepcopy(_load_pretrained(kind, seed))
    with torch.random.fork_rng(devices=[]):
        # Of the pre-training's seed, not of the run's: the network is one for all runs that are compared.
        torch.manual_seed(seeds.derive(seed, "head"))
        net.classifier = nn.Linear(WIDTH, classes)
    net.requires_grad_(False).eval()
    return Base(
        net,
        lambda batch: net(batch[INPUTS[kind]]),
        {"classifier": net.classifier},
        None,
        f"glyph-net-{kind}",
        "image-classification",
    )


@cache
def _load_pretrained(kind: str, seed: int) -> GlyphNet:
    rng = seeds.numpy_generator(seed, "net", kind)
    labels = np.repeat(np.arange(CLASSES), PER_CLASS)
    if kind == "signals":
        records = procedural.signals(procedural.templates(CLASSES, rng), labels, rng)
    else:
        records = procedural.drawings(procedural.curves(CLASSES, rng), labels, rng)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "net", kind, "start"))
        net = GlyphNet(CLASSES)
    train(net, torch.from_numpy(records), torch.from_numpy(labels), EPOCHS, BATCH, RATE, rng)
    return net


def train(
    net: nn.Module, x: Tensor, labels: Tensor, epochs: int, batch: int, rate: float, rng: np.random.Generator
) -> None:
    """Plain cross-entropy with AdamW, the rate going up and down once; on one thread, which is fastest for so small a
    net, and gives the same bits everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    for _ in range(epochs):
        order = torch.from_numpy(rng.permutation(len(x)))
        # Whole batches only: the schedule had to be told how many steps there are.
        for start in range(0, len(x) - batch + 1, batch):
            chosen = order[start : start + batch]
            loss = F.cross_entropy(net(x[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    torch.set_num_threads(threads)
