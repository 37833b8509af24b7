"""A method of the registry needs more than its name to run: options, runs and adapters small enough for all."""

from __future__ import annotations

from typing import Any

import torch

from fedpeft import registry
from fedpeft.state import AdaptedLayer, AdapterState

TINY: dict[str, Any] = {
    "data.limit": 120,
    "data.clients": 4,
    "data.partition": "iid",
    "client.local_steps": 2,
    "client.local_epochs": None,
    "client.batch_size": 8,
    "client.lr": 0.01,
    "run.rounds": 3,
    "run.baselines": False,
}
NUMBERS = {"metrics_weighted": [0.4, 0.2, 0.1]}


def settings(name: str) -> dict[str, Any]:
    """What a strategy needs beside its name."""
    cls = registry.load("strategies", name)
    parts = cls() if cls.wraps else cls
    config: dict[str, Any] = {"strategy": name}
    if parts.adapter != "lora":
        config["adapter"] = parts.adapter
    if parts.keeps:
        config["data.holdout"] = 0.25
    if name == "scaffold":
        config["client.optimizer"] = "sgd"
    if name == "krum":
        config |= {"strategy.byzantine": 0, "strategy.keep": 2}
    if name == "trimmed_mean":
        config["strategy.fraction"] = 0.4  # one of three clients at each end
    return config


def adapter(slot, dtype=torch.float32):
    """Rank 2, in the first, second or third pair of axes of the input, so that orthogonal_adaptation takes it too."""
    generator = torch.Generator().manual_seed(slot)
    tensors = {"head/bias": torch.randn(3, generator=generator)}
    sites = {"head": AdaptedLayer("head", (3,))}
    for site, (m, n) in {"a.q": (5, 6), "a.v": (4, 7)}.items():
        tensors[f"{site}/A"] = torch.zeros(2, n)
        tensors[f"{site}/A"][:, 2 * slot : 2 * slot + 2] = torch.randn(2, 2, generator=generator)
        tensors[f"{site}/B"] = torch.randn(m, 2, generator=generator)
        sites[site] = AdaptedLayer("lora", (m, n), 2.0)
    return AdapterState({key: value.to(dtype) for key, value in tensors.items()}, sites)


MADE = [adapter(slot) for slot in range(3)]
