"""A run followed by its record: what `metrics.jsonl` says while it is written, and after the fact.

A `Follower` reads what the file has gained since its last look, and keeps of it what a page shows: a slim event for
each round, a few numbers for each client. So 2,000 clients over 1,000 rounds cost their lines once. A torn last line
waits for its end. A file that was cut back or begun anew, as `resume` does, is read from its start.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from fedpeft import folders
from fedpeft.errors import InputError
from fedpeft.record import lead, metrics, run_folder
from fedpeft.record.metrics import Event
from fedpeft.record.run_folder import Run

RECENT = 10  # rounds whose median length says how fast a run goes
TAIL = 64  # bytes before the offset by which a file is known again
KEPT_WHOLE = ("start", "evaluate", "baselines", "task", "round_dropped", "round_failed", "end")
SCORED = ("round", "evaluate")
NUMBERS = ("accuracy", "loss", "train_loss", "bytes_up", "bytes_down", "seconds", "epsilon_max")
WHOLE = {"start": ("clients", "rounds"), "task": ("task",)}
NUMBERED = ("round", "quarantine", "task", "round_dropped", "round_failed", "end")
LARGEST, LATEST = 1e15, 1e11  # of any number; of a time, which is in seconds
UNDER_WAY = ("running", "waiting", "not ended")


@dataclass
class Client:
    """What is known of a client. `seen` is when it last answered, in unix seconds."""

    rounds: int = 0
    last_round: int | None = None
    seen: float | None = None
    quarantined: int = 0
    quarantined_last: int | None = None
    reason: str | None = None
    far: int = 0
    late: int = 0
    failed: str | None = None
    accuracy: float | None = None
    epsilon: float | None = None
    treated: str | None = None

    @property
    def is_quarantined(self) -> bool:
        """Whether its last update was refused."""
        return self.quarantined_last is not None and self.quarantined_last > (self.last_round or 0)


class Follower:
    """One run folder. `version` changes with all that `state` says.

    Args:
        label: the run's shortest name that no other run has.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.path, self.label = path, label
        self.begun_anew = 0
        self.problem, self.status = "", ("not begun", "")
        self._names: tuple[float, dict[str, str]] = (0.0, {})
        self._forget_all()

    def _forget_all(self) -> None:
        self.events: list[Event] = []
        self._scored: list[
            Event
        ] = []  # of the last two rounds: a summary needs those of the round that was scored last
        self.clients: dict[str, Client] = {}
        self.last_event: float | None = None
        self.offset, self._end, self._lines = 0, b"", 0
        self._unread: list[int] = []
        self.begun_anew += 1

    # Reading ----------------------------------------------------------------------------------------------------------

    def look(self) -> tuple[Any, ...]:
        """Take in what was recorded since the last look; the version of what is known now."""
        problem = ""
        try:
            with (self.path / "metrics.jsonl").open("rb") as file:
                if not self._is_continued(file):
                    self._forget_all()
                self._read(file)
        except FileNotFoundError:
            if self.offset:
                self._forget_all()
        except OSError as error:
            problem = f"metrics.jsonl cannot be read: {error.strerror}."
        self.problem = problem
        self.status = self._status_of()
        return (self.begun_anew, self.offset, problem, *self.status)

    def _is_continued(self, file: BinaryIO) -> bool:
        """Whether the file still has what was read last where it was read."""
        file.seek(self.offset - len(self._end))
        return file.read(len(self._end)) == self._end

    def _read(self, file: BinaryIO) -> None:
        file.seek(self.offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            self.offset += len(line)
            self._end = line[-TAIL:]
            self._lines += 1
            try:
                # Whatever a line holds, it is counted and said: the page, and other runs on it, go on.
                self._hear(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
                self._unread.append(self._lines)

    def _hear(self, event: Event) -> None:
        kind, at = event["event"], float(event["time"])
        event["time"] = at
        for key in [*(["round"] if kind in NUMBERED else []), *WHOLE.get(kind, ())]:
            event[key] = int(event[key])
        if not 0 <= at <= LATEST or not all(abs(value) <= LARGEST for value in event.values() if _is_number(value)):
            raise ValueError("a number that nothing of a run has")
        if kind in SCORED and not all(event.get(key) is None or _is_number(event[key]) for key in NUMBERS):
            raise TypeError("no number")
        if kind == "round":
            self._hear_round(event, at)
        elif kind == "clients_evaluated":
            for name, scores in event["clients"].items():
                self._note_answer(name, at).accuracy = scores.get("accuracy")
            self._scored = [*self._scored[-1:], event]
        elif kind == "sums":
            for name in event["clients"]:
                self._note_answer(name, at)
        elif kind == "late":
            self._note_answer(str(event["client"]), at).late += 1
        elif kind in ("evaluation_failed", "sums_missing"):
            self._client(str(event["client"])).failed = f"{event['reason']}"
        elif kind == "quarantine":
            self._hear_quarantine(event)
        if kind in KEPT_WHOLE:
            self.events.append(event)
        self.last_event = at

    def _hear_round(self, event: Event, at: float) -> None:
        number, used = event["round"], event["clients"]
        for name in used:
            client = self._note_answer(name, at)
            client.rounds, client.last_round = client.rounds + 1, number
        for name in event.get("far_updates", {}):
            self._client(name).far += 1
        for name, spent in (event.get("epsilon_by_client") or {}).items():
            if name in self.clients:
                self.clients[name].epsilon = float(spent)
        for name, what in event.get("treated", {}).items():
            self._client(name).treated = str(what)
        kept = {key: value for key, value in event.items() if not isinstance(value, dict | list)}
        named = {key: event[key] for key in ("far_updates", "treated", "by_class") if event.get(key)}
        self.events.append({**kept, **named, "used": len(used), "refused": len(event["quarantined"])})

    def _hear_quarantine(self, event: Event) -> None:
        client, number = self._client(str(event["client"])), event["round"]
        if client.quarantined_last != number:  # a round that failed is tried again under its number
            client.quarantined += 1
        client.quarantined_last, client.reason = number, str(event["reason"])

    def _client(self, name: str) -> Client:
        return self.clients.setdefault(str(name), Client())

    def _note_answer(self, name: str, at: float) -> Client:
        client = self._client(name)
        client.seen = at
        return client

    # State ------------------------------------------------------------------------------------------------------------

    def _status_of(self) -> tuple[str, str]:
        """In a word how the run is, and why. A coordinator's run has a file that says it; else its record does."""
        at_work = folders.at_work(self.path)
        said = self._coordinators_word()
        # A coordinator's run may fail after its last round, while its results are written.
        if self._events_of("end") and said.get("state") not in ("failed", "stopped"):
            return "done", ""
        if said.get("state") in ("failed", "stopped", "submitted"):
            return str(said["state"]), str(said.get("reason") or "")
        if at_work is False:
            return "interrupted", "its process is gone"
        if said.get("state") == "waiting":
            return "waiting", str(said.get("reason") or "")
        if not self._events_of("start"):
            return "not begun", "nothing is recorded yet"
        return ("running", "") if at_work else ("not ended", "whether a process works on it is not known")

    def _coordinators_word(self) -> dict[str, Any]:
        try:
            said = json.loads((self.path / "status.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return said if isinstance(said, dict) else {}

    def _events_of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["event"] == kind]

    def run(self) -> Run | None:
        """The run as its report knows it, as far as it has come; None before its start is recorded."""
        if not self._events_of("start"):
            return None
        try:
            text, config = run_folder.read_config(self.path)
            summary = run_folder.renamed(metrics.summarise([*self.events, *self._scored], config), self._owner_names())
        except Exception as error:  # a record that makes no sense must not end the page, nor those of other runs
            self.problem = f"the record has no summary: {type(error).__name__}: {error}"
            return None
        return Run(self.path, self.label, self.events, config, text, summary, None, bool(self._events_of("end")))

    def problems(self) -> list[str]:
        """What of the record could not be read or understood."""
        lines = [self.problem] if self.problem else []
        if self._unread:
            lines.append(
                f"metrics.jsonl: {len(self._unread)} lines are no events of a run and are left out; the first is line "
                f"{self._unread[0]}."
            )
        return lines

    def state(self, run: Run | None) -> dict[str, Any]:
        """All that a page shows of this run, JSON-ready; times are unix seconds."""
        word, why = self.status
        start = next(iter(self._events_of("start")), {})
        rounds = [event for event in self.events if event["event"] in ("round", "round_dropped")]
        number = rounds[-1]["round"] if rounds else 0
        pace, planned = _pace_of(rounds), start.get("rounds")
        left = None
        if word in UNDER_WAY and pace is not None and isinstance(planned, int):
            # From the last event on, not from now: a page on which nothing happened must read the same.
            left = rounds[-1]["time"] + pace * max(0, planned - number)
        summary = run.summary if run else {}
        shown: dict[str, Any] = metrics.make_finite(
            {
                "run": self.label,
                "path": str(self.path),
                "state": word,
                "reason": why,
                "advice": folders.advice(self.path) if word == "interrupted" and not self._coordinators_word() else "",
                **{key: start.get(key) for key in ("strategy", "engine", "seed")},
                "round": number,
                "rounds": planned,
                "begun": start.get("time"),
                "last_event": self.last_event,
                "seconds_per_round": pace,
                "expected_end": left,
                "headline": lead.sentences(summary, run.config) if run else [],
                "warnings": lead.list_warnings(summary),
                "problems": self.problems(),
                "evaluated_on": summary.get("evaluated_on"),
                "metric": _metric_of(start),
                "accuracy": (summary.get("final") or {}).get("accuracy"),
                "loss": (summary.get("final") or {}).get("loss"),
                "epsilon_max": summary.get("epsilon_max"),
                "bytes_up": summary.get("bytes_up"),
                "bytes_down": summary.get("bytes_down"),
                "played": self._round_rows(run),
                "failed_rounds": [
                    {key: event.get(key) for key in ("round", "reason")}
                    for event in self.events
                    if event["event"] in ("round_dropped", "round_failed")
                ],
                "sequence": summary.get("sequence"),
                "tasks": [
                    {key: event.get(key) for key in ("task", "round", "classes", "right", "count")}
                    for event in self._events_of("task")
                ],
                "expected_clients": start.get("clients"),
                "clients": self._client_rows(run),
            }
        )
        return shown

    def _round_rows(self, run: Run | None) -> list[dict[str, Any]]:
        """A row for each round, 0 first where it was evaluated."""
        scores = {score["round"]: score for score in run.scores} if run else {}
        metric = _metric_of(next(iter(self._events_of("start")), {}))
        where = "client_" if run and run.summary["evaluated_on"] == metrics.CLIENTS else ""
        rows = [] if 0 not in scores else [{"round": 0, **_pair_of(scores[0])}]
        keys = ("time", "used", "refused", "train_loss", "bytes_up", "bytes_down", "seconds", "epsilon_max", "classes")
        for event in self._events_of("round"):
            about = {key: event.get(key) for key in keys}
            about["metric"] = event.get(where + metric["name"]) if metric else None
            rows.append({"round": event["round"], **_pair_of(scores.get(event["round"], {})), **about})
        return rows

    def _client_rows(self, run: Run | None) -> dict[str, dict[str, Any]]:
        """Under the names that the report has; scores on a client's records are left out where a guarantee hides them.

        A run whose config cannot be read hides them too.
        """
        names = self._owner_names()
        hidden = run is None or run.hides_counts
        rows = {}
        for name in sorted(self.clients):
            client = self.clients[name]
            row = {key: value for key, value in vars(client).items() if key != "accuracy" or not hidden}
            rows[names.get(name, name)] = {**row, "is_quarantined": client.is_quarantined}
        return rows

    def _owner_names(self) -> dict[str, str]:
        """Read once: a split also has the places of all records."""
        try:
            written = (self.path / "split.json").stat().st_mtime
            if written != self._names[0]:
                self._names = written, run_folder.owner_names(self.path)
        except (OSError, InputError):  # no split, or one that is being written
            return {}
        return self._names[1]


def follow(runs: Iterable[Path]) -> list[Follower]:
    """A follower for each run folder, with labels that tell them apart.

    Raises:
        InputError: a folder is no run's, or is named twice.
    """
    paths = [folders.run_folder(run) for run in runs]
    if not paths:
        return []
    if len(paths) > MOST_RUNS:
        raise InputError(f"RUN: {len(paths)} run folders; at most {MOST_RUNS} can be told apart on one page.")
    return [Follower(path, label) for path, label in zip(paths, run_folder.label_runs(paths), strict=True)]


MOST_RUNS = 16  # eight colours, drawn through and dashed


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _pace_of(rounds: list[Event]) -> float | None:
    """Seconds from one round to the next, the median of the last ones: a pause before a resume does not count."""
    if len(rounds) < 2:
        return next((event.get("seconds") for event in rounds), None)
    steps = [float(after["time"] - before["time"]) for before, after in pairwise(rounds[-RECENT - 1 :])]
    return statistics.median(steps)


def _metric_of(start: Event) -> dict[str, Any] | None:
    """The measure that a run's headline names, where it is another than what every run shows."""
    name, measures = start.get("metric"), start.get("measures") or {}
    if name in ("accuracy", "loss", "perplexity") or name not in measures:
        return None
    return {"name": name, **measures[name]}


def _pair_of(score: Event) -> Event:
    return {key: score.get(key) for key in ("accuracy", "loss")}
