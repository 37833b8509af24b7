"""One aggregation of finished adapters given as files, by the same strategies that run rounds."""

from __future__ import annotations

import math
from dataclasses import replace

from fedpeft import registry
from fedpeft.adapters.flat import flatten_adapter, require_same_sites
from fedpeft.errors import InputError
from fedpeft.state import AdapterState, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy
from fedpeft.strategies.wrappers.wrapper import name_of


def aggregate(
    strategy: FederatedStrategy,
    adapters: list[AdapterState],
    weights: list[float] | None = None,
    start: AdapterState | None = None,
    names: list[str] | None = None,
) -> tuple[AdapterState, list[str]]:
    """Aggregate adapters once.

    Args:
        adapters: plain or with a core or residual (these are folded in first); scalings may differ.
        weights: one positive number each; None is equal weights. They are normalised.
        start: what the adapters were trained from. Needed by rules that measure updates (norm_clip, server optimizers).
        names: of the adapters, for errors; their numbers if None.

    Returns:
        A plain LoRA whose product, times its scaling, is the strategy's aggregate, and notes for the user.

    Raises:
        InputError: weights that do not fit; ranks or frozen factors that differ where the strategy cannot take it.
        StateMismatch: the adapters do not have the same sites and shapes.
    """
    if not adapters:
        raise InputError("aggregate: no adapters given.")
    weights = [1.0] * len(adapters) if weights is None else weights
    if len(weights) != len(adapters) or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise InputError(f"aggregate: weights={weights}: give {len(adapters)} positive numbers, one for each adapter.")
    if start is None and strategy.needs_start:
        raise InputError(
            f"aggregate: {name_of(strategy)} measures adapters against what they were trained from. "
            "Give that start adapter."
        )
    adapters = [flatten_adapter(adapter) for adapter in adapters]
    first = adapters[0] if start is None else flatten_adapter(start)
    names = names or [f"adapter {number}" for number in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        require_same_sites(first, adapter, name)
    _require_ranks(strategy, first, adapters, start is not None)
    server = ServerState(first if start is not None else _find_largest(adapters))
    updates = [
        Update(f"adapter-{number:03d}", float(weight), adapter)
        for number, (adapter, weight) in enumerate(zip(adapters, weights, strict=True))
    ]
    return strategy.offline(server, updates)


def _require_ranks(
    strategy: FederatedStrategy, first: AdapterState, adapters: list[AdapterState], started: bool
) -> None:
    for site in first.lora_sites():
        ranks = [adapter.rank(site) for adapter in adapters]
        if not strategy.unequal_ranks and {*ranks, first.rank(site)} != {ranks[0]}:
            able = [name for name in registry.names("strategies") if registry.load("strategies", name).unequal_ranks]
            raise InputError(
                f"aggregate: {name_of(strategy)} needs equal ranks, but {site} has the ranks {ranks}"
                f"{f' from a start of rank {first.rank(site)}' if started else ''}. "
                f"Strategies for unequal ranks: {', '.join(able)}."
            )
        if started and max(ranks) > first.rank(site):
            raise InputError(f"aggregate: {site} has the ranks {ranks}, above the start's {first.rank(site)}.")


def _find_largest(adapters: list[AdapterState]) -> AdapterState:
    """The first adapter, with the factors and scaling of the first adapter of the highest rank at each site."""
    tensors, sites = dict(adapters[0].tensors), dict(adapters[0].sites)
    for site in adapters[0].lora_sites():
        owner = max(adapters, key=lambda adapter: adapter.rank(site))
        tensors |= {f"{site}/A": owner[f"{site}/A"], f"{site}/B": owner[f"{site}/B"]}
        sites[site] = replace(sites[site], scaling=owner.sites[site].scaling)
    return AdapterState(tensors, sites)
