"""Small random adapters, alike and unlike in rank and scaling, and their dense changes."""

from __future__ import annotations

import numpy as np
import torch

from fedpeft.state import AdaptedLayer, AdapterState

SHAPES = {"u": (7, 9), "v": (6, 5)}


def adapter(seed, rank=2, scaling=2.0, shapes=SHAPES, dtype=torch.float64):
    random = np.random.default_rng(seed)
    tensors = {"out/weight": torch.tensor(random.standard_normal((2, 4)), dtype=dtype)}
    sites = {"out": AdaptedLayer("head", (2, 4))}
    for site, (m, n) in shapes.items():
        tensors[f"{site}/A"] = torch.tensor(random.standard_normal((rank, n)), dtype=dtype)
        tensors[f"{site}/B"] = torch.tensor(random.standard_normal((m, rank)), dtype=dtype)
        sites[site] = AdaptedLayer("lora", (m, n), scaling)
    return AdapterState(tensors, sites)


def change(state, site):
    B, A = (state[f"{site}/{role}"].double().numpy() for role in "BA")
    return state.sites[site].scaling * B @ A


def close(given, wanted, tolerance=1e-11):
    return np.linalg.norm(given - wanted) <= tolerance * max(1.0, np.linalg.norm(wanted))


UNLIKE = [adapter(0), adapter(1, rank=3, scaling=0.5), adapter(2, rank=1, scaling=4.0), adapter(3)]
ALIKE = [adapter(seed) for seed in range(4)]
