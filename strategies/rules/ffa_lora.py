"""FFA-LoRA: freeze A, train and average B. Sun et al., ICLR 2024, arXiv 2403.12313.

    A_k = A_0 for all clients and rounds,   B_0 = 0,   B <- sum_k p_k B_k

Exact: sum_k p_k B_k A_0 = (sum_k p_k B_k) A_0. With `init: orthonormal` the rows of A_0 are an orthonormal basis of the
Kaiming draw's row space: the control that FedSVD has to beat (with SGD the two follow the same path of products).

Deviations: the paper freezes the classification head; here `adapter.train_head` decides, and a trained head is
averaged.

    >>> from fedpeft.strategies.rules.ffa_lora import FFALoRA
    >>> FFALoRA().trains
    ('B', 'head')
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedpeft.config import option
from fedpeft.state import AdapterState, Needs, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy
from fedpeft.strategies.instructions import Instructions
from fedpeft.strategies.parts import frozen_factors


class FFALoRA(FederatedStrategy):
    """Train and average B only; A is one frozen random draw."""

    paper = "Sun et al. 2024, arXiv 2403.12313"
    needs = Needs.SUM
    takes_fixed_factor = True
    trains = ("B", "head")

    @dataclass
    class Config:
        init: str = option(
            "kaiming",
            "rows of the frozen A: peft's draw, or an orthonormal basis of its row space",
            choices=("kaiming", "orthonormal"),
        )
        transport: str = option(
            "seed",
            "send A to the clients, or let them draw it from the run's seed (its hash is checked)",
            choices=("seed", "dense"),
        )

    def initial(self, adapter: AdapterState, seed: int) -> ServerState:
        return ServerState(frozen_factors.orthonormal(adapter) if self.config.init == "orthonormal" else adapter)

    def broadcast(self, server: ServerState, client: str) -> AdapterState:
        return server.adapter if self.config.transport == "dense" else server.adapter.without(("A",))

    def instructions(self, server: ServerState) -> Instructions:
        told = super().instructions(server)
        if self.config.transport == "dense":
            return told
        return replace(told, static=frozen_factors.tell_drawn(server.adapter, ("A",)))

    def offline(self, server: ServerState, updates: list[Update]) -> tuple[AdapterState, list[str]]:
        frozen_factors.require_shared(server, updates, "ffa_lora")
        return super().offline(server, updates)
