"""Orthogonal Adaptation: every task trains in its own slot of one orthogonal basis. Po et al., arXiv 2312.02432.

    A_i = rows i r ... (i + 1) r - 1 of an orthogonal matrix O, frozen;   B_i is trained from 0
    D = sum_i w_i s_i B_i A_i                                             w_i: number given with the adapter, or 1

A_i A_j^T = 0 in different slots, so on an input in the span of A_i's rows the other tasks contribute nothing: the plain
sum keeps every task as it was there. A layer of width n has floor(n / r) slots. O follows from a seed and the name of
the site: clients and tasks agree on it without sending it.

`adapter=orthogonal_adaptation adapter.slot=i` trains so; `initial` freezes an adapter's A to a slot before training.
The merger refuses adapters whose A overlap, since the sum then means nothing. `tolerance` is the largest allowed cosine
between a row of one A and a row of another; raise it for bases of independent random rows, which overlap by
O(sqrt(r / n)).

Row blocks come from QR of Gaussian columns drawn block by block, of which slot i needs the first (i + 1) r only:
O(n (i + 1)^2 r^2), not O(n^3). Deviation: the paper fixes B in Delta W = A B^T; peft's A is that B^T.

    >>> import torch
    >>> one, two = (rows(6, 2, slot, 0, "encoder.q") for slot in (0, 1))
    >>> torch.allclose(one @ one.T, torch.eye(2).double()), bool((one @ two.T).abs().max() < 1e-12)
    (True, True)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedpeft import seeds
from fedpeft.adapters.orthogonal_adaptation import orthonormalise_last
from fedpeft.config import option
from fedpeft.errors import InputError
from fedpeft.merging.base import Merger, Numbers, State, Tensors, append
from fedpeft.state import AdapterState


@dataclass
class OrthogonalAdaptationConfig:
    """Options of `orthogonal_adaptation`: how far from orthogonal adapters may be before they are refused."""

    tolerance: float = option(0.01, "largest cosine between rows of two adapters' A", low=0, high=1)


class OrthogonalAdaptation(Merger):
    """The sum of adapters that were trained in orthogonal slots of one basis; refuses others."""

    Config: ClassVar[Any] = OrthogonalAdaptationConfig
    paper = "Po et al. 2023, arXiv 2312.02432"
    number = "weight"

    def update(self, state: State, adapter: AdapterState, number: float | None) -> tuple[Tensors, Numbers]:
        for site in adapter.lora_sites():
            kept = state["tensors"].get(f"{site}/A")
            if kept is not None:
                self._require_orthogonal(site, kept, adapter[f"{site}/A"])
        return append(state, adapter, 1.0 if number is None else number), {}

    def _require_orthogonal(self, site: str, kept: Tensor, A: Tensor) -> None:
        width, used, rank = A.shape[1], kept.shape[0], A.shape[0]
        # Whoever sets the tolerance to 1 asks for the sum whatever overlaps.
        if used + rank > width and self.config.tolerance < 1:
            raise InputError(
                f"orthogonal_adaptation: {site} is {width} wide and {used} of its directions are taken: "
                f"there is no room for rank {rank} (capacity {width // rank} adapters of that rank)."
            )
        unit = torch.nn.functional.normalize
        cosine = float((unit(kept) @ unit(A).T).abs().max())
        if cosine > self.config.tolerance:
            raise InputError(
                f"orthogonal_adaptation: {site}: the A of this adapter overlaps an earlier one's (cosine "
                f"{cosine:.3g}, tolerance {self.config.tolerance:g}). Train each in a slot of its own."
            )


def initial(adapter: AdapterState, slot: int, seed: int) -> AdapterState:
    """The adapter before task number `slot`: every A its slot of the basis, to be frozen, and every B zero.

    Raises:
        InputError: a layer has no such slot.
    """
    tensors = {}
    for site in adapter.lora_sites():
        A, B = adapter[f"{site}/A"], adapter[f"{site}/B"]
        tensors[f"{site}/A"] = rows(A.shape[1], A.shape[0], slot, seed, site).to(A.dtype)
        tensors[f"{site}/B"] = torch.zeros_like(B)
    return adapter.replace(tensors)


def rows(width: int, rank: int, slot: int, seed: int, site: str) -> Tensor:
    """Orthonormal rows [rank, width] of slot number `slot` (from 0), in float64."""
    capacity = width // rank
    if not 0 <= slot < capacity:
        raise InputError(
            f"orthogonal_adaptation: slot={slot}: {site}, {width} wide, has {capacity} slots of rank "
            f"{rank}, numbered from 0."
        )
    blocks = [
        torch.randn(
            width,
            rank,
            dtype=torch.float64,
            generator=seeds.torch_generator(seed, "orthogonal_adaptation", site, rank, block),
        )
        for block in range(slot + 1)
    ]
    return orthonormalise_last(blocks)
