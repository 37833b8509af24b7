"""Clip each client's update to a norm before it is aggregated. Sun et al. 2019, arXiv 1911.07963.

    theta_k <- theta + min(1, C / ||theta_k - theta||) (theta_k - theta),   theta what client k was sent

The norm is L2 over all uploaded tensors together. `bound: null` takes C as the median of the round's norms. Control
variates, which add up as updates do, are a part of the norm and are clipped with it; what else travels
beside an update (ATP's rates, FedTHE's mean features) is no part of it and is not bounded.

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
from fedpeft.state import Needs, ServerState, Update
from fedpeft.strategies.client import names_that_add_up
from fedpeft.strategies.round_facts import coordinate_median
from fedpeft.strategies.wrappers.wrapper import Wrapper, flatten_update


class NormClip(Wrapper):
    """Every update is scaled down to at most `bound`."""

    paper = "Sun et al. 2019, arXiv 1911.07963"
    needs = Needs.INDIVIDUAL
    robust = True
    needs_start = True

    @dataclass
    class Config:
        bound: float | None = option(None, "largest L2 norm of an update; null is the median of the round", above=0)

    def transform(self, server: ServerState, updates: list[Update]) -> list[Update]:
        beside = names_that_add_up(self.inner, server)
        norms = torch.stack([self._move(server, update, beside).norm() for update in updates])
        # The median of norms: half of the clients may lie about theirs before it is in their hands.
        bound = float(coordinate_median(norms)) if self.config.bound is None else self.config.bound
        self.treated = {
            update.client: f"clipped to {100 * bound / norm:.3g} % of its length"
            for update, norm in zip(updates, norms.tolist(), strict=True)
            if norm > bound
        }
        return [
            # A share of the way back, not of the way: at 0 an update stays what came, without rounding.
            self._shorten_update(server, update, beside, max(0.0, 1 - bound / norm) if norm > 0 else 0.0)
            for update, norm in zip(updates, norms.tolist(), strict=True)
        ]

    def _move(self, server: ServerState, update: Update, beside: set[str]) -> Tensor:
        """The update minus what was sent, and what adds up beside it, as one float64 vector.

        Raises:
            InputError: shapes differ.
        """
        sent = self.broadcast(server, update.client)
        for key, value in update.adapter.tensors.items():
            if sent[key].shape != value.shape:
                raise InputError(
                    f"strategy.wrap: norm_clip: {update.client} was sent {key} as {list(sent[key].shape)} "
                    f"and gives {list(value.shape)}."
                )
        moved = update.adapter.replace(
            {key: value.double() - sent[key].double() for key, value in update.adapter.tensors.items()}
        )
        return flatten_update(replace(update, adapter=moved), beside)

    def _shorten_update(self, server: ServerState, update: Update, beside: set[str], back: float) -> Update:
        """The update, moved back to what was sent by this share of its way."""
        sent, adapter = self.broadcast(server, update.client), update.adapter
        tensors = {
            key: value.double() - back * (value.double() - sent[key].double()) for key, value in adapter.tensors.items()
        }
        extra = {
            name: value.double() * (1 - back) if name in beside else value for name, value in adapter.extra.items()
        }
        return replace(update, adapter=replace(adapter, tensors=tensors, extra=extra))
