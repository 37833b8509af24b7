"""LAE in a federation: the strategy trains the online adapter, the server keeps its moving average, both predict.

Gao et al., arXiv 2303.10070. With theta the aggregated online adapter after a round and R rounds a task:

    task 0        no average; inference with theta alone
    task 1 on     theta' <- theta at its start;  after every round  theta' <- a theta' + (1 - a) theta,  a = rho^(1/R)
    first rounds of a task (`frozen_rounds`, from task 1 on)       only the head trains
    scores        elementwise max of the soft-maxes of both

Deviations: the paper averages after every optimizer step of one learner. Here the average is taken over rounds, at the
server: it costs no upload, under DP it is post-processing, and `retention` rho says directly how much of an old average
is left after a task.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedpeft.state import AdapterState, ServerState
from fedpeft.strategies.sequence.base import Place, ServerBody, Tensors, recall_tensors, remember_tensors

OFFLINE = "|offline"


class FederatedLAE(ServerBody):
    """Online adapter, and its average over rounds, as two experts."""

    needs = ("head",)
    averages = True
    most_views = 2

    def begin(self, server: ServerState, place: Place, seed: int, sketches: dict[str, Tensors]) -> ServerState:
        if place.task != 1:
            return server
        return remember_tensors(
            server, {key + OFFLINE: value.clone() for key, value in self._own_tensors(server).items()}
        )

    def trained(self, roles: tuple[str, ...], place: Place) -> tuple[str, ...]:
        return ("head",) if place.task > 0 and place.before < self.config.frozen_rounds else roles

    def after(self, server: ServerState, place: Place) -> ServerState:
        if place.task == 0:
            return server
        # So that a task leaves the same share of the average, however many rounds it has.
        alpha = self.config.retention ** (1 / place.rounds)
        now, average = self._own_tensors(server), recall_tensors(server, OFFLINE)
        return remember_tensors(
            server, {key + OFFLINE: torch.lerp(now[key], value, alpha) for key, value in average.items()}
        )

    def views(self, server: ServerState) -> dict[str, AdapterState]:
        average = recall_tensors(server, OFFLINE)
        online = {"online": server.adapter}
        return {**online, "offline": server.adapter.replace(average)} if average else online

    def combine(self, scores: dict[str, Tensor]) -> Tensor:
        return torch.stack([value.softmax(-1) for value in scores.values()]).amax(0)

    def _own_tensors(self, server: ServerState) -> dict[str, Tensor]:
        """The adapter, without the head that both experts share."""
        return server.adapter.without(("head", "residual_A", "residual_B")).tensors
