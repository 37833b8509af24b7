"""FedSA-LoRA: share A, keep B with each client. Guo et al., "Selective Aggregation for Low-Rank Adaptation", ICLR 2025.

    clients train A_k and B_k,   A <- sum_k p_k A_k,   B_k (and the head) stay on client k

There is no single global model: each client's is W + s B_k A, evaluated on its own held-out data.

Deviations: none known; the repository's settings (RoBERTa-large, 3 clients) are not defaults here.

    >>> from fedpeft.strategies.rules.fedsa import FedSA
    >>> FedSA().trains, FedSA().keeps
    (('A', 'B', 'head'), ('B', 'head'))
"""

from __future__ import annotations

from fedpeft.state import AdapterState, Needs, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy, same_scale


class FedSA(FederatedStrategy):
    """FedAvg on A; B and the head are personal."""

    paper = "Guo et al. 2024, arXiv 2410.01463"
    needs = Needs.SUM
    trains = ("A", "B", "head")
    keeps = ("B", "head")

    def offline(self, server: ServerState, updates: list[Update]) -> tuple[AdapterState, list[str]]:
        mean = self.average(same_scale(server, updates), self.trains)
        return server.with_tensors(mean).adapter, [
            "fedsa: only A is shared. B (and the head) are the mean of the clients', as a starting point for a new "
            "client; each client goes on with its own."
        ]
