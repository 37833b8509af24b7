"""ATP in a federation: clients learn the adaptation rates of `fedpeft.tta.methods.atp`, the server averages them.

    client:  a_k from a, by passes over its labelled records at the adapter that it received (fedpeft.clients.rates)
    server:  a <- sum_k p_k a_k,  beside the aggregation of the strategy inside

One rate for every tensor that the strategy trains, sent beside the adapter as `rates:site/role`: some dozens of
numbers. They are used where clients evaluate with `tta.method=atp`. Bao, Wei, Wang and He, arXiv 2310.18816.

Deviations: rates are learned in the same rounds as the adapter, not after it; only tensors of the adapter (and the
head) have rates, since the server knows no others; p_k is the strategy's weighting, where the authors average the rates
of a round equally (`strategy.weighting=uniform` does).

    >>> from fedpeft.strategies.wrappers.atp import ATP
    >>> ATP(lr=0.01).inner.trains
    ('A', 'B', 'head')
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedpeft import config as configs
from fedpeft.config import option
from fedpeft.errors import InputError
from fedpeft.state import AdapterState, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy, same_scale
from fedpeft.strategies.wrappers.wrapper import Wrapper

SCALES = ("none", "root", "size")


class ATP(Wrapper):
    """Adaptation rates for test time, learned by the clients and averaged."""

    paper = "Bao et al. 2023, arXiv 2310.18816"

    @dataclass
    class Config:
        lr: float = option(1e-3, "eta, learning rate of the rates", low=0)
        epochs: int = option(1, "passes over a client's records a round", low=1)
        batch_size: int = option(32, "records in a batch; as many as on the stream", low=1)
        scale: str = option("root", "eta is divided by a tensor's entries to the power 0, 1/2 or 1", choices=SCALES)

    def __init__(self, inner: FederatedStrategy | None = None, lr: float = 1e-3, epochs: int = 1, batch_size: int = 32,
                 scale: str = "root") -> None:
        super().__init__(inner)
        self.lr, self.epochs, self.batch_size, self.scale = lr, epochs, batch_size, scale

    def _rates(self, server: ServerState) -> dict[str, Tensor]:
        """a of every trained tensor [1], zero before the first round."""
        return {f"rates:{key}": server.memory.get(f"rates:{key}", torch.zeros(1, dtype=torch.float64))
                for key in server.adapter.select(self.trains).tensors}

    def broadcast(self, server: ServerState, client: str) -> AdapterState:
        rates = {key: value.float() for key, value in self._rates(server).items()}
        return self.inner.broadcast(server, client).replace(rates)

    def uploads(self, server: ServerState) -> tuple[str, ...]:
        return (*self.inner.uploads(server), "rates")

    def task(self, server: ServerState) -> dict[str, Any]:
        options = {"lr": self.lr, "epochs": self.epochs, "batch_size": self.batch_size, "scale": self.scale}
        return {**self.inner.task(server), "uploads": list(self.uploads(server)), "atp": options}

    def aggregate(self, server: ServerState, updates: list[Update]) -> ServerState:
        updates = same_scale(server, updates)
        plain = [replace(update, adapter=update.adapter.without(("rates",))) for update in updates]
        after = self.inner.aggregate(server, plain)
        return replace(after, memory={**after.memory, **self.average(updates, ("rates",))})

    def offline(self, server: ServerState, updates: list[Update]) -> tuple[AdapterState, list[str]]:
        adapter, notes = self.inner.offline(server, updates)
        return adapter, [*notes, "atp: finished adapters have no rates; only the adapters were aggregated."]


def check(config: configs.Config) -> None:
    """Refuse rates where a guarantee would not cover them."""
    names = [config.strategy.name, *(entry if isinstance(entry, str) else entry.get("name")
                                     for entry in config.strategy.wrap)]
    if "atp" in names and config.privacy.unit != "none":
        raise InputError(f"strategy.wrap: atp learns rates from labelled records, and privacy.unit="
                         f"{config.privacy.unit} does not cover them. Set privacy.unit=none, or take atp out.")
