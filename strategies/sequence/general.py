"""The server half of every body whose memory is sums, factors or averages: the central class itself, between rounds.

A body of `fedpeft.continual.bodies` that trains the pair B, A of every layer does the same things at a server as for
one learner; only its steps are the clients'. So its own code is run on the adapter's factors:

    before a task    end_task with the sums over all clients' records of the last task, where it needs them;
                     survey <- the sums over their records of the new one, where it needs them;   begin_task
    in it            moves_in and fixed_roles say what clients train, replays what their batches hold
    after it         end_task at once, where it needs no sums

What its memory holds is in the server state. Bodies that renew their pair for every task need one thing more, since a
client has one pair. Where the sum of all pairs predicts (`adds_up`), the last one goes into the base, W <- W + s B A.
Where a merged adapter does (`merged`), each pair trains over the bare base; when its task is over, and in `views`, the
merged one stands in the base: its rank may be higher than a pair's.

One client that makes all steps of a task in one round, with one learner's optimizer and batches, so has what that
learner has, up to rounding. Of several clients the strategy averages pairs, as it does without tasks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from fedpeft.adapters.adapted import Adapted
from fedpeft.continual.body import Body, TrainConfig
from fedpeft.continual.model import Plastic
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from fedpeft.state import AdapterState, ServerState
from fedpeft.strategies.parts.residuals import with_change
from fedpeft.strategies.sequence.base import (
    KEEP,
    NEW,
    PAST,
    Place,
    ServerBody,
    Tensors,
    add_tensors,
    fold_into_base,
    recall_tensors,
    remember_tensors,
)

KINDS = ("statistics", "bases", "adapters")  # of a body's memory: tensors that a server may have
MINE, NUMBERS = tuple(f"{KEEP}{kind}/" for kind in KINDS), f"{KEEP}numbers"
ENDED = f"{KEEP}ended"  # the last task for which `end_task` was called
# What one learner does in a step or a prediction, and neither clients nor a server do.
STEPS = ("batch", "penalty", "after_backward", "step", "after_step", "predict", "combine", "views")


@dataclass(frozen=True)
class Shapes:
    """What a central body asks of its model while nothing runs through it: layers, and (outputs, inputs) of each."""

    adapter: AdapterState

    @property
    def base(self) -> Shapes:
        """These shapes themselves, where a body expects a model's base."""
        return self

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the adapted layers, sorted."""
        return tuple(sorted(self.adapter.lora_sites()))

    def shape(self, layer: str) -> tuple[int, int]:
        """(outputs, inputs) of a layer, from the adapter's factors."""
        return len(self.adapter[f"{layer}/B"]), self.adapter[f"{layer}/A"].shape[1]


class GeneralServerBody(ServerBody):
    """A central body, run between rounds on what clients have trained."""

    def __init__(self, central: type[Body], **options: Any) -> None:
        super().__init__(central, **options)
        served = ("batch",) * central.replays + ("views",) * (central.merged is not Body.merged)
        theirs = [name for name in STEPS if getattr(central, name) is not getattr(Body, name) and name not in served]
        if theirs:
            raise InputError(
                f"continual.body: {central.__name__} says that a server can run it, but a federation has "
                f"no place for its {', '.join(theirs)}. Set `stays_central` to that reason, or register a "
                "half of its own in `server_bodies`."
            )
        rests = not (central.moves_in(0) and central.moves_in(1))
        self.fixed = central.fixed_roles(self.config)
        self.fixes_factor = bool(self.fixed)
        self.replays, self.folds, self.changes_A = central.replays, central.renews, central.renews
        self.needs_still_base = rests or (central.renews and not central.adds_up)
        self.needs = ("B",) if central.renews else ("head",) if rests else ()
        self.sketches = (PAST,) * ("statistics" in central.needs) + (NEW,) * central.surveys

    def require(self, adapter: AdapterState, tasks: int) -> None:
        # Made for its own checks: a merger that cannot take such pairs says so before anything is trained.
        self._open(ServerState(adapter), 0, 0)

    def describe_sketch(self, adapter: AdapterState) -> dict[str, tuple[int, ...]]:
        # Of no record at all: that tells the form without a model.
        nothing = self._make(Shapes(adapter), adapter).statistics(Encoded({}, torch.zeros(0, dtype=torch.int64)))
        return {key: tuple(value.shape) for key, value in nothing.items()}

    def make_sketch(self, model: Adapted, data: Encoded) -> Tensors:
        """The body's `statistics`, at the model with the server's adapter in it."""
        return self._make(Plastic.over(model.base, model.form.lora_sites()), model.form).statistics(data)

    def merge_sketches(self, sketches: list[Tensors], weights: list[float]) -> Tensors:
        """The sum over all records, whatever the weights of updates are."""
        return add_tensors(sketches)

    def trained(self, roles: tuple[str, ...], place: Place) -> tuple[str, ...]:
        if not self.central.moves_in(place.task):
            return ("head",)
        return tuple(role for role in roles if role not in self.fixed)

    def begin(self, server: ServerState, place: Place, seed: int, sketches: dict[str, Tensors]) -> ServerState:
        body = self._open(server, place.task - 1, seed)
        # The last task ends only now, since the sums over its records had to be asked for first.
        if PAST in sketches:
            body.end_task(sketches[PAST])
        body.index, body.surveyed = place.task, sketches.get(NEW)
        if self.central.renews and place.task > 0:  # before the new pair takes the place of the last one
            server = fold_into_base(server) if self.central.adds_up else bare(server)
        body.begin_task()
        strange = next((key for key in body.parameters if key not in server.adapter), None)
        if strange is not None:
            raise InputError(
                f"continual.body: {self.central.__name__} trains {strange}, and clients train the adapter's B and A."
            )
        return self._close(server, body).with_tensors({key: value.detach() for key, value in body.parameters.items()})

    def after(self, server: ServerState, place: Place) -> ServerState:
        return self.end(server, place.task) if place.before == place.rounds - 1 else server

    def end(self, server: ServerState, task: int) -> ServerState:
        if PAST in self.sketches or "raw" in self.central.needs or server.numbers.get(ENDED, -1) == task:
            return server  # its sums are asked for later; its records are the clients' to keep; it has ended
        body = self._open(server, task, 0)
        body.end_task({})
        server = self._close(server, body)
        merged = body.merged()
        server = server if merged is None else in_base(server, merged)
        return replace(server, numbers={**server.numbers, ENDED: task})

    def views(self, server: ServerState) -> dict[str, AdapterState]:
        merged = self._open(server, 0, 0).merged() if self.central.renews else None
        return {"online": server.adapter if merged is None else in_base(server, merged).adapter}

    def _make(self, model: Any, adapter: AdapterState, seed: int = 0) -> Body:
        """The central body, whose pairs have the adapter's rank and scale."""
        site = adapter.lora_sites()[0]
        r = adapter.rank(site)
        # The adapter's, over the body's options of these names, which are one learner's.
        pair = {"form": "lora", "r": r, "alpha": r * adapter.sites[site].scaling}
        options = {item.name: pair.get(item.name, getattr(self.config, item.name)) for item in fields(self.config)}
        return self.central(model, TrainConfig(), seed, **options)

    def _open(self, server: ServerState, task: int, seed: int) -> Body:
        """The central body as it was left, with the pairs that clients have trained."""
        body = self._make(Shapes(server.adapter), server.adapter, seed)
        body.index = task
        body.parameters = dict(server.adapter.select(("A", "B")).tensors)
        for key, value in recall_tensors(server).items():
            kind, _, name = key.partition("/")
            if kind in KINDS:
                body.memory[kind][name] = value
        # A copy: the body writes into it, and the old state must stay as it is.
        body.memory["numbers"] = dict(server.numbers.get(NUMBERS, {}))
        return body

    def _close(self, server: ServerState, body: Body) -> ServerState:
        """The state with the body's memory; earlier pairs are in the base, and not kept twice."""
        others = {key: value for key, value in server.memory.items() if not key.startswith(MINE)}
        kept = {
            f"{kind}/{key}": value
            for kind in KINDS
            for key, value in body.memory[kind].items()
            if not key.startswith("past/")
        }
        numbers = {NUMBERS: body.memory["numbers"]} if body.memory["numbers"] else {}
        return remember_tensors(replace(server, memory=others, numbers={**server.numbers, **numbers}), kept)


def bare(server: ServerState) -> ServerState:
    """The state over the base as it was loaded."""
    return replace(server, adapter=server.adapter.without(("residual_A", "residual_B")))


def in_base(server: ServerState, merged: AdapterState) -> ServerState:
    """The state whose base has a merged adapter's change and no other, while B is zero."""
    changes = {
        site: (merged.sites[site].scaling * merged[f"{site}/B"].double(), merged[f"{site}/A"].double())
        for site in merged.lora_sites()
    }
    zero = {key: torch.zeros_like(value) for key, value in server.adapter.select(("B",)).tensors.items()}
    return with_change(bare(server), changes).with_tensors(zero)
