"""DyLoRA: nested ranks, so that any first part of the adapter is an adapter. Valipour et al., arXiv 2210.07558.

    in each step   b ~ U{least, ..., r_k},   y = W x + s B[:, :b] A[:b] x,   and rows and columns up to b train

A client of rank r_k (`adapter.client_ranks`, with a rule that takes unequal ranks) draws b up to its own rank, from the
run's seed, its name, round and step, so that a resumed run draws the same. The tensors are LoRA's, and so are the rules
that take them, and the folder; `fedpeft export --rank` cuts it.

It is LoRA whose values are multiplied by a mask while the gradient of a step is taken: m theta, whose gradient is m
times that of the model at m theta. Under DP-SGD the mask is public and the noise outside of it is left out after it was
drawn, so that nothing of the guarantee changes.

Deviations: s = alpha / r whatever b is, where the paper has alpha / b, so that a client of lower rank and a folder that
was cut mean the same product as the first part of the whole. The paper's cheaper form, in which row and column b alone
train, is left out. Weight decay and momentum reach what a step leaves out.

    >>> thin = DyLoRA(least=3).draw_ranks({"q": 4}, 0)
    >>> {int(thin(step)["q/B"].sum()) for step in range(20)}
    {3, 4}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedpeft import seeds
from fedpeft.adapters.adapted import Injected, Thinning
from fedpeft.adapters.lora import Lora
from fedpeft.config import AdapterConfig, Configured, option
from fedpeft.errors import InputError
from fedpeft.models.base import Base
from fedpeft.state import AdapterState


class DyLoRA(Lora, Configured):
    """LoRA whose ranks are nested: each step trains a first part of them."""

    paper = "Valipour et al. 2022, arXiv 2210.07558"
    rules_of = "lora"
    nested = True

    @dataclass
    class Config:
        least: int = option(1, "smallest rank that a step draws; at most adapter.r", low=1)

    @classmethod
    def notes(cls) -> list[str]:
        """What `fedpeft show` says of it."""
        return [
            "under averaging, in a cohort and under DP it is LoRA; strategies as of lora, with adapter.client_ranks "
            "those that take unequal ranks",
            "`fedpeft export --rank N` writes the first N ranks of it",
        ]

    def inject(self, base: Base, config: AdapterConfig, seed: int) -> Injected:
        """LoRA's layers, and the draws."""
        lowest = min([config.r, *(config.client_ranks or [])])
        if self.config.least > lowest:
            raise InputError(f"adapter.least={self.config.least}: the lowest rank of a client is {lowest}.")

        def thin(start: AdapterState, seed: int) -> Thinning:
            return self.draw_ranks({site: start.rank(site) for site in start.lora_sites()}, seed, config.r)

        return replace(super().inject(base, config, seed), thin=thin)

    def draw_ranks(self, ranks: Mapping[str, int], seed: int, width: int | None = None) -> Thinning:
        """Masks of A [width, 1] and B [1, width] of each layer, one rank a step for all layers.

        Args:
            ranks: by layer; the largest is what a step draws up to.
            width: rank of the model; None is the largest of a client.
        """
        highest = max(ranks.values())

        def thin(step: int) -> dict[str, Tensor]:
            # numpy leaves the upper end out.
            drawn = int(seeds.numpy_generator(seed, "rank", step).integers(self.config.least, highest + 1))
            places = torch.arange(width or highest)
            mask = (places < drawn).float()
            return {
                f"{layer}/{role}": mask[:, None] if role == "A" else mask[None]
                for layer in ranks
                for role in ("A", "B")
            }

        return thin
