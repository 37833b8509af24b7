"""A server body is what a federation's server does for a body while tasks arrive, around any strategy.

A body of `fedpeft.continual.bodies` says how parameters move. Its half on the server is `general`, which runs the
body's own code between rounds, or a file of its own here, where the body is another one in a federation:

    sketch      where the body asks for one: what a client sends of its records before a task, and what all of them say
    begin       before the first round of a task: fold what was learned into the base, choose the new task's factors
    trained     which of the strategy's roles clients train in a round
    after       once updates have been aggregated: projections, averages
    end         once a task's rounds are over, though the last of them may have been dropped
    views       the adapters that predict, and `combine`, how their scores become one

Everything kept is in the server state's `memory` and `numbers` under KEEP, so checkpoint and resume need nothing more.
What it is given and returns is public under DP, or noised: everything here is post-processing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedpeft.state import AdapterState, ServerState
from fedpeft.strategies.parts.residuals import with_change

if TYPE_CHECKING:
    from fedpeft.adapters.adapted import Adapted
    from fedpeft.continual.body import Body
    from fedpeft.data.encode import Encoded

KEEP = "continual:"
NEW, PAST = "sketch", "past_sketch"
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """Where a round is: its task, how many rounds of the task came before, and how many the task has."""

    task: int
    before: int
    rounds: int


class ServerBody:
    """Base of all, which does nothing at a new task. Options are those of the central body.

    Args:
        central: the body as one learner has it.

    Attributes:
        needs: roles that the strategy must train; `without_needs` is the way to do without one, where there is.
        fixes_factor: one factor of the pairs stays as it is for a task.
        replays: clients mix records of earlier tasks into their batches.
        folds: it moves what was learned into the base weights.
        needs_still_base: the strategy may not move the base weights itself.
        averages: it averages factors over rounds, so their coordinates must mean the same in all of them.
        without_sketches: the way to do without them.
        sketches: what clients send a sketch of before a task (not private): NEW, its records, and PAST, those of the
            task before, at the model that this one left.
        most_views: adapters of `views` at most; a head's sums are released for each, which a task's budget allows for.
        changes_A: it draws a new A for a task, which clients therefore cannot draw from the run's seed.
    """

    needs: tuple[str, ...] = ()
    fixes_factor: bool = False
    replays: bool = False
    folds: bool = False
    needs_still_base: bool = False
    averages: bool = False
    changes_A: bool = False
    sketches: tuple[str, ...] = ()
    without_needs: str = ""
    without_sketches: str = "Take a body without sketches."
    most_views: int = 1

    def __init__(self, central: type[Body], **options: Any) -> None:
        self.central = central
        self.config = central.Config(**options)

    def require(self, adapter: AdapterState, tasks: int) -> None:
        """Raise InputError unless so many tasks have room in this adapter; before anything is trained."""

    def describe_sketch(self, adapter: AdapterState) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors of a client's sketch."""
        return {}

    def make_sketch(self, model: Adapted, data: Encoded) -> Tensors:
        """A client's sketch of its records, at the model as it is."""
        return {}

    def merge_sketches(self, sketches: list[Tensors], weights: list[float]) -> Tensors:
        """The sketch of all clients' records; each of theirs is in memory as long as it is looked at.

        Args:
            weights: of the clients, as of their updates.
        """
        return {}

    def begin(self, server: ServerState, place: Place, seed: int, sketches: dict[str, Tensors]) -> ServerState:
        """The state before the first round of a task; `sketches` has the merged ones that the body asks for."""
        return server

    def trained(self, roles: tuple[str, ...], place: Place) -> tuple[str, ...]:
        """Of the strategy's trained roles, those of this round."""
        return roles

    def after(self, server: ServerState, place: Place) -> ServerState:
        """The state after a round was aggregated."""
        return server

    def end(self, server: ServerState, task: int) -> ServerState:
        """The state once a task's rounds are over; a second time changes nothing."""
        return server

    def views(self, server: ServerState) -> dict[str, AdapterState]:
        """Adapters that predict; the first is the one that trains."""
        return {"online": server.adapter}

    def combine(self, scores: Tensors) -> Tensor:
        """Scores [N, C] of all views to one."""
        return next(iter(scores.values()))


def fold_into_base(server: ServerState) -> ServerState:
    """The state where what the adapter adds, s B A at each site, is in the base weights, and B is zero."""
    adapter, changes, zero = server.adapter, {}, {}
    for site in adapter.lora_sites():
        B, A = adapter[f"{site}/B"], adapter[f"{site}/A"]
        # A zero product would only add to the rank of the residual.
        if B.any() and A.any():
            changes[site] = (adapter.sites[site].scaling * B.double(), A.double())
        zero[f"{site}/B"] = B.new_zeros(B.shape)
    return with_change(server, changes).with_tensors(zero)


def remember_tensors(server: ServerState, tensors: Tensors) -> ServerState:
    """A copy that keeps these tensors of a body."""
    return replace(server, memory={**server.memory, **{KEEP + key: value for key, value in tensors.items()}})


def recall_tensors(server: ServerState, suffix: str = "") -> Tensors:
    """Tensors that a body keeps, those whose name ends in `suffix`; by name without it."""
    return {
        key[len(KEEP) : len(key) - len(suffix)]: value
        for key, value in server.memory.items()
        if key.startswith(KEEP) and key.endswith(suffix)
    }


def add_tensors(parts: Iterable[Tensors]) -> Tensors:
    """The sum by name, in float64: one part after the other in their order, no two of which need be in memory."""
    total: Tensors = {}
    for tensors in parts:
        for key, value in tensors.items():
            if key in total:
                total[key] += value
            else:
                total[key] = value.to(torch.float64, copy=True)
    return total
