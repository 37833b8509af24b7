"""SCAFFOLD: control variates correct the drift of local steps. Karimireddy et al., ICML 2020, arXiv 1910.06378.

    client:  y <- y - eta (g - c_k + c);   c_k+ = c_k - c + (x - y) / (steps eta)   (option II)
    server:  x <- x + eta_g (agg(y) - x);   c <- c + |S| / N mean_k(c_k+ - c_k)

The server sends c beside the adapter as `control:site/role` for each trained tensor; clients send back c_k+ - c_k
under the same names. agg is the strategy inside (its weights); controls take the plain mean. N is the number of all
clients. Traffic doubles, and a control fits its coordinates only while they mean the same, hence strategies with a
fixed basis only.

Deviations: none. With a local optimizer other than plain SGD (x - y) / (steps eta) is no longer a mean gradient, so the
others are refused.

    >>> from fedpeft.strategies.wrappers.scaffold import Scaffold
    >>> Scaffold().needs.value
    'sum'
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedpeft.config import option
from fedpeft.errors import InputError
from fedpeft.state import AdapterState, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy, same_scale
from fedpeft.strategies.wrappers.wrapper import Wrapper, innermost, name_of, require_fixed_basis


class Scaffold(Wrapper):
    """Control variates on every trained and shared tensor."""

    paper = "Karimireddy et al. 2020, arXiv 1910.06378"
    plain_sgd = True

    @dataclass
    class Config:
        server_lr: float = option(1.0, "eta_g, step of the server towards the aggregate", above=0)

    def __init__(self, inner: FederatedStrategy | None = None, server_lr: float = 1.0) -> None:
        super().__init__(inner)
        require_fixed_basis(self)
        if self.keeps:
            raise InputError("strategy.wrap: scaffold steers every client towards one global model, but "
                             f"{name_of(innermost(self))} leaves {', '.join(self.keeps)} with each client.")
        self.unequal_ranks = False
        self.server_lr = server_lr

    def _controls(self, server: ServerState) -> dict[str, Tensor]:
        """c of every tensor that clients send back this round; zero before its first update."""
        shared = server.adapter.select(self.inner.uploads(server)).tensors
        return {f"control:{key}": server.memory.get(f"control:{key}", torch.zeros_like(value, dtype=torch.float64))
                for key, value in shared.items()}

    def broadcast(self, server: ServerState, client: str) -> AdapterState:
        controls = {key: value.to(server.adapter[key.removeprefix("control:")].dtype)
                    for key, value in self._controls(server).items()}
        return self.inner.broadcast(server, client).replace(controls)

    def uploads(self, server: ServerState) -> tuple[str, ...]:
        return (*self.inner.uploads(server), "control")

    def task(self, server: ServerState) -> dict[str, Any]:
        return {**self.inner.task(server), "uploads": list(self.uploads(server)), "scaffold": True}

    def aggregate(self, server: ServerState, updates: list[Update]) -> ServerState:
        if self.population is None:
            raise InputError("scaffold: the strategy's population (number of all clients, data.clients) is not set.")
        updates = same_scale(server, updates)
        plain = [replace(update, adapter=update.adapter.without(("control",))) for update in updates]
        after = self.inner.aggregate(server, plain)
        old = server.adapter.select(self.inner.uploads(server)).tensors
        stepped = {key: torch.lerp(value.double(), after.adapter[key].double(), self.server_lr)
                   for key, value in old.items()}
        memory = dict(after.memory)
        for key, value in self._controls(server).items():
            total = sum((update.count * update.adapter[key].double() for update in updates), torch.zeros_like(value))
            memory[key] = value + total / self.population
        return replace(after.with_tensors(stepped), memory=memory)

    def offline(self, server: ServerState, updates: list[Update]) -> tuple[AdapterState, list[str]]:
        raise InputError("scaffold corrects local steps during a run; finished adapters have no control variates. "
                         f"Aggregate them with {name_of(innermost(self))}.")
