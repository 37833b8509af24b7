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
from fedpeft.adapters.adapted import Adapted
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from fedpeft.objectives.base import load_objective
from fedpeft.state import AdapterState, ServerState, Update
from fedpeft.strategies.base import same_scale
from fedpeft.strategies.build import build
from fedpeft.strategies.client import ClientHalf, Tensors, Visit
from fedpeft.strategies.wrappers.wrapper import Wrapper
from fedpeft.tta.deployed import Deployed, deploy
from fedpeft.tta.method import TTAMethod
from fedpeft.tta.methods.fedthe import TestTimeFedTHE, mean_feature

FEATURES = "mean:features"


class FedTHEClient(ClientHalf):
    """Sends the mean feature of its records under the adapter that it has just trained."""

    sends = "mean features of their records"
    alone = False

    def finish(self, visit: Visit, trained: AdapterState) -> tuple[Tensors, Tensors]:
        # A cohort trains rows of a matrix, and leaves the model with values of its own.
        visit.model.write(visit.start.replace(trained))
        return {FEATURES: mean_feature(deploy(visit.model), visit.data).cpu()}, {}

    def equip(
        self, method: TTAMethod, model: Adapted, deployed: Deployed, received: AdapterState, data: Encoded
    ) -> bool:
        if not isinstance(method, TestTimeFedTHE):
            return False
        method.receive(data, received.extra[FEATURES])
        return True


class FedTHE(Wrapper):
    """The mean feature of all clients' training records, for head ensembles at test time."""

    paper = "Jiang and Lin 2022, arXiv 2205.10920"
    client_half = FedTHEClient

    def _mean(self, server: ServerState) -> Tensor:
        """h_g [D] in float64, zero before the first round."""
        found = server.memory.get(FEATURES)
        return torch.zeros(width(server.adapter), dtype=torch.float64) if found is None else found

    def extra(self, server: ServerState) -> dict[str, Tensor]:
        return {FEATURES: self._mean(server).float()}

    def aggregate(self, server: ServerState, updates: list[Update]) -> ServerState:
        updates = same_scale(server, updates)
        after = self.inner.aggregate(server, updates)
        return replace(after, memory={**after.memory, **self.average_extra(updates, (FEATURES,))})

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
        raise InputError(
            f"fedthe: the layers of the head take {sorted(found) or 'no'} numbers; it needs a head that "
            "all clients train, with layers of one width."
        )
    return found.pop()


def check(config: configs.Config) -> None:
    """Refuse what FedTHE cannot do, before anything is loaded."""
    if "fedthe" not in config.strategy.names:
        return
    keeps = build(config).keeps
    if "head" in keeps:
        raise InputError(
            "strategy.wrap: fedthe mixes a personal with the global head, but "
            f"{config.strategy.name} leaves {', '.join(keeps)} with each client, so there is no global "
            "one."
        )
    if not load_objective(config.model.task).classes or not config.adapter.train_head:
        raise InputError(
            f"strategy.wrap: fedthe needs a head that the clients train; model.task={config.model.task}, "
            f"adapter.train_head={str(config.adapter.train_head).lower()} has none."
        )
    if config.continual.body is not None:
        raise InputError(
            f"strategy.wrap: fedthe's mean features are those of one task, and continual.body="
            f"{config.continual.body} learns a sequence. Set continual.body=null, or take fedthe out."
        )
    if config.secagg.enabled:
        raise InputError(
            "secagg.enabled=true: secagg.clip bounds changes of an adapter, and fedthe's mean features, "
            "which are summed beside them, may be larger. Set secagg.enabled=false, or take fedthe out "
            "of strategy.wrap."
        )
