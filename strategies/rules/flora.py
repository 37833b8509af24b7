"""FLoRA: stack the clients' factors and add the product to the base. Wang et al., NeurIPS 2024, arXiv 2409.05976.

    W <- W + s sum_k p_k B_k A_k = W + s [p_1 B_1 ... p_K B_K] [A_1; ...; A_K],   then   A fresh,  B = 0

Exact, for any ranks r_k. Only one factor carries p_k: scaling both gives p_k^2. The sum stays in factors beside the
frozen base and is compressed when its rank passes min(m, n). A client of rank r_k gets the first r_k rows of the fresh
A.

The price is that every round starts at B = 0, where A has no gradient: the initialisation lag that other papers
measure.

Deviations: the public code lets each client draw its own A; here the server draws one, from the run's seed and the
round.

    >>> from fedpeft.strategies.rules.flora import FLoRA
    >>> FLoRA.changes_base, FLoRA.unequal_ranks
    (True, True)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedpeft import lowrank, seeds
from fedpeft.state import AdapterState, Needs, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy, same_scale
from fedpeft.strategies.parts import ranks
from fedpeft.strategies.parts.residuals import with_change


class FLoRA(FederatedStrategy):
    """Stacked factors go into the base; clients start each round from a fresh A and B = 0."""

    paper = "Wang et al. 2024, arXiv 2409.05976"
    needs = Needs.INDIVIDUAL
    unequal_ranks = True
    changes_base = True
    fixed_basis = False

    def initial(self, adapter: AdapterState, seed: int) -> ServerState:
        return ServerState(adapter, numbers={"seed": seed})

    def broadcast(self, server: ServerState, client: str) -> AdapterState:
        return ranks.prefix(server.adapter, self.context.client_ranks.get(client))

    def aggregate(self, server: ServerState, updates: list[Update]) -> ServerState:
        updates = same_scale(server, updates)
        tensors, changes = self.average(updates, ("head",)), {}
        for site in server.adapter.lora_sites():
            B, A = _stack_updates(updates, site)
            # Into B: residuals are added to the weights as they are, without a scaling.
            changes[site] = (B * server.adapter.sites[site].scaling, A)
            # From the round, not from a generator that goes on: a resumed run draws the same A.
            generator = seeds.torch_generator(server.numbers["seed"], "flora", server.round + 1, site)
            tensors[f"{site}/A"] = _draw_kaiming(server.adapter[f"{site}/A"], generator)
            tensors[f"{site}/B"] = torch.zeros_like(server.adapter[f"{site}/B"])
        return with_change(server.with_tensors(tensors), changes)

    def offline(self, server: ServerState, updates: list[Update]) -> tuple[AdapterState, list[str]]:
        """The stacked adapter itself, of rank sum r_k: there is no next round that would need a fresh A."""
        updates = same_scale(server, updates)
        tensors = self.average(updates, ("head",))
        for site in server.adapter.lora_sites():
            tensors[f"{site}/B"], tensors[f"{site}/A"] = _stack_updates(updates, site)
        adapter = server.with_tensors(tensors).adapter
        top = max((adapter.rank(site) for site in adapter.lora_sites()), default=0)
        return adapter, [f"flora: the adapters are stacked; the result has rank {top}."]


def _stack_updates(updates: list[Update], site: str) -> tuple[Tensor, Tensor]:
    return lowrank.stack(
        [update.adapter[f"{site}/B"] for update in updates],
        [update.adapter[f"{site}/A"] for update in updates],
        [update.weight for update in updates],
    )


def _draw_kaiming(like: Tensor, generator: torch.Generator) -> Tensor:
    """peft's draw for A [r, n]: Kaiming-uniform with a = sqrt 5, which is U(-1 / sqrt n, 1 / sqrt n)."""
    return (torch.rand(like.shape, generator=generator, dtype=torch.float64) * 2 - 1) / math.sqrt(like.shape[1])
