"""Tables of the deployment's commands, and the live table of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fedpeft.cli import console
from fedpeft.cli.console import out

COLORS = {"done": "green", "running": "cyan", "waiting": "yellow", "failed": "red", "stopped": "red", "online": "green"}
ROUNDS = 8  # newest rounds in the live table


def checks(result: dict[str, Any]) -> None:
    """Print a line for each check: whether it passed, its name, and what was seen."""
    for row in result["checks"]:
        out.print("ok  " if row["ok"] else "FAIL", style="green" if row["ok"] else "bold red", end=" ")
        out.print(f"{row['check']:<7} {row['seen']}", soft_wrap=True)


def policies(result: dict[str, Any]) -> None:
    """Print what each policy file allows, in sentences under the file's path."""
    for entry in result["policies"]:
        out.print(entry["file"], style="bold", soft_wrap=True)
        for line in entry["says"]:
            out.print(f"  {line}", soft_wrap=True)


def sites(result: dict[str, Any]) -> None:
    """Print the registered sites and their status, and first, if so, that the coordinator is not running."""
    if not result["running"]:
        out.print("the coordinator is not running", style="yellow")
    table = Table("site", "status", box=None, padding=(0, 3, 0, 0))
    for row in result["sites"]:
        table.add_row(row["name"], _color_word(row["status"]))
    out.print(table)


def status(result: dict[str, Any]) -> None:
    """Print the sites, then every run with its newest rounds."""
    sites(result)
    for entry in result["runs"]:
        out.print()
        run(entry)


def run(entry: dict[str, Any]) -> None:
    """One run: a line, and its newest rounds if they are known."""
    if "state" not in entry:
        console.pairs(entry)
        return
    out.print(entry["run"], _color_word(entry["state"]), f"round {entry['round']} of {entry['rounds']}", sep="  ")
    if entry.get("reason"):
        out.print(entry["reason"], soft_wrap=True)
    if entry.get("history"):
        out.print(rounds(entry["history"]))


def rounds(history: list[dict[str, Any]]) -> Table:
    """The newest rounds: who took part, who was left out and why."""
    table = Table("round", "sites", "left out", "seconds", "accuracy", box=None, padding=(0, 3, 0, 0))
    for event in history[-ROUNDS:]:
        left = "; ".join(f"{name}: {reason}" for name, reason in (event.get("quarantined") or {}).items())
        accuracy = event.get("accuracy")
        seconds = event.get("seconds")
        table.add_row(
            str(event["round"]),
            ", ".join(event["clients"] or []),
            left or "-",
            "-" if seconds is None else f"{seconds:.1f}",
            "-" if accuracy is None else f"{accuracy:.1%}",
        )
    return table


def text(result: dict[str, Any]) -> None:
    """Print a log as it is, with no line broken or coloured."""
    out.print(result["log"], highlight=False, soft_wrap=True, end="")


class FleetWatch:
    """The live table of a run's rounds and sites, fed with its events; one line an event where there is no terminal."""

    def __init__(self, folder: Path, run: str, quiet: bool) -> None:
        self.run, self.quiet = run, quiet
        self.history: list[dict[str, Any]] = []
        self.live: Any = None

    def __enter__(self) -> FleetWatch:
        if not self.quiet and console.err.is_terminal:
            from rich.live import Live

            self.live = Live(f"{self.run}: submitted", console=console.err, refresh_per_second=4)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        if self.quiet:
            return
        if event["event"] == "round":
            self.history.append(event)
        if self.live:
            self.live.update(rounds(self.history))
        elif event["event"] == "round":
            console.err.print(f"round {event['round']}: {', '.join(event['clients'])}")
        elif event["event"] == "task":
            right, count = sum(event["right"][: event["task"] + 1]), sum(event["count"][: event["task"] + 1])
            console.err.print(f"task {event['task']}: {right} of {count} right in all tasks so far")
        elif event["event"] in ("quarantine", "late", "round_failed", "sums_missing"):
            who, reason = event.get("client", ""), event.get("reason") or event.get("error") or "too late"
            console.err.print(f"{event['event']} {who}: {reason}", soft_wrap=True)


def _color_word(word: str) -> Text:
    return Text(word, COLORS.get(word, ""))
