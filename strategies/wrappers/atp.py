"""ATP in a federation: clients learn the adaptation rates of `fedpeft.tta.methods.atp`, the server averages them.

    client:  a_k from a, by passes over its labelled records at the adapter that it received
    server:  a <- sum_k p_k a_k,  beside the aggregation of the strategy inside

One rate for every tensor that the strategy trains, sent beside the adapter (`rates:` and its name): some dozens of
numbers. They are used where clients evaluate with `tta.method=atp`. Bao, Wei, Wang and He, arXiv 2310.18816.

Deviations: rates are learned in the same rounds as the adapter, not after it; only tensors of the adapter (and the
head) have rates, since the server knows no others; p_k is the strategy's weighting, where the authors average the rates
of a round equally (`strategy.weighting=uniform` does).

    >>> from fedpeft.strategies.wrappers.atp import ATP
    >>> ATP(lr=0.01).inner.trains
    ('A', 'B', 'head')
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedpeft.adapters.adapted import Adapted
from fedpeft.config import option
from fedpeft.data.encode import Encoded
from fedpeft.state import AdapterState, ServerState, Update
from fedpeft.strategies.base import same_scale
from fedpeft.strategies.client import ClientHalf, Tensors, Visit
from fedpeft.strategies.wrappers.wrapper import Wrapper
from fedpeft.tta.deployed import Deployed, deploy
from fedpeft.tta.method import TTAMethod
from fedpeft.tta.methods.atp import TestTimeATP

RATES = "rates:"  # and the name of the tensor that it is of
SCALES = ("none", "root", "size")


class ATPClient(ClientHalf):
    """Learns better rates from its labelled records, at the adapter that it received."""

    sends = "rates learned from labelled records"
    alone = False
    strategy: ATP

    def finish(self, visit: Visit, trained: AdapterState) -> tuple[Tensors, Tensors]:
        # Rates are learned where they will be used, at what was received, and not at what this client made of it.
        visit.model.write(visit.start)
        deployed, rates = deploy(visit.model), received_rates(visit.received)
        names = {name: key for key, name in names_at(visit.model, deployed, rates).items()}
        options = self.strategy.config
        learned = TestTimeATP(deployed).learn(
            {name: rates[key] for name, key in names.items()},
            visit.data,
            options.lr,
            options.epochs,
            options.batch_size,
            options.scale,
            visit.seed,
        )
        # The model holds the trained adapter for the halves that come after this one.
        visit.model.write(visit.start.replace(trained))
        return {
            f"{RATES}{names[name]}": torch.tensor([value], dtype=torch.float32) for name, value in learned.items()
        }, {}

    def equip(
        self, method: TTAMethod, model: Adapted, deployed: Deployed, received: AdapterState, data: Encoded
    ) -> bool:
        if not isinstance(method, TestTimeATP):
            return False
        rates = received_rates(received)
        method.receive({name: rates[key] for key, name in names_at(model, deployed, rates).items()})
        return True


def received_rates(received: AdapterState) -> dict[str, float]:
    """Rates by the name of the adapter's tensor."""
    return {name.removeprefix(RATES): float(value) for name, value in received.extra.items() if name.startswith(RATES)}


def names_at(model: Adapted, deployed: Deployed, keys: Iterable[str]) -> dict[str, str]:
    """The deployed model's names of these tensors of the adapter."""
    names = {id(deployed.tensor(name)): name for name in deployed.slots}
    return {key: names[id(model.parameters[key])] for key in keys}


class ATP(Wrapper):
    """Adaptation rates for test time, learned by the clients and averaged."""

    paper = "Bao et al. 2023, arXiv 2310.18816"
    client_half = ATPClient

    @dataclass
    class Config:
        lr: float = option(1e-3, "eta, learning rate of the rates", low=0)
        epochs: int = option(1, "passes over a client's records a round", low=1)
        batch_size: int = option(32, "records in a batch; as many as on the stream", low=1)
        scale: str = option("root", "eta is divided by a tensor's entries to the power 0, 1/2 or 1", choices=SCALES)

    def extra(self, server: ServerState) -> dict[str, Tensor]:
        return {name: value.float() for name, value in self._server_rates(server).items()}

    def _server_rates(self, server: ServerState) -> dict[str, Tensor]:
        """a of every trained tensor [1], zero before the first round."""
        return {
            f"{RATES}{key}": server.memory.get(f"{RATES}{key}", torch.zeros(1, dtype=torch.float64))
            for key in server.adapter.select(self.trains).tensors
        }

    def aggregate(self, server: ServerState, updates: list[Update]) -> ServerState:
        updates = same_scale(server, updates)
        after = self.inner.aggregate(server, updates)
        return replace(after, memory={**after.memory, **self.average_extra(updates, self._server_rates(server))})

    def offline(self, server: ServerState, updates: list[Update]) -> tuple[AdapterState, list[str]]:
        adapter, notes = self.inner.offline(server, updates)
        return adapter, [*notes, "atp: finished adapters have no rates; only the adapters were aggregated."]
