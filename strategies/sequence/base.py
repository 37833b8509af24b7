"""What a federation's server does for a body while tasks arrive. One file here is one body, around any strategy.

A body of `fedpeft.continual.bodies` says how parameters move; here is its half on the server, under the same name:

    begin       before the first round of a task: fold what was learned into the base, choose the new task's factors
    trained     which of the strategy's roles clients train in a round
    after       once updates have been aggregated: projections, averages
    views       the adapters that predict, and `combine`, how their scores become one

Everything kept is in the server state's `memory` and `numbers` under KEEP, so checkpoint and resume need nothing more.
What it is given and returns is public under DP, or noised: everything here is post-processing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from fedpeft.state import AdapterState, ServerState
from fedpeft.strategies.parts.residuals import with_change

KEEP = "continual:"


@dataclass
class BodyConfig:
    pass


@dataclass(frozen=True)
class Place:
    """Where a round is: its task, how many rounds of the task came before, and how many the task has."""

    task: int
    before: int
    rounds: int


class ServerBody:
    """Base of all: plain sequential training, which does nothing at a new task.

    Attributes:
        needs: roles that the strategy must train.
        rules: strategies whose rule can do with a factor that nobody trains; None where all roles train.
        replays: clients mix records of earlier tasks into their batches.
        folds: it moves what was learned into the base weights.
        averages: it averages factors over rounds, so their coordinates must mean the same in all of them.
        sketches: clients send a sketch of their gradients before a task (not private).
        most_views: adapters of `views` at most; a head's sums are released for each, which a task's budget allows for.
        changes_A: it draws a new A for a task, which clients therefore cannot draw from the run's seed.
    """

    Config: ClassVar[Any] = BodyConfig
    paper: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    rules: ClassVar[tuple[str, ...] | None] = None
    replays: ClassVar[bool] = False
    folds: ClassVar[bool] = False
    averages: ClassVar[bool] = False
    changes_A: bool = False
    sketches: bool = False
    most_views: ClassVar[int] = 1

    def __init__(self, **options: Any) -> None:
        self.config = self.Config(**options)

    def require(self, adapter: AdapterState, tasks: int) -> None:
        """Raise InputError unless so many tasks have room in this adapter; before anything is trained."""

    def begin(self, server: ServerState, place: Place, seed: int, sketch: dict[str, Tensor]) -> ServerState:
        """The state before the first round of a task; `sketch` [out, r2] by site where `sketches`."""
        return server

    def trained(self, roles: tuple[str, ...], place: Place) -> tuple[str, ...]:
        """Of the strategy's trained roles, those of this round."""
        return roles

    def after(self, server: ServerState, place: Place) -> ServerState:
        """The state after a round was aggregated."""
        return server

    def views(self, server: ServerState) -> dict[str, AdapterState]:
        """Adapters that predict; the first is the one that trains."""
        return {"online": server.adapter}

    def combine(self, scores: dict[str, Tensor]) -> Tensor:
        """Scores [N, C] of all views to one."""
        return next(iter(scores.values()))


def folded(server: ServerState) -> ServerState:
    """What the adapter adds is moved into the base weights, s B A at each site, and B becomes zero."""
    adapter, changes, zero = server.adapter, {}, {}
    for site in adapter.lora_sites():
        B, A = adapter[f"{site}/B"], adapter[f"{site}/A"]
        if B.any() and A.any():
            changes[site] = (adapter.sites[site].scaling * B.double(), A.double())
        zero[f"{site}/B"] = B.new_zeros(B.shape)
    return with_change(server, changes).with_tensors(zero)


def remember(server: ServerState, tensors: dict[str, Tensor]) -> ServerState:
    """A copy that keeps these tensors of a body."""
    return replace(server, memory={**server.memory, **{KEEP + key: value for key, value in tensors.items()}})


def recalled(server: ServerState, suffix: str = "") -> dict[str, Tensor]:
    """Tensors that a body keeps, those whose name ends in `suffix`; by name without it."""
    return {key[len(KEEP) : len(key) - len(suffix)]: value for key, value in server.memory.items()
            if key.startswith(KEEP) and key.endswith(suffix)}
