"""RoLoRA: train B and A in turn, average the one that trained. Chen et al., arXiv 2502.01755.

    rounds 1, 3, 5, ...   A fixed,  B <- sum_k p_k B_k          rounds 2, 4, 6, ...   B fixed,  A <- sum_k p_k A_k

Exact each round, since all clients share the other factor. B goes first: while B is zero, A has no gradient. Clients
make a new optimizer every round, so no moments cross from one factor to the other.

Deviations: a trained head is averaged every round.

    >>> from fedpeft.strategies.rules.rolora import RoLoRA
    >>> RoLoRA().config.first
    'B'
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.config import option
from fedpeft.errors import InputError
from fedpeft.state import AdapterState, Needs, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy, same_scale
from fedpeft.strategies.parts import frozen_factors


class RoLoRA(FederatedStrategy):
    """Alternate between the factors; only the active one is trained and sent up."""

    paper = "Chen et al. 2025, arXiv 2502.01755"
    needs = Needs.SUM
    trains = ("A", "B", "head")

    @dataclass
    class Config:
        first: str = option("B", "factor trained in round 1", choices=("B", "A"))

    def trained(self, server: ServerState) -> tuple[str, ...]:
        first = self.config.first
        second = "A" if first == "B" else "B"
        # `server.round` counts the rounds behind, so it is even before rounds 1, 3, 5.
        return (first if server.round % 2 == 0 else second, "head")

    def offline(self, server: ServerState, updates: list[Update]) -> tuple[AdapterState, list[str]]:
        apart = {role: frozen_factors.shared(server, updates, role) for role in ("A", "B")}
        common = next((role for role in ("A", "B") if apart[role] is None), None)
        if common is None:
            raise InputError(
                f"strategy rolora needs adapters that share one factor; these differ in A at {apart['A']} "
                f"and in B at {apart['B']}. Take fedex, flexlora or flora."
            )
        active = "B" if common == "A" else "A"
        mean = self.average(same_scale(server, updates), (active, "head"))
        note = f"rolora: all adapters have the same {common}; {active} was averaged."
        return server.with_tensors(mean).adapter, [note]
