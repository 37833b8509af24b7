"""HetLoRA: zero-pad factors of unequal rank and weight each client by the norm of its update. Cho et al., EMNLP 2024.

    A <- sum_k w_k pad(A_k),   B <- sum_k w_k pad(B_k),   w_k = ||B_k A_k||_F / sum_j ||B_j A_j||_F  per site;
    client k gets the first r_k rows of A and columns of B

The head is averaged with p_k, and so is a site where every B_k is zero. The norm is that of r x r Gram matrices. A row
that no client of the round has keeps the server's A beside the padding's B = 0: the same product, and it can still be
trained.

Deviations: no self-pruning of ranks and no penalty on trailing ranks, so ranks are those of the config. (Code that
divides by how many clients have a row is another estimator.) The norms are data: not private unless the factors are.

    >>> from fedpeft.strategies.rules.hetlora import HetLoRA
    >>> HetLoRA.unequal_ranks
    True
"""

from __future__ import annotations

import torch

from fedpeft import lowrank
from fedpeft.state import AdapterState, Needs, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy, same_scale
from fedpeft.strategies.parts import ranks


class HetLoRA(FederatedStrategy):
    """Norm-weighted means of zero-padded factors."""

    paper = "Cho et al. 2024, arXiv 2401.06432"
    needs = Needs.INDIVIDUAL
    unequal_ranks = True

    def broadcast(self, server: ServerState, client: str) -> AdapterState:
        return ranks.prefix(server.adapter, self.context.client_ranks.get(client))

    def aggregate(self, server: ServerState, updates: list[Update]) -> ServerState:
        updates = same_scale(server, updates)
        shares = [update.weight for update in updates]
        tensors = self.average(updates, ("head",))
        for site in server.adapter.lora_sites():
            pairs = [(update.adapter[f"{site}/B"], update.adapter[f"{site}/A"]) for update in updates]
            norms = [float(lowrank.norm(B, A)) for B, A in pairs]
            # Before anyone has moved all norms are zero, and would weigh nothing.
            weights = norms if sum(norms) > 0 else shares
            B = torch.zeros_like(server.adapter[f"{site}/B"], dtype=torch.float64)
            A = torch.zeros_like(server.adapter[f"{site}/A"], dtype=torch.float64)
            for (Bk, Ak), weight in zip(pairs, weights, strict=True):
                rank = Ak.shape[0]
                B[:, :rank] += Bk.double() * (weight / sum(weights))
                A[:rank] += Ak.double() * (weight / sum(weights))
            highest = max(Ak.shape[0] for _, Ak in pairs)
            # Rows that nobody trained stay as drawn: as zeros they could never be learned, since B is zero there too.
            A[highest:] = server.adapter[f"{site}/A"][highest:].double()
            tensors |= {f"{site}/B": B, f"{site}/A": A}
        return server.with_tensors(tensors)
