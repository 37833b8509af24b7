"""SCAFFOLD: control variates correct the drift of local steps. Karimireddy et al., ICML 2020, arXiv 1910.06378.

    client:  y <- y - eta (g - c_k + c);   c_k+ = c_k - c + (x - y) / (steps eta)   (option II)
    server:  x <- x + eta_g (agg(y) - x);   c <- c + |S| / N mean_k(c_k+ - c_k)

The server sends c beside the adapter, one control for each trained tensor (`control:` and its name); clients send
back c_k+ - c_k under the same names and keep c_k. agg is the strategy inside (its weights); controls take the plain
mean. N is the number of all clients. The control of a tensor that rests in a round rests too. Traffic doubles, and a
control fits its coordinates only while they mean the same, hence strategies with a fixed basis only.

Deviations: none. Under a schedule of rates (steps eta) is their sum over the steps. With a local optimizer other than
plain SGD (x - y) / (steps eta) is no longer a mean gradient, so the others are refused.

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
from fedpeft.strategies.client import ClientHalf, Tensors, Visit
from fedpeft.strategies.wrappers.wrapper import Wrapper, innermost_rule, name_of, require_fixed_basis

CONTROL = "control:"  # and the name of the tensor that it corrects


class ScaffoldClient(ClientHalf):
    """Corrects every gradient by c - c_k, and keeps c_k."""

    sends = "control variates"
    covered_by_dp = True  # a function of the noised steps
    adds_up = True
    alone = False

    def gradient_offset(self, visit: Visit) -> Tensors:
        controls = visit.received.extra
        return {name.removeprefix(CONTROL): controls[name] - known for name, known in _known_variate(visit).items()}

    def finish(self, visit: Visit, trained: AdapterState) -> tuple[Tensors, Tensors]:
        known, new = _known_variate(visit), {}
        for name, control in known.items():
            key = name.removeprefix(CONTROL)
            if key not in trained:  # a body of tasks lets it rest in this round, so that no gradient of it was met
                new[name] = control
                continue
            mean_gradient = (visit.start[key] - trained[key]) / visit.rates
            new[name] = control - visit.received.extra[name] + mean_gradient
        return {name: new[name] - control for name, control in known.items()}, new


def _known_variate(visit: Visit) -> Tensors:
    """c_k, zero before the client's first round."""
    return {
        name: visit.kept.get(name, torch.zeros_like(value))
        for name, value in visit.received.extra.items()
        if name.startswith(CONTROL)
    }


class Scaffold(Wrapper):
    """Control variates on every trained and shared tensor."""

    paper = "Karimireddy et al. 2020, arXiv 1910.06378"
    plain_sgd = True
    client_half = ScaffoldClient

    @dataclass
    class Config:
        server_lr: float = option(1.0, "eta_g, step of the server towards the aggregate", above=0)

    def __init__(self, inner: FederatedStrategy | None = None, **options: Any) -> None:
        super().__init__(inner, **options)
        require_fixed_basis(self)
        if self.keeps:
            raise InputError(
                "strategy.wrap: scaffold steers every client towards one global model, but "
                f"{name_of(innermost_rule(self))} leaves {', '.join(self.keeps)} with each client."
            )
        # Controls have the server's shapes, and would not fit a client that trains the first rows of a factor alone.
        self.unequal_ranks = False

    def _server_controls(self, server: ServerState) -> dict[str, Tensor]:
        """c of every tensor that clients send back this round; zero before its first update."""
        shared = server.adapter.select(self.inner.uploads(server)).tensors
        return {
            f"{CONTROL}{key}": server.memory.get(f"{CONTROL}{key}", torch.zeros_like(value, dtype=torch.float64))
            for key, value in shared.items()
        }

    def extra(self, server: ServerState) -> dict[str, Tensor]:
        return {
            name: value.to(server.adapter[name.removeprefix(CONTROL)].dtype)
            for name, value in self._server_controls(server).items()
        }

    def aggregate(self, server: ServerState, updates: list[Update]) -> ServerState:
        if self.context.population is None:
            raise InputError("scaffold: the strategy's population (number of all clients, data.clients) is not set.")
        updates = same_scale(server, updates)
        after = self.inner.aggregate(server, updates)
        old = server.adapter.select(self.inner.uploads(server)).tensors
        stepped = {
            key: torch.lerp(value.double(), after.adapter[key].double(), self.config.server_lr)
            for key, value in old.items()
        }
        memory = dict(after.memory)
        for name, value in self._server_controls(server).items():
            # By `count`: where a median has merged updates, one control stands for several clients.
            total = sum(
                (update.count * update.adapter.extra[name].double() for update in updates), torch.zeros_like(value)
            )
            # By all clients, not by those of the round: the others' controls have not moved.
            memory[name] = value + total / self.context.population
        return replace(after.with_tensors(stepped), memory=memory)

    def offline(self, server: ServerState, updates: list[Update]) -> tuple[AdapterState, list[str]]:
        raise InputError(
            "scaffold corrects local steps during a run; finished adapters have no control variates. "
            f"Aggregate them with {name_of(innermost_rule(self))}."
        )
