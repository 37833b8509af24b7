"""What a round is made of, as plain data: updates, the server's state, the rules of a run, and how a round can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from fedpeft.errors import RunError
from fedpeft.state import AdapterState

DROPS = 3  # rounds dropped one after another, after which a run stops
DROPPED = "dropped"  # how many have been, in the state's numbers


class Needs(Enum):
    """SUM: only the weighted sum of updates (secure aggregation is possible). INDIVIDUAL: each update in the clear."""

    SUM = "sum"
    INDIVIDUAL = "individual"


# (grid, roster, strategy, server, sent, contents, rules) -> updates, reason for each client without one, traffic
Exchange = Callable[..., tuple[list["Update"], dict[str, str], dict[str, Any]]]


class RoundFailed(RunError):
    """Too few good replies; the message names every client that failed and why."""


class RoundDropped(RoundFailed):
    """Updates may have been sent, and no sum that counts came of them: its number is not tried again."""


@dataclass(frozen=True)
class Update:
    """One client's checked reply: what it uploaded, its weight (> 0) and its metrics.

    `count` is how many clients it stands for: more than one after a robust statistic has merged their updates.
    """

    client: str
    weight: float
    adapter: AdapterState
    metrics: dict[str, float] = field(default_factory=dict)
    count: int = 1


@dataclass(frozen=True)
class ServerState:
    """What the server knows between rounds: the global adapter, the strategy's own tensors and numbers (JSON-ready)."""

    adapter: AdapterState
    round: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)

    def with_tensors(self, tensors: dict[str, Tensor]) -> ServerState:
        """A copy whose adapter has these tensors, each in the dtype that it had before (new ones in float32)."""
        old = self.adapter.tensors
        cast = {
            key: value.to(old[key].dtype if key in old else torch.float32).contiguous()
            for key, value in tensors.items()
        }
        return replace(self, adapter=self.adapter.replace(cast))


@dataclass(frozen=True)
class Rules:
    """How rounds are run: the config's `run` section. `clients` is how many nodes must have joined before round 1.

    `secagg` is the exchange of a round under secure aggregation, None in the clear.
    """

    rounds: int
    seed: int = 0
    clients: int | None = None
    clients_per_round: int | None = None
    deadline_s: float | None = None
    quorum: float = 0.5
    max_update_norm: float | None = None
    evaluate_every: int = 1
    evaluate_clients: bool = False
    secagg: Exchange | None = None
