"""A run in the terminal while its rounds pass."""

from __future__ import annotations

import signal
import statistics
from pathlib import Path
from typing import Any

from fedpeft import folders
from fedpeft.cli import console, logged
from fedpeft.errors import RunError, Stopped
from fedpeft.files import explain_error
from fedpeft.record.words import show_duration

RECENT = 10  # rounds whose median length says how long the others will take
LOADING = "loading model and data"


class Progress:
    """A progress bar over rounds, fed with a run's events; one line a round where there is no terminal."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: Any = None
        self.task: Any = None
        self.rounds = 0
        self.folder: Path | None = None
        self.seconds: list[float] = []

    def __enter__(self) -> Progress:
        if not self.quiet and console.err.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=console.err,
            )
            self.bar.start()
            self.task = self.bar.add_task(LOADING, total=None)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.bar:
            self.bar.stop()
        # After the bar, which would draw over it.
        logged.sum_up()
        # From Python, where no handler of ours has made a `Stopped` of it.
        if isinstance(error, KeyboardInterrupt):
            error = Stopped(signal.SIGINT)
        if isinstance(error, Stopped):
            error.advice = folders.advice(self.folder) if self.folder else ""
            raise error
        if isinstance(error, OSError) and self.folder is not None:
            raise RunError(f"{explain_error(error)} {folders.advice(self.folder)}") from error

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "folder":
            self.folder = Path(event["path"])
            if not (self.quiet or event["given"]):
                console.note(f"run folder {self.folder}")
            if not (self.quiet or self.bar):
                console.note(LOADING)
            return
        if self.quiet:
            return
        if event["event"] == "start":
            self.rounds = event["rounds"]
            text = f"{event['strategy']}, {event['clients']} clients, {event['trainable_parameters']:,} parameters each"
        elif event["event"] == "round":
            accuracy = event.get("accuracy", event.get("client_accuracy"))
            text = f"round {event['round']}/{self.rounds}, {self._time_of(event)}: {len(event['clients'])} clients"
            text += f", train loss {event['train_loss']:.3f}" if "train_loss" in event else ""
            text += f", accuracy {accuracy:.1%}" if accuracy is not None else ""
            if (adapted := event.get("client_tta_accuracy")) is not None:
                text += f"; on the clients' streams {event['client_tta_source_accuracy']:.1%}, adapted {adapted:.1%}"
        else:
            return
        if self.bar:
            self.bar.update(self.task, description=text, completed=event.get("round", 0), total=self.rounds or None)
        else:
            console.note(text)

    def _time_of(self, event: dict[str, Any]) -> str:
        """How long the round took, and how long all that are left would take."""
        self.seconds.append(event["seconds"])
        left = statistics.median(self.seconds[-RECENT:]) * (self.rounds - event["round"])
        return f"{event['seconds']:.1f} s" + (f", {show_duration(left)} left" if left >= 1 else "")
