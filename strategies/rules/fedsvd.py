"""FedSVD: train B only, refactor B A by an SVD on the server. Lee et al., "FedSVD", NeurIPS 2025, arXiv 2505.12805.

    B <- sum_k p_k B_k   (all clients share A);   before the next broadcast   U S V^T = SVD(B A),  B <- U S,  A <- V^T

The SVD is thin: QR of both factors and an r x r core, so rows of A stay orthonormal and inside the row space of A also
where B is rank-deficient. A site whose B is still zero is left alone. The scale alpha / r stays outside.

The row space of A never changes, so A = M A_0 with M [r, r] and A_0 the first draw. `transport: core` sends M in place
of A; server and clients both use the rounded product M A_0, so that they agree. With SGD FedSVD follows, after its
first refactorisation, the same path of products as FFA-LoRA with `init: orthonormal`; it differs under Adam.

Deviations: the authors' code takes a dense or a randomised SVD, which fills missing directions with arbitrary vectors,
sends whole state dicts, and freezes the head. `split: sqrt` (B = U sqrt S, A = sqrt S V^T) is the paper's ablation: a
direction without signal is then lost for ever.

    >>> import torch
    >>> from fedpeft.state import AdapterState, AdaptedLayer
    >>> from fedpeft.state import ServerState
    >>> factors = {"q/A": torch.tensor([[3.0, 4.0]]), "q/B": torch.tensor([[1.0], [2.0]])}
    >>> adapter = AdapterState(factors, {"q": AdaptedLayer("lora", (2, 2))})
    >>> server = FedSVD().before_round(FedSVD().initial(adapter, seed=0))
    >>> [server.adapter[key].double().numpy().round(5).tolist() for key in ("q/A", "q/B")]
    [[[0.6, 0.8]], [[5.0], [10.0]]]
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedpeft import lowrank
from fedpeft.config import option
from fedpeft.state import AdapterState, Needs, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy
from fedpeft.strategies.client import ClientHalf, Tensors
from fedpeft.strategies.instructions import Instructions
from fedpeft.strategies.parts import frozen_factors


class FedSVDClient(ClientHalf):
    """Makes A = M A_0 from the core that it is sent and the A_0 that it drew."""

    def start(self, adapter: AdapterState) -> AdapterState:
        made: Tensors = {}
        for key, core in adapter.select(("M",)).tensors.items():
            A = f"{key.removesuffix('/M')}/A"
            # In float64, as the server does it: both round the same product.
            made[A] = (core.double() @ adapter[A].double()).to(adapter[A].dtype)
        return adapter.without(("M",)).replace(made)


class FedSVD(FederatedStrategy):
    """Train and average B; A gets orthonormal rows by a refactorisation on the server."""

    paper = "Lee et al. 2025, arXiv 2505.12805"
    needs = Needs.SUM
    takes_fixed_factor = True
    trains = ("B", "head")
    fixed_basis = False
    client_half = FedSVDClient

    @dataclass
    class Config:
        every: int = option(1, "rounds between refactorisations", low=1)
        transport: str = option(
            "core",
            "send A, or the r x r matrix M with A = M A_0 (clients draw A_0 from the run's seed, its hash is checked)",
            choices=("core", "dense"),
        )
        init: str = option(
            "kaiming",
            "rows of A_0: peft's draw, or an orthonormal basis of its row space",
            choices=("kaiming", "orthonormal"),
        )
        split: str = option(
            "us", "us: B = U S, A = V^T; sqrt: B = U sqrt(S), A = sqrt(S) V^T (ablation)", choices=("us", "sqrt")
        )

    def initial(self, adapter: AdapterState, seed: int) -> ServerState:
        adapter = frozen_factors.orthonormal(adapter) if self.config.init == "orthonormal" else adapter
        memory = {}
        for site in adapter.lora_sites():
            A = adapter[f"{site}/A"]
            memory[f"{site}/A_0"] = A.clone()
            memory[f"{site}/M"] = torch.eye(A.shape[0], dtype=torch.promote_types(A.dtype, torch.float32))
        return ServerState(adapter, memory=memory)

    def before_round(self, server: ServerState) -> ServerState:
        return server if server.round % self.config.every else self.refactored(server)

    def refactored(self, server: ServerState) -> ServerState:
        """The same products with new factors, at every site whose B is not zero."""
        tensors: dict[str, Tensor] = {}
        memory = dict(server.memory)
        for site in server.adapter.lora_sites():
            B, A = server.adapter[f"{site}/B"], server.adapter[f"{site}/A"]
            # A zero product has no directions: the SVD would turn A into any basis of its row space.
            if not B.any():
                continue
            B, A = lowrank.refactor(B, A, self.config.split)
            if f"{site}/A_0" in memory:
                first = memory[f"{site}/A_0"].double()
                # Rounded to what is sent, and A made from that: server and clients work with the same bits.
                core = (A @ torch.linalg.pinv(first)).to(memory[f"{site}/M"].dtype)
                memory[f"{site}/M"] = core
                A = core.double() @ first
            tensors |= {f"{site}/B": B, f"{site}/A": A}
        return replace(server.with_tensors(tensors), memory=memory)

    def broadcast(self, server: ServerState, client: str) -> AdapterState:
        if self.config.transport == "dense":
            return server.adapter
        cores = {f"{site}/M": server.memory[f"{site}/M"] for site in server.adapter.lora_sites()}
        return server.adapter.without(("A",)).replace(cores)

    def instructions(self, server: ServerState) -> Instructions:
        told = super().instructions(server)
        if self.config.transport == "dense":
            return told
        # Of the first draw, not of the present A, which no client could draw.
        first = {f"{site}/A": server.memory[f"{site}/A_0"] for site in server.adapter.lora_sites()}
        return replace(told, static=frozen_factors.tell_drawn(AdapterState(first, server.adapter.sites), ("A",)))

    def offline(self, server: ServerState, updates: list[Update]) -> tuple[AdapterState, list[str]]:
        frozen_factors.require_shared(server, updates, "fedsvd")
        return self.refactored(self.aggregate(server, updates)).adapter, []
