"""The best state of a run by the clients' held-out records, kept apart, and a stop where it gets no better.

    run.best=METRIC     after an evaluated round that is better than all before: best/round-000007, as a checkpoint
    run.patience=N      the run ends after N evaluated rounds that are not

The test set is not asked: the best of many rounds on it would be chosen by what is to measure it. What is best follows
from the record of the rounds alone, so a resumed run chooses as one that was not interrupted.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpeft import registry
from fedpeft.config import Config
from fedpeft.errors import InputError, RunError
from fedpeft.objectives.base import load_objective
from fedpeft.record import checkpoint, metrics
from fedpeft.state import ServerState
from fedpeft.strategies.build import build

FOLDER = "best"
Event = dict[str, Any]


def check(config: Config) -> None:
    """Refuse a choice without records to choose by, or without one model to choose."""
    metric = config.run.best
    if metric is None:
        if config.run.patience is not None:
            raise InputError(
                f"run.patience={config.run.patience}: it counts rounds that are no better by run.best, which is null. "
                "Set run.best=loss."
            )
        return
    measures = load_objective(config.model.task).all_measures
    if metric not in measures:
        raise InputError(registry.unknown(f"run.best (of {config.model.task})", metric, measures))
    where = f"run.best={metric}"
    if config.continual.body is not None:
        raise InputError(
            f"{where}: with continual.body={config.continual.body} rounds are of unlike tasks. Set it to null."
        )
    if not config.data.holdout:
        raise InputError(
            f"{where}: the best is chosen by records of the clients that are kept for it, and data.holdout=0 keeps "
            "none. Set data.holdout=0.1; the test set only measures what was chosen."
        )
    private, further = config.privacy.unit == "sample", metric not in ("accuracy", "loss")
    if private and (further or not config.privacy.release_metrics):
        raise InputError(
            f"{where}: private clients send accuracy and loss alone, and only with privacy.release_metrics=true, which "
            "no guarantee covers. Set that and run.best=loss, or run.best=null."
        )
    if build(config).keeps:
        raise InputError(
            f"{where}: with strategy {config.strategy.name} each client has a model of its own, so there is no "
            "best state of all. Set it to null."
        )


@dataclass
class Best:
    """What a run has scored so far.

    Attributes:
        folder: where the best state is kept.
        scores: the metric by evaluated round, in their order.
        planned: rounds of the config.
    """

    folder: Path
    metric: str
    higher: bool
    patience: int | None
    planned: int
    scores: dict[int, float] = field(default_factory=dict)

    @classmethod
    def open(cls, config: Config, run: Path) -> Best | None:
        """That of a run, by what it has recorded; None where no best is asked for."""
        metric = config.run.best
        if metric is None:
            return None
        higher = load_objective(config.model.task).all_measures[metric].higher
        best = cls(run / FOLDER, metric, higher, config.run.patience, config.run.rounds)
        for event in metrics.read(run / "metrics.jsonl"):
            best.hear(event)
        return best

    def hear(self, event: Event) -> None:
        """Take a round's score.

        Raises:
            RunError: it was evaluated, and no client has sent the metric.
        """
        # A round without any score was not evaluated (`run.evaluate_every`); one without this score is an error.
        if event["event"] != "round" or not any(key.startswith("client_") for key in event):
            return
        key = f"client_{self.metric}"
        if key not in event:
            raise RunError(
                f"round {event['round']}: no client has sent {self.metric}, by which run.best chooses. Their policies "
                "may not allow it. Start the run again with another metric, or run.best=null."
            )
        # A number that is not finite is null in the record.
        self.scores[event["round"]] = math.nan if event[key] is None else float(event[key])

    def find_round(self, until: int) -> int | None:
        """The best round of those up to `until`, the earliest of equals; None before the first score."""
        best: int | None = None
        for number, score in self.scores.items():
            if number <= until and math.isfinite(score) and (best is None or self._is_better(score, self.scores[best])):
                best = number
        return best

    def _is_better(self, score: float, other: float) -> bool:
        return score > other if self.higher else score < other

    def is_exhausted(self, until: int) -> bool:
        """Whether `run.patience` evaluations have passed since the best one."""
        best = self.find_round(until) or 0
        return self.patience is not None and sum(best < number <= until for number in self.scores) >= self.patience

    def keep(self, server: ServerState, checkpoints: Path) -> None:
        """Keep the state if it is the best so far; drop what no checkpoint goes back to."""
        if self.find_round(server.round) != server.round:
            return
        # All stay for now: which of them a resume may still need is found out below.
        checkpoint.write(self.folder, server, keep=None)
        # A run that goes on from an older checkpoint has the best of that one still to beat.
        resumed = checkpoint.rounds(checkpoints)[-checkpoint.RESUMED :]
        needed = {self.find_round(number) for number in [*resumed, server.round]}
        for number in set(checkpoint.rounds(self.folder)) - needed:
            for path in checkpoint.of_round(self.folder, number):
                shutil.rmtree(path)

    def describe(self, done: int) -> dict[str, Any]:
        """What was chosen, for the summary; `stopped` says whether the run ended before its last round."""
        number = self.find_round(done)
        return {
            "metric": self.metric,
            "round": number,
            "value": None if number is None else self.scores[number],
            "evaluations": len(self.scores),
            "patience": self.patience,
            "stopped": done < self.planned,
            "rounds": self.planned,
        }
