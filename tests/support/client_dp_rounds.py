"""Rounds of client-level privacy for tests: strategies, with noise or without, and replies of chosen size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpeft import registry
from fedpeft.config import PrivacyConfig, RunConfig
from fedpeft.state import AdaptedLayer, AdapterState, RunContext, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy
from fedpeft.strategies.wrappers.client_dp import ClientDP
from support import dense

INNER = ("fedit", "ffa_lora", "fedsvd", "rolora", "fed_sb")


class Silence:
    """Noise that is zero."""

    def uniform(self, count: int) -> np.ndarray:
        return np.zeros(count)

    def normal(self, count: int) -> np.ndarray:
        return np.zeros(count)


class Quiet(ClientDP):
    def randomness(self, purpose, number):
        return Silence()


def private(
    inner: str | FederatedStrategy = "fedit",
    population: int = 5,
    cls: type[ClientDP] = ClientDP,
    run: dict[str, Any] | None = None,
    ledger: Path | None = None,
    **privacy: Any,
) -> ClientDP:
    inside = registry.load("strategies", inner)() if isinstance(inner, str) else inner
    inside.context = RunContext(population=population, ledger=ledger)
    budget = {} if "epsilon" in privacy else {"noise_multiplier": 1.0}
    return cls(inside, PrivacyConfig(unit="client", **{**budget, **privacy}), RunConfig(**(run or {})))


def flat(adapter: AdapterState) -> np.ndarray:
    return np.concatenate([value.double().numpy().ravel() for value in adapter.tensors.values()])


def cohort(strategy, sizes, weights=None, seed=0):
    """A server in mid-run; the change of client k has norm sizes[k]."""
    kind = "lora_sb" if strategy.adapter == "lora_sb" else "lora"
    start = dense.drift(dense.fresh(kind=kind, seed=seed), ("B", "R", "head"), 99 + seed)
    server = ServerState(start)
    roles = strategy.uploads(server)
    updates = []
    for index, size in enumerate(sizes):
        moved = dense.drift(start, roles, 1000 * seed + index).select(roles)
        change = flat(moved) - flat(start.select(roles))
        scale = size / np.linalg.norm(change)
        tensors = {key: start[key] + scale * (value - start[key]) for key, value in moved.tensors.items()}
        weight = 1.0 if weights is None else weights[index]
        updates.append(Update(f"c{index}", weight, AdapterState(tensors, start.sites), {"train_loss": float(index)}))
    return server, updates


def ones(count: int) -> tuple[ServerState, list[Update]]:
    """Updates of norm 1."""
    zero = AdapterState({"h/w": torch.zeros(4).double()}, {"h": AdaptedLayer("head", (4,))})
    return ServerState(zero), [Update(f"c{k}", 1.0, zero.map(lambda value: value + 0.5)) for k in range(count)]
