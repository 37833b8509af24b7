"""FedAdam, FedYogi, FedAdagrad: an adaptive server step on the mean update. Reddi et al., ICLR 2021, arXiv 2003.00295.

    D = agg(theta_k) - theta,   m <- b1 m + (1 - b1) D,   theta <- theta + eta m / (sqrt v + tau)
    Adam:     v <- b2 v + (1 - b2) D^2
    Yogi:     v <- v - (1 - b2) D^2 sign(v - D^2)
    Adagrad:  v <- v + D^2,  b1 = 0

agg is the strategy inside. m and v start at zero, and there is no bias correction, as in the paper; v_0 = 0 where the
paper has any v_0 >= tau^2. Moments are per coordinate, so the strategy inside must keep its basis. tau = 1e-3 is far
above early updates of B, which starts at zero: the first steps are then small.

Deviations: Flower's FedAdam adds a bias correction with exponent round + 1; use strategy `flower` for it.

    >>> import torch
    >>> v, delta = torch.tensor(1.0), torch.tensor(2.0)
    >>> [rule.second(v, delta).item() for rule in (FedAdam(beta_2=0.5), FedYogi(beta_2=0.5), FedAdagrad())]
    [2.5, 3.0, 5.0]
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedpeft.config import option
from fedpeft.state import AdapterState, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy, same_scale
from fedpeft.strategies.wrappers.wrapper import Wrapper, name_of, require_fixed_basis


class ServerOptimizer(Wrapper):
    """The common step; a subclass says how the second moment moves."""

    paper = "Reddi et al. 2020, arXiv 2003.00295"
    needs_start = True

    def __init__(self, inner: FederatedStrategy | None = None, **options: Any) -> None:
        super().__init__(inner, **options)
        require_fixed_basis(self)

    def first(self, m: Tensor, delta: Tensor) -> Tensor:
        """The next first moment."""
        return delta

    @abstractmethod
    def second(self, v: Tensor, delta: Tensor) -> Tensor:
        """The next second moment."""

    def aggregate(self, server: ServerState, updates: list[Update]) -> ServerState:
        after = self.inner.aggregate(server, same_scale(server, updates))
        return self._step(server, after, server.adapter.select(self.inner.uploads(server)))

    def _step(self, server: ServerState, after: ServerState, moving: AdapterState) -> ServerState:
        """From the old values of `moving` by the moments of what the strategy inside made of the updates."""
        memory, tensors, own = dict(after.memory), {}, name_of(self)
        for key, value in moving.tensors.items():
            old = value.double()
            delta = after.adapter[key].double() - old
            # By tensor: a strategy that trains its factors in turn leaves the moments of the resting one alone.
            m = memory.get(f"{own}/m/{key}", torch.zeros_like(old))
            v = memory.get(f"{own}/v/{key}", torch.zeros_like(old))
            m = self.first(m, delta)
            v = self.second(v, delta)
            memory[f"{own}/m/{key}"], memory[f"{own}/v/{key}"] = m, v
            tensors[key] = old + self.config.lr * m / (v.sqrt() + self.config.tau)
        return replace(after.with_tensors(tensors), memory=memory)

    def offline(self, server: ServerState, updates: list[Update]) -> tuple[AdapterState, list[str]]:
        adapter, notes = self.inner.offline(server, updates)
        # Over all tensors: finished adapters have no round that would say which of them trained.
        stepped = self._step(server, replace(server, adapter=adapter), server.adapter)
        return stepped.adapter, [*notes, f"{name_of(self)}: one server step from the start, with fresh moments."]


class FedAdam(ServerOptimizer):
    """Adam on the server, without bias correction."""

    @dataclass
    class Config:
        lr: float = option(0.1, "eta, the server's step", above=0)
        beta_1: float = option(0.9, "decay of the mean", low=0, high=0.9999)
        beta_2: float = option(0.99, "decay of the mean square", low=0, high=0.9999)
        tau: float = option(1e-3, "added to sqrt v", above=0)

    def first(self, m: Tensor, delta: Tensor) -> Tensor:
        beta: float = self.config.beta_1
        return beta * m + (1 - beta) * delta

    def second(self, v: Tensor, delta: Tensor) -> Tensor:
        beta: float = self.config.beta_2
        return beta * v + (1 - beta) * delta.square()


class FedYogi(FedAdam):
    """Yogi on the server: v moves by at most (1 - b2) D^2, so that it forgets slowly."""

    def second(self, v: Tensor, delta: Tensor) -> Tensor:
        square = delta.square()
        beta: float = self.config.beta_2
        return v - (1 - beta) * square * torch.sign(v - square)


class FedAdagrad(ServerOptimizer):
    """Adagrad on the server."""

    @dataclass
    class Config:
        lr: float = option(0.1, "eta, the server's step", above=0)
        tau: float = option(1e-3, "added to sqrt v", above=0)

    def second(self, v: Tensor, delta: Tensor) -> Tensor:
        return v + delta.square()
