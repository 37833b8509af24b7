"""Hand-made adapters, updates and references that the strategy tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from fedpeft.state import AdaptedLayer, AdapterState, RunContext, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy
from fedpeft.strategies.build import make_named

M, N, R, S = 7, 9, 3, 2.0
SITES = {"q": AdaptedLayer("lora", (M, N), S), "head": AdaptedLayer("head", (2,))}
RULES = (
    "fedit",
    "ffa_lora",
    "fedsvd",
    "lora_fair",
    "flora",
    "flexlora",
    "hetlora",
    "fedex",
    "rolora",
    "fedsa",
    "flower",
)
WRAPPERS = (
    "fedprox",
    "scaffold",
    "fedadam",
    "fedyogi",
    "fedadagrad",
    "atp",
    "fedthe",
    "norm_clip",
    "trimmed_mean",
    "median",
    "krum",
)


def make(name: str, *wraps: str, ranks: dict[str, int] | None = None, **options: object) -> FederatedStrategy:
    context = RunContext(population=10, client_ranks=ranks or {})
    strategy = make_named(name, {} if wraps else options, "strategy", context=context)
    for index, wrap in enumerate(wraps):
        strategy = make_named(wrap, options if index == len(wraps) - 1 else {}, "strategy.wrap", inner=strategy)
    return strategy


def random_adapter(
    seed: int, rank: int = R, dtype: torch.dtype = torch.float64, scaling: float = S, B_zero: bool = False
) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "q/A": torch.randn(rank, N, generator=generator, dtype=torch.float64),
        "q/B": torch.randn(M, rank, generator=generator, dtype=torch.float64) * (not B_zero),
        "head/weight": torch.randn(2, generator=generator, dtype=torch.float64),
    }
    return AdapterState(
        {key: value.to(dtype) for key, value in tensors.items()}, {**SITES, "q": AdaptedLayer("lora", (M, N), scaling)}
    )


def updates_of(adapters: list[AdapterState], weights: list[float]) -> list[Update]:
    return [
        Update(f"c{index}", weight, adapter, {"train_loss": 1.0 + index})
        for index, (adapter, weight) in enumerate(zip(adapters, weights, strict=True))
    ]


def uploaded(
    strategy: FederatedStrategy, server: ServerState, adapters: list[AdapterState], weights: list[float]
) -> list[Update]:
    """What clients that trained to these adapters send: uploaded roles only, frozen ones as they were."""
    return updates_of([adapter.select(strategy.uploads(server)) for adapter in adapters], weights)


def change(adapter: AdapterState) -> Tensor:
    """Dense change of the weight at q, residual included."""
    total = adapter.sites["q"].scaling * adapter["q/B"].double() @ adapter["q/A"].double()
    if "q/residual_B" in adapter:
        total = total + adapter["q/residual_B"].double() @ adapter["q/residual_A"].double()
    return total


def exact_mean(adapters: list[AdapterState], weights: list[float]) -> Tensor:
    return sum(change(adapter) * weight for adapter, weight in zip(adapters, weights, strict=True)) / sum(weights)


def close(given: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((given.double() - wanted.double()).norm() <= tolerance * max(1.0, float(wanted.norm())))


ADAPTERS = [random_adapter(seed) for seed in (1, 2, 3)]
WEIGHTS = [1.0, 2.0, 5.0]
