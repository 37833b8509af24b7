"""Clip each client's update to a norm before it is aggregated. Sun et al. 2019, arXiv 1911.07963.

    theta_k <- theta + min(1, C / ||theta_k - theta||) (theta_k - theta),   theta what client k was sent

The norm is L2 over all uploaded tensors together. `bound: null` takes C as the median of the round's norms. Control
variates (SCAFFOLD) are uploaded as differences and clipped as such.

Deviations: none of the paper's noise is added, so this bounds influence and gives no privacy.

    >>> from fedpeft.strategies.wrappers.norm_clip import NormClip
    >>> NormClip(bound=1.0).needs.value
    'individual'
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedpeft.config import option
from fedpeft.errors import InputError
from fedpeft.state import AdapterState, Needs, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy
from fedpeft.strategies.round_facts import median
from fedpeft.strategies.wrappers.wrapper import Wrapper, flattened


class NormClip(Wrapper):
    """Every update is scaled down to at most `bound`."""

    paper = "Sun et al. 2019, arXiv 1911.07963"
    needs = Needs.INDIVIDUAL
    needs_start = True

    @dataclass
    class Config:
        bound: float | None = option(None, "largest L2 norm of an update; null is the median of the round", above=0)

    def __init__(self, inner: FederatedStrategy | None = None, bound: float | None = None) -> None:
        super().__init__(inner)
        self.bound = bound

    def transform(self, server: ServerState, updates: list[Update]) -> list[Update]:
        moves = [self._moved(server, update) for update in updates]
        norms = torch.stack([flattened(move).norm() for move in moves])
        bound = float(median(norms)) if self.bound is None else self.bound
        self.treated = {update.client: f"clipped to {100 * bound / norm:.3g} % of its length"
                        for update, norm in zip(updates, norms.tolist(), strict=True) if norm > bound}
        clipped = []
        for update, move, norm in zip(updates, moves, norms.tolist(), strict=True):
            back = max(0.0, 1 - bound / norm) if norm > 0 else 0.0
            tensors = {key: value.double() - back * move.adapter[key] for key, value in update.adapter.tensors.items()}
            clipped.append(replace(update, adapter=AdapterState(tensors, update.adapter.sites)))
        return clipped

    def _moved(self, server: ServerState, update: Update) -> Update:
        """The update minus what was sent, in float64."""
        sent = self.broadcast(server, update.client)

        def difference(key: str, value: Tensor) -> Tensor:
            if sent.role(key) == "control":
                return value.double()
            if sent[key].shape != value.shape:
                raise InputError(f"strategy.wrap: norm_clip: {update.client} was sent {key} as {list(sent[key].shape)} "
                                 f"and gives {list(value.shape)}.")
            return value.double() - sent[key].double()

        moved = {key: difference(key, value) for key, value in update.adapter.tensors.items()}
        return replace(update, adapter=AdapterState(moved, update.adapter.sites))
