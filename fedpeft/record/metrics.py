"""The record of a run: one JSON object per event in `metrics.jsonl`, and the summary that follows from it.

Every event has `event` (its kind) and `time` (unix seconds); what happens in a round has `round`, and round 0 is the
model before any training. `time` and `seconds` are the only values that a resumed run does not repeat.

JSON has no NaN and no infinity. A number that is not finite is written as null, and `<key>_nonfinite` beside it says
what it was ("nan", "inf" or "-inf"); inside a list it is only null.

    >>> make_finite({"loss": float("nan"), "accuracy": 0.5})
    {'loss': None, 'loss_nonfinite': 'nan', 'accuracy': 0.5}
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedpeft.errors import InputError
from fedpeft.files import blame_file, write_bytes
from fedpeft.record import findings
from fedpeft.record.findings import SERVER as SERVER
from fedpeft.record.lead import write_headline

log = logging.getLogger("fedpeft")

Event = dict[str, Any]
CLIENTS = "clients' held-out records"
CHECKPOINTED = ("round", "round_dropped")  # what a checkpoint may follow


class Recorder:
    """Appends events to a file, opened for each, so that a killed process loses at most the line it was writing.

    The event that ends a round is also forced to the disk: a checkpoint written after it is never ahead of the record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mine = False

    def record(self, event: Event) -> None:
        """Append one event.

        Raises:
            InputError: the file already holds a run and `resume` was not called.
        """
        if not self._mine and self.path.exists() and self.path.stat().st_size > 0:
            raise InputError(f"{self.path}: already holds the events of a run; resume it or choose another folder.")
        line = json.dumps({**make_finite(event), "time": round(time.time(), 3)}, allow_nan=False)
        with blame_file(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            # Only these cost a sync: all others that are lost come again with their round.
            if event["event"] in CHECKPOINTED:
                file.flush()
                os.fsync(file.fileno())
        self._mine = True

    def resume(self, number: int, again: Callable[[Event], bool] = lambda event: False) -> None:
        """Cut the file back to what was recorded up to the end of round `number`, and go on from there.

        What goes: the first event of a later round and all that follows it, the end of a finished run, a torn line.

        Args:
            again: events that will be recorded once more, and so go too.

        Raises:
            InputError: the file is missing or broken, or does not reach round `number`.
        """
        kept: list[Event] = []
        for event in read(self.path):
            if event["event"] == "end" or event.get("round", 0) > number:
                break
            if not again(event):
                kept.append(event)
        reached = max((event["round"] for event in kept if event["event"] in CHECKPOINTED), default=0)
        if reached < number:
            raise InputError(f"{self.path}: ends in round {reached}; the checkpoint is of round {number}.")
        write_bytes(self.path, "".join(json.dumps(event) + "\n" for event in kept).encode())
        self._mine = True


def make_finite(value: Any) -> Any:
    """JSON-ready copy of `value` in which every number is finite (see the module's docstring)."""
    if isinstance(value, dict):
        copy: dict[str, Any] = {}
        for key, item in value.items():
            copy[key] = make_finite(item)
            if isinstance(item, float) and not math.isfinite(item):
                copy[f"{key}_nonfinite"] = str(float(item))
        return copy
    if isinstance(value, list | tuple):
        return [make_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read(path: Path) -> list[Event]:
    """All events of a file. A torn last line, left by a run that was killed while writing, is skipped with a warning.

    Raises:
        InputError: there is no such file, or another line than the last is not an event; names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
    torn = lines.pop()  # what follows the last newline: empty unless the writer was killed
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}: line {number} is not JSON: {error}.") from error
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            raise InputError(f"{path}: line {number} is not an event (an object with the key `event`): {line[:80]}")
        events.append(event)
    if torn:
        log.warning("%s: the last line is incomplete and was skipped: %s", path, torn[:80])
    return events


def evaluations(events: list[Event]) -> tuple[str, list[Event]]:
    """Where the run's models were evaluated, and `{round, accuracy, loss}` of each evaluated round after 0.

    A personalised run (the start event says `personalised`, or no round scored a global model) has no global model
    worth a score: its accuracy is the mean over clients, each with its own model on its own held-out records.
    """
    rounds = [event for event in events if event["event"] == "round"]
    scored = {prefix: [event for event in rounds if _has_scores(event, prefix)] for prefix in ("", "client_")}
    start = next((event for event in events if event["event"] == "start"), {})
    prefix = "client_" if start.get("personalised", not scored[""] and bool(scored["client_"])) else ""
    return (CLIENTS if prefix else SERVER), [_scores_of(event, prefix) for event in scored[prefix]]


def baseline(events: list[Event]) -> Event | None:
    """`{round: 0, accuracy, loss, evaluated_on}` of the model before training, null when it was not evaluated.

    In a personalised run all clients have the same model then, so it may be scored on the server's test set instead.
    """
    where, _ = evaluations(events)
    event = next((event for event in events if event["event"] == "evaluate" and event.get("round") == 0), None)
    if event is None:
        return None
    if where == CLIENTS and _has_scores(event, "client_"):
        return {**_scores_of(event, "client_"), "evaluated_on": CLIENTS}
    return {**_scores_of(event, ""), "evaluated_on": SERVER}


def _has_scores(event: Event, prefix: str) -> bool:
    return f"{prefix}accuracy" in event or f"{prefix}loss" in event


def _scores_of(event: Event, prefix: str) -> Event:
    return {"round": event["round"], "accuracy": event.get(f"{prefix}accuracy"), "loss": event.get(f"{prefix}loss")}


def summarise(events: list[Event], config_tree: dict[str, Any], extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `summary.json` holds, JSON-ready.

    `final` and `best` are `{accuracy, loss, round}`, null before the first evaluation; best has the highest accuracy
    (where there is none, the lowest loss), the earliest of equals. `baseline` is round 0, before training.
    `accuracy_by_round` runs beside `evaluated_rounds`. `rounds` counts complete rounds, `seconds` is their sum, however
    often the run was resumed. `bytes_up` and `bytes_down` are payload totals. `epsilon_max` is the largest one of the
    round events, null when `privacy.unit` is none. `headline` is what the report and the terminal say first. What
    `findings` adds: `test_records`, `standard_error`, `last_rounds`, `baselines`, `comparison`, `updates`, `metric`
    (the config's `run.metric`), `measures` (`measured.table`), `by_class` and, of a sequence of tasks, `sequence`.
    There `final` is the answering head's, over all classes so far; what would join
    unlike classes (`best`, `accuracy_by_round`) is null, and stands with its classes in `sequence.trained_classifier`.

    Args:
        events: as `read` returns them.
        config_tree: the resolved config as nested dicts.
        extra: more entries; they win over computed ones.

    Raises:
        InputError: there is no start event, or an event lacks a key.
    """
    start = next((event for event in events if event["event"] == "start"), None)
    if start is None:
        raise InputError("events: there is no start event, so this is not the record of a run.")
    rounds = [event for event in events if event["event"] == "round"]
    evaluated_on, scores = evaluations(events)
    try:
        summary = {
            "strategy": start["strategy"],
            "engine": start["engine"],
            "seed": start["seed"],
            "rounds": rounds[-1]["round"] if rounds else 0,
            "clients": start["clients"],
            "trainable_parameters": start["trainable_parameters"],
            "final": scores[-1] if scores else None,
            "best": _best_of(scores),
            "baseline": baseline(events),
            "evaluated_on": evaluated_on,
            "evaluated_rounds": [score["round"] for score in scores],
            "accuracy_by_round": [score["accuracy"] for score in scores],
            "bytes_up": sum(event["bytes_up"] for event in rounds),
            "bytes_down": sum(event["bytes_down"] for event in rounds),
            "seconds": round(sum(event["seconds"] for event in rounds), 3),
            "quarantined": [
                {key: event[key] for key in ("round", "client", "reason")}
                for event in events
                if event["event"] == "quarantine"
            ],
            "dropped_rounds": [
                {key: event[key] for key in ("round", "reason")}
                for event in events
                if event["event"] == "round_dropped"
            ],
            "epsilon_max": _highest_epsilon(rounds, config_tree),
        }
    except KeyError as error:
        raise InputError(f"events: a start, round or quarantine event lacks the key {error}.") from error
    merged = {**summary, **findings.of(events, config_tree, summary), **(extra or {})}
    whole: dict[str, Any] = make_finite({"headline": write_headline(merged, config_tree), **merged})
    return whole


def _best_of(scores: list[Event]) -> Event | None:
    with_accuracy = [score for score in scores if score["accuracy"] is not None]
    if with_accuracy:
        return max(with_accuracy, key=lambda score: score["accuracy"])
    return min((score for score in scores if score["loss"] is not None), key=lambda score: score["loss"], default=None)


def _highest_epsilon(rounds: list[Event], config_tree: dict[str, Any]) -> float | None:
    if config_tree.get("privacy", {}).get("unit", "none") == "none":
        return None
    return max((event["epsilon_max"] for event in rounds if event.get("epsilon_max") is not None), default=None)
