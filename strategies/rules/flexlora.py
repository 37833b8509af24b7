"""FlexLoRA: average the products, give each client their best approximation of its rank. Bai et al., NeurIPS 2024.

    D = sum_k p_k s_k B_k A_k / s,   U S V^T = SVD(D),   B = U S,  A = V^T to rank r
    client k gets the first r_k directions

D is never formed: the factors are stacked, each reduced by QR, and the SVD is of the core. By Eckart-Young the error
is sqrt(sum of the squared singular values after r). The server's factors are always in this form, so that a prefix of
rank r_k is the best one. A direction without signal keeps the server's row of A beside B = 0, so that it can still be
trained.

Deviations: the split of S between the factors is a convention the paper leaves open; `split: sqrt` gives the symmetric
one, which trains differently.

    >>> from fedpeft.strategies.rules.flexlora import FlexLoRA
    >>> FlexLoRA.unequal_ranks, FlexLoRA.fixed_basis
    (True, False)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft import lowrank
from fedpeft.config import option
from fedpeft.state import AdapterState, Needs, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy, same_scale
from fedpeft.strategies.parts import ranks

SIGNAL = 1e-12  # share of the largest singular value below which a direction is rounding noise of float64


class FlexLoRA(FederatedStrategy):
    """The truncated SVD of the exact mean of products."""

    paper = "Bai et al. 2024, arXiv 2402.11505"
    needs = Needs.INDIVIDUAL
    unequal_ranks = True
    fixed_basis = False

    @dataclass
    class Config:
        split: str = option("us", "us: B = U S, A = V^T; sqrt: B = U sqrt(S), A = sqrt(S) V^T", choices=("us", "sqrt"))

    def initial(self, adapter: AdapterState, seed: int) -> ServerState:
        server = ServerState(adapter)
        tensors = {}
        for site in adapter.lora_sites():
            A, B = adapter[f"{site}/A"], adapter[f"{site}/B"]
            tensors[f"{site}/B"], tensors[f"{site}/A"] = _best_factors(B, A, A, self.config.split)
        return server.with_tensors(tensors)

    def broadcast(self, server: ServerState, client: str) -> AdapterState:
        return ranks.prefix(server.adapter, self.context.client_ranks.get(client))

    def aggregate(self, server: ServerState, updates: list[Update]) -> ServerState:
        updates = same_scale(server, updates)
        weights = [update.weight for update in updates]
        tensors = self.average(updates, ("head",))
        for site in server.adapter.lora_sites():
            B, A = lowrank.stack(
                [update.adapter[f"{site}/B"] for update in updates],
                [update.adapter[f"{site}/A"] for update in updates],
                weights,
            )
            tensors[f"{site}/B"], tensors[f"{site}/A"] = _best_factors(
                B, A, server.adapter[f"{site}/A"], self.config.split
            )
        return server.with_tensors(tensors)


def _best_factors(B: Tensor, A: Tensor, old: Tensor, split: str) -> tuple[Tensor, Tensor]:
    """B A [m, n] in its best rank-r factors, r = rows of `old`, whose rows stand where there is no signal."""
    U, S, Vt = lowrank.svd(B, A)
    # The clamp keeps 0 / 0 out where all B are zero.
    keep = min(old.shape[0], int((S / S[0].clamp(min=1e-300) > SIGNAL).sum()))
    left = S[:keep] if split == "us" else S[:keep].sqrt()
    newB = torch.zeros(B.shape[0], old.shape[0], dtype=torch.float64)
    newA = old.double().clone()
    newB[:, :keep] = U[:, :keep] * left
    newA[:keep] = Vt[:keep] if split == "us" else Vt[:keep] * left[:, None]
    return newB, newA
