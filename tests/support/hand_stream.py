"""A stream of gaussian clusters and its net, for benchmarks of continual learning."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedpeft.config import option
from fedpeft.continual.streams.base import Material, StreamSource
from fedpeft.data.encode import Encoded
from fedpeft.models.base import Base

CLASSES, WIDTH = 6, 8


class Net(nn.Module):
    """Two linear layers and a head; nothing is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.classifier = nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.classifier(self.two(torch.relu(self.one(x))))


class Hand(StreamSource):
    """Gaussian clusters, two classes a task; as a domain stream all classes in each of two domains."""

    name = "hand"
    summary = "gaussian clusters"

    @dataclass
    class Config:
        tasks: int = option(3, "tasks", low=1, high=CLASSES)

    def __init__(self, scenario="class", **options):
        super().__init__(**options)
        self.scenario, self.made = scenario, 0

    def records(self, seed):
        self.made += 1
        rng = np.random.default_rng([seed, 1])
        centres = 2 * rng.normal(size=(CLASSES, 5))
        parts = []
        for rows in (120, 60):
            labels = np.arange(rows) % CLASSES
            values = torch.tensor(centres[labels] + 0.5 * rng.normal(size=(rows, 5)), dtype=torch.float32)
            parts.append(Encoded({"x": values}, torch.from_numpy(labels)))
        net = Net()
        for number, value in enumerate(net.parameters()):
            draws = torch.Generator().manual_seed(number)
            value.requires_grad_(False).copy_(0.6 * torch.randn(value.shape, generator=draws))
        base = Base(
            net.eval(), lambda batch: net(batch["x"]), {"classifier": net.classifier}, None, "", "image-classification"
        )
        domains = tuple(np.arange(rows) // CLASSES % 2 for rows in (120, 60)) if self.scenario == "domain" else None
        return Material(*parts, base, ["two"], domains, ["even", "odd"])
