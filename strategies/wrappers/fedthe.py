"""FedTHE in a federation: the server learns where all clients' training records lie, beside the aggregation inside.

    client:  h_k, the mean over its records of what enters the last layer of the model that it has just trained
    server:  h_g <- sum_k p_k h_k,  sent out again with the adapter (`mean:features`, one number a feature)

Where clients evaluate with `tta.method=fedthe` (fedpeft.tta.methods.fedthe), each trains a personal head beside the
global one, and h_g tells how close a test sample is to everybody's records. Jiang and Lin, arXiv 2205.10920.

Deviations: the global head is trained with the plain loss of the rounds, not with a balanced softmax. With some of the
clients in a round, h_g is that of the last round's. What a client sends is a mean over its records in the clear.

    >>> from fedpeft.strategies.wrappers.fedthe import FedTHE
    >>> FedTHE().inner.trains
    ('A', 'B', 'head')
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedpeft import config as configs
from fedpeft.errors import InputError
from fedpeft.objectives.base import load_objective
from fedpeft.state import AdapterState, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy, same_scale
from fedpeft.strategies.build import build
from fedpeft.strategies.wrappers.wrapper import Wrapper

ROLE = "mean"
FEATURES = f"{ROLE}:features"


class FedTHE(Wrapper):
    """The mean feature of all clients' training records, for head ensembles at test time."""

    paper = "Jiang and Lin 2022, arXiv 2205.10920"

    def __init__(self, inner: FederatedStrategy | None = None) -> None:
        super().__init__(inner)

    def _mean(self, server: ServerState) -> Tensor:
        """h_g [D] in float64, zero before the first round."""
        found = server.memory.get(FEATURES)
        return torch.zeros(width(server.adapter), dtype=torch.float64) if found is None else found

    def broadcast(self, server: ServerState, client: str) -> AdapterState:
        return self.inner.broadcast(server, client).replace({FEATURES: self._mean(server).float()})

    def uploads(self, server: ServerState) -> tuple[str, ...]:
        return (*self.inner.uploads(server), ROLE)

    def task(self, server: ServerState) -> dict[str, object]:
        return {**self.inner.task(server), "uploads": list(self.uploads(server))}

    def aggregate(self, server: ServerState, updates: list[Update]) -> ServerState:
        updates = same_scale(server, updates)
        plain = [replace(update, adapter=update.adapter.without((ROLE,))) for update in updates]
        after = self.inner.aggregate(server, plain)
        return replace(after, memory={**after.memory, **self.average(updates, (ROLE,))})

    def offline(self, server: ServerState, updates: list[Update]) -> tuple[AdapterState, list[str]]:
        adapter, notes = self.inner.offline(server, updates)
        return adapter, [*notes, "fedthe: finished adapters have no mean features; only the adapters were aggregated."]


def width(adapter: AdapterState) -> int:
    """Numbers that enter the last layer of the head.

    Raises:
        InputError: there is no head among the tensors, or its layers differ and the last one cannot be told.
    """
    found = {value.shape[-1] for key, value in adapter.select(("head",)).tensors.items() if key.endswith("/weight")}
    if len(found) != 1:
        raise InputError(f"fedthe: the layers of the head take {sorted(found) or 'no'} numbers; it needs a head that "
                         "all clients train, with layers of one width.")
    return found.pop()


def check(config: configs.Config) -> None:
    """Refuse what FedTHE cannot do, before anything is loaded."""
    wraps = [entry if isinstance(entry, str) else entry.get("name") for entry in config.strategy.wrap]
    name = config.strategy.name
    if "fedthe" not in [name, *wraps]:
        return
    if [name, *wraps][-1] != "fedthe":
        raise InputError(f"strategy.wrap: {wraps[-1]} goes around fedthe and would take its mean features for a part "
                         "of the update. Put fedthe last.")
    keeps = build(config).keeps
    if "head" in keeps:
        raise InputError(f"strategy.wrap: fedthe mixes a personal with the global head, but {name} leaves "
                         f"{', '.join(keeps)} with each client, so there is no global one.")
    if not load_objective(config.model.task).classes or not config.adapter.train_head:
        raise InputError(f"strategy.wrap: fedthe needs a head that the clients train; model.task={config.model.task}, "
                         f"adapter.train_head={str(config.adapter.train_head).lower()} has none.")
    if config.continual.body is not None:
        raise InputError(f"strategy.wrap: fedthe's mean features are those of one task, and continual.body="
                         f"{config.continual.body} learns a sequence. Set continual.body=null, or take fedthe out.")
    if config.privacy.unit != "none":
        raise InputError(f"strategy.wrap: fedthe has clients send mean features of their records, and privacy.unit="
                         f"{config.privacy.unit} does not cover them. Set privacy.unit=none, or take fedthe out.")
    for key, is_set in (("secagg.enabled=true", config.secagg.enabled),
                        ("run.max_update_norm", config.run.max_update_norm is not None)):
        if is_set:
            raise InputError(f"{key}: fedthe sends mean features beside the update, and they would be bounded as if "
                             "they were a part of it. Unset it, or take fedthe out of strategy.wrap.")
