"""The loop of a run, simulated or over real sites: from its last checkpoint on, round after round, to its results.

    begin, or the last checkpoint;  rounds, or tasks of rounds (`sequence.run`);  results (`results.finish`)

A simulation and a coordinator give it a world and a way to the clients, and nothing else tells them apart. Strategies
decide what a round computes, and when it is evaluated (`strategies.base`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from flwr.serverapp import Grid

from fedpeft import progress
from fedpeft.config import Config
from fedpeft.objectives.measures import PLAIN
from fedpeft.record import checkpoint
from fedpeft.record.metrics import Recorder
from fedpeft.record.trackers.base import track_run
from fedpeft.run import comparators, results, sequence
from fedpeft.run.best import Best
from fedpeft.run.traffic import Traffic
from fedpeft.run.world import World
from fedpeft.state import RoundFailed, Rules, ServerState
from fedpeft.strategies import wire
from fedpeft.strategies.secagg import terms
from fedpeft.strategies.sequence import exchange

log = logging.getLogger("fedpeft")
Event = dict[str, Any]
Listener = Callable[[Event], None]
T = TypeVar("T")
TRIES = 5  # of one round, before a run over clients that come and go is given up
PAUSE_S = 10.0  # between two of them
AGAIN = 2  # times that a round of secure sums begins anew there, with new masks, before its number is given up


@dataclass(frozen=True)
class Federation:
    """The way to a run's clients.

    Attributes:
        grid: carries messages.
        codec: what messages hold, and who is there.
        steady: every client is there from the first round to the last, as in a simulation. Sites come and go: they are
            asked for before every round, a quorum is enough after the first, and a round that failed is tried again.
        describe_round: what is added to the event of a round.
    """

    grid: Grid
    codec: wire.Packed
    steady: bool
    describe_round: Callable[[Event], dict[str, Any]]


def run(
    world: World,
    folder: Path,
    recorder: Recorder,
    open_federation: Callable[[], AbstractContextManager[Federation]],
    on_event: Listener,
    fit_baselines: Callable[[], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """Run what is left of a run, and write its results; its summary.

    Args:
        folder: of the run.
        recorder: of its events.
        open_federation: opens the way to the clients, which costs processes; called where rounds are left.
        on_event: receives every event that is recorded, and `resume` where the run goes on.
        fit_baselines: test accuracies of what needs no federation, to stand beside the run's; fitted after round 1.

    Raises:
        RoundFailed: too few clients answered, as often as a round may be tried.
        RunError: the rounds have no result.
    """

    server = checkpoint.latest(folder / "checkpoints")
    with track_run(world.config, folder, 0 if server is None else server.round) as trackers:

        def record(event: Event) -> None:
            if event["event"] in ("round", "round_dropped"):
                progress.step("rounds", event["round"], world.config.run.rounds)
            recorder.record(event)
            trackers.tell(event)
            on_event(event)

        if server is None:
            recorder.path.unlink(missing_ok=True)  # of a process that ended before its first checkpoint
            server = begin(world, record)
        else:
            recorder.resume(server.round, sequence.find_unfinished(server))
            on_event({"event": "resume", "round": server.round, "rounds": world.config.run.rounds})
        progress.step("rounds", server.round, world.config.run.rounds)
        best, traffic = Best.open(world.config, folder), Traffic.open(world.config, folder)
        # Otherwise only the results are missing: a kill came after the last checkpoint, and no process is needed.
        if not is_complete(world, server, best, traffic):
            with open_federation() as federation:
                server = Session(world, folder, federation, record, fit_baselines, best, traffic).play(server)
        record({"event": "end", "round": server.round})
        summary = results.finish(world, server, folder, best, traffic)
        trackers.take(folder)
    return summary


def begin(world: World, record: Listener) -> ServerState:
    """The state before round 1; what the run is, and how good the model is before it, are recorded."""
    config, start, objective = world.config, world.start, world.local.model.base.objective
    # A sequence of tasks is scored by `sequence.score`, which knows no others.
    measures = PLAIN if config.continual.body else objective.all_measures
    record(
        {
            "event": "start",
            "strategy": config.strategy.name,
            "engine": config.run.engine,
            "seed": config.run.seed,
            "clients": config.data.count,
            "rounds": config.run.rounds,
            "trainable_parameters": count_trainable(world),
            "personalised": bool(world.strategy.keeps),
            "metric": config.run.metric or objective.headline,
            "measures": {name: measure.tree() for name, measure in measures.items()},
            "test_fingerprint": world.test.fingerprint if len(world.test) else None,
            "skipped": [entry.tree() for entry in world.skipped],
        }
    )
    if len(world.test):
        record({"event": "evaluate", "round": 0, **results.score(world, start)})
    return start


def count_trainable(world: World) -> int:
    """Parameters that a client trains over two rounds, as some strategies train other roles in every second one."""
    adapter, strategy = world.start.adapter, world.strategy
    roles = {role for rounds in range(2) for role in strategy.trained(ServerState(adapter, round=rounds))}
    return adapter.select(roles).parameters


def is_complete(world: World, server: ServerState, best: Best | None, traffic: Traffic | None) -> bool:
    """Whether nothing is left to do at the clients: no round, and in a sequence no sums after the last one."""
    if is_exhausted(world, server, best, traffic):
        return True
    if world.config.continual.body is not None and not sequence.is_complete(world, server):
        return False
    return server.round >= world.config.run.rounds


def is_exhausted(world: World, server: ServerState, best: Best | None, traffic: Traffic | None) -> bool:
    """Whether `run.patience` or `run.max_traffic_mb` has ended the run."""
    if best is not None and best.is_exhausted(server.round):
        return True
    return bool(traffic is not None and traffic.moved and not traffic.has_room(world.strategy, server))


def rules_of(config: Config) -> Rules:
    """How the rounds of a run are run."""
    return Rules(
        rounds=config.run.rounds,
        seed=config.run.seed,
        clients=config.data.count,
        clients_per_round=config.run.clients_per_round,
        deadline_s=config.run.deadline_s,
        quorum=config.run.quorum,
        max_update_norm=config.run.max_update_norm,
        evaluate_every=config.run.evaluate_every,
        evaluate_clients=config.data.holdout > 0,
        secagg=terms.make_exchange(config),
    )


@dataclass(frozen=True)
class Session:
    """The rounds of a run over its clients."""

    world: World
    folder: Path
    federation: Federation
    record: Listener
    fit_baselines: Callable[[], dict[str, Any]] = dict
    best: Best | None = None
    traffic: Traffic | None = None

    def play(self, server: ServerState) -> ServerState:
        """The state after all that is left."""
        if self.world.config.continual.body is None:
            return self.play_rounds(server, self.world.config.run.rounds)
        return sequence.run(self.world, server, self.play_rounds, self.ask_for_sums, self.record, self.save)

    def play_rounds(self, server: ServerState, until: int) -> ServerState:
        """The state after round `until`, or where the run ends before: by one call of the strategy where clients are
        steady and every round will be played, else one a round.
        """
        world, federation = self.world, self.federation
        evaluate = None if world.strategy.keeps else partial(results.score, world)  # where there is a single model
        at_once = federation.steady and world.config.run.patience is None and self.traffic is None
        if self.traffic is not None:
            self.traffic.require_room(world.strategy, server)
        while server.round < until and not self.is_exhausted(server):
            number = server.round + 1
            # The last round is always evaluated, also where the traffic makes it the last.
            full = self.traffic is not None and not self.traffic.has_room(world.strategy, server, rounds=2)
            last = number if full else until
            kept = None if federation.steady else self.folder
            again, clients = 0 if federation.steady else AGAIN, self.count_awaited(number)
            rules = replace(rules_of(world.config), rounds=last, clients=clients, folder=kept, again=again)
            # Sites come and go, so each round asks anew who is there; one that is tried again must not repeat others.
            server = self.attempt(
                number,
                partial(
                    world.strategy.run,
                    federation.grid,
                    server,
                    rules,
                    stop=until if at_once else number,
                    codec=federation.codec,
                    evaluate=evaluate,
                    record=self.record_round,
                    after_round=self.save,
                ),
            )
        return server

    def count_awaited(self, number: int) -> int:
        """Clients that must be there before a round begins."""
        section, count = self.world.config.run, self.world.config.data.count
        if self.federation.steady or number == 1:
            return count
        return math.ceil(section.quorum * min(count, section.clients_per_round or count))

    def ask_for_sums(self, number: int, *what: Any) -> exchange.Answers:
        """Every client's sums over the records of a task (`exchange.ask_for_sums`)."""
        config = self.world.config
        # Of all clients, not of those that a round asks: the sums are over all records of a task.
        count = config.data.count if self.federation.steady else math.ceil(config.run.quorum * config.data.count)
        return self.attempt(
            number,
            partial(
                exchange.ask_for_sums,
                self.federation.grid,
                self.federation.codec,
                sequence.require_sequence(self.world.strategy),
                replace(rules_of(config), clients=count, folder=None if self.federation.steady else self.folder),
                self.record,
                number,
                *what,
            ),
        )

    def attempt(self, number: int, act: Callable[[], T]) -> T:
        """What `act` returns; where clients come and go a round that failed is tried again, after a pause."""
        failures = 0
        while True:
            try:
                return act()
            except RoundFailed as error:
                if self.federation.steady:
                    raise
                failures += 1
                self.record({"event": "round_failed", "round": number, "reason": str(error)})
                if failures == TRIES:
                    raise
                log.warning("%s It is tried again in %g s.", error, PAUSE_S)
                time.sleep(PAUSE_S)

    def record_round(self, event: Event) -> None:
        """Record an event; a round's also with what the federation knows of that round."""
        about = self.federation.describe_round(event) if event["event"] == "round" else {}
        if self.best is not None:
            self.best.hear(event)
        if self.traffic is not None:
            self.traffic.hear(event)
        self.record({**event, **about})
        # After the first round, which needs none of it, and before its checkpoint: a run that goes on has it.
        if event["event"] in ("round", "round_dropped") and event["round"] == 1 and len(self.world.test):
            self.record({"event": "baselines", **comparators.constant(self.world), **self.fit_baselines()})

    def is_exhausted(self, server: ServerState) -> bool:
        """Whether the run ends before its last round."""
        return is_exhausted(self.world, server, self.best, self.traffic)

    def save(self, server: ServerState) -> None:
        """Write a checkpoint where one is due: a run goes on from there, and repeats what came after."""
        section, checkpoints = self.world.config.run, self.folder / "checkpoints"
        if self.best is not None:
            self.best.keep(server, checkpoints)
        last = server.round == section.rounds or self.is_exhausted(server)
        if server.round % section.checkpoint_every == 0 or last:
            checkpoint.write(checkpoints, server, section.keep_checkpoints)
