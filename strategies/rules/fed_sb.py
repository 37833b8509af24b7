"""Fed-SB: average the r x r core between frozen factors. Singhal et al., arXiv 2502.15436.

    W + s B R_k A,   B [m, r] and A [r, n] frozen and common,   R <- sum_k p_k R_k

Exact, since the product is linear in R, and r^2 numbers a layer cross the wire. The frozen factors come from the
adapter `lora_sb`, which says how they are made.

Deviations: weights p_k by examples; see `lora_sb` for the start. Offline, on plain LoRA adapters (B_k = B R_k, equal
A), the mean of B_k is B times the mean of R_k.

    >>> from fedpeft.strategies.rules.fed_sb import FedSB
    >>> FedSB().trains, FedSB.adapter
    (('R', 'head'), 'lora_sb')
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fedpeft.config import option
from fedpeft.state import AdapterState, Needs, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy, same_scale
from fedpeft.strategies.instructions import Instructions
from fedpeft.strategies.parts import frozen_factors

SAME_SPACE = 1e-5  # singular values below this share of the largest are rounding of float32 adapters


class FedSB(FederatedStrategy):
    """Train and average the core R only."""

    paper = "Singhal et al. 2025, arXiv 2502.15436"
    needs = Needs.SUM
    trains = ("R", "head")
    adapter = "lora_sb"

    @dataclass
    class Config:
        transport: str = option(
            "seed",
            "send A and B to the clients, or let them make them from the run's seed (their hash is checked)",
            choices=("seed", "dense"),
        )

    def broadcast(self, server: ServerState, client: str) -> AdapterState:
        return server.adapter if self.config.transport == "dense" else server.adapter.without(("A", "B"))

    def instructions(self, server: ServerState) -> Instructions:
        told = super().instructions(server)
        if self.config.transport == "dense":
            return told
        return replace(told, static=frozen_factors.tell_drawn(server.adapter, ("A", "B")))

    def offline(self, server: ServerState, updates: list[Update]) -> tuple[AdapterState, list[str]]:
        frozen_factors.require_shared(server, updates, "fed_sb")
        mean = self.average(same_scale(server, updates), ("B", "head"))
        apart = [site for site in server.adapter.lora_sites() if not _one_column_space(server, updates, site)]
        notes = []
        if apart:
            notes.append(
                f"fed_sb: the adapters' B do not share a column space of rank r at {len(apart)} sites (first "
                f"{apart[0]}), so they were not trained as B R with one B. The mean is exact all the same."
            )
        return server.with_tensors(mean).adapter, notes


def _one_column_space(server: ServerState, updates: list[Update], site: str) -> bool:
    Bs = [update.adapter[f"{site}/B"].double() for update in updates]
    # Each at norm 1, or a large factor would hide the directions of the small ones.
    values = torch.linalg.svdvals(torch.cat([B / B.norm().clamp(min=1e-300) for B in Bs], dim=1))
    return int((values > SAME_SPACE * values[0]).sum()) <= server.adapter.rank(site)
