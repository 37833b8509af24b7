"""LoRA-Squeeze: train at a high rank, then compress to a low one. arXiv 2602.10993.

    s B A = U S V^T,   B' = U_k S_k^1/2,   A' = S_k^1/2 V_k^T      k = rank

the best approximation of that rank: the squared error is the sum of the discarded sigma_i^2. Several adapters are
averaged first, exactly and at full rank; only `result` truncates, so the errors of many merges do not add up. A site of
a lower rank keeps its own. For the variant that lowers the rank during training, call `squeeze` between its phases.

Deviation: the paper's randomised SVD of the dense product is replaced by thin QR of both factors and the SVD of an
r x r matrix, which is exact and cheaper.

    >>> import torch
    >>> from fedpeft.state import AdaptedLayer
    >>> layers = {"q": AdaptedLayer("lora")}
    >>> wide = AdapterState({"q/A": torch.eye(2), "q/B": torch.diag(torch.tensor([9.0, 1.0]))}, layers)
    >>> small = squeeze(wide, rank=1)
    >>> (small["q/B"] @ small["q/A"]).round(decimals=5).tolist(), small.rank("q")
    ([[9.0, 0.0], [0.0, 0.0]], 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fedpeft import lowrank
from fedpeft.config import option
from fedpeft.merging.base import Merger, Numbers, State, Tensors, combine, pair, sites_of
from fedpeft.state import AdapterState


@dataclass
class LoRASqueezeConfig:
    """Options of `lora_squeeze`: the rank that adapters are compressed to."""

    rank: int = option(4, "rank of the result", low=1)


class LoRASqueeze(Merger):
    """The best approximation of low rank of one adapter, or of the mean of several."""

    Config: ClassVar[Any] = LoRASqueezeConfig
    paper = "LoRA-Squeeze, arXiv 2602.10993"
    fewest = 1

    def update(self, state: State, adapter: AdapterState, number: float | None) -> tuple[Tensors, Numbers]:
        share = self.share(state, number)
        return combine(state, adapter, 1 - share, share), {}

    def finish(self, state: State) -> Tensors:
        tensors = {}
        for site in sites_of(state):
            U, S, Vt = _truncate_svd(*pair(state, site), self.config.rank)
            tensors[f"{site}/B"], tensors[f"{site}/A"] = U * S.sqrt(), S.sqrt()[:, None] * Vt
        return tensors

    def notes(self, state: State) -> list[str]:
        kept = total = 0.0
        for site, scaling in ((site, state["numbers"]["sites"][site]["scaling"]) for site in sites_of(state)):
            # Sites may scale differently, and their shares are taken of one sum.
            values = lowrank.svd(*pair(state, site))[1].square() * scaling**2
            kept, total = kept + float(values[: self.config.rank].sum()), total + float(values.sum())
        return [f"rank {self.config.rank} keeps {kept / total:.2%} of the squared norm"] if total else []


def squeeze(adapter: AdapterState, rank: int) -> AdapterState:
    """The best approximation of an adapter of at most this rank, with balanced factors."""
    return LoRASqueeze(rank=rank).merge([adapter])


def _truncate_svd(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vt = lowrank.svd(B, A)
    return U[:, :rank], S[:rank], Vt[:rank]
