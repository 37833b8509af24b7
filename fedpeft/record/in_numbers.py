"""A run's summary as rows of words and numbers, each number with its unit."""

from __future__ import annotations

from typing import Any

from fedpeft.record import lead
from fedpeft.record.findings import NAMES
from fedpeft.record.run_folder import Run
from fedpeft.record.words import key_words, number, percent, show_seconds, size

APART = (
    "answers",
    "privacy",
    "continual",
    "sequence",
    "tta",
    "headline",
    "comparison",
    "owner",
    "measures",
    "by_class",
    "unlearning",
    "strategy",
    "engine",
    "seed",
    "rounds",
    "clients",
    "trainable_parameters",
    "evaluated_on",
    "test_records",
    "final",
    "best",
    "baseline",
    "baselines",
    "last_rounds",
    "standard_error",
    "bytes_up",
    "bytes_down",
    "seconds",
    "epsilon_max",
)  # have a place of their own


def summary_rows(run: Run) -> list[list[str]]:
    """The run in numbers, each with its unit; what is no number of every run comes last."""
    summary = run.summary
    rows = [
        ["strategy", str(summary["strategy"])],
        ["engine", str(summary["engine"])],
        ["seed", number(summary["seed"])],
        ["rounds", number(summary["rounds"])],
        ["clients", number(summary["clients"])],
        ["trained parameters of a client", number(summary["trainable_parameters"])],
        ["evaluated on", f"{summary['evaluated_on']}{_count_of(summary)}"],
        ["after the last round", _show_score(summary["final"])],
        ["best round, picked on the same records", _show_score(summary["best"])],
        ["before training", _show_score(summary["baseline"])],
        ["mean of the last rounds", percent((summary.get("last_rounds") or {}).get("accuracy"))],
        ["standard error", percent(summary.get("standard_error"))],
        *([words, percent(value)] for words, value in _baselines_of(summary)),
        ["clients to server", size(summary["bytes_up"] or None)],
        ["server to clients", size(summary["bytes_down"] or None)],
        ["time of the rounds", show_seconds(summary["seconds"]) if summary["rounds"] else "–"],
        ["from start to end", show_seconds(run.wall_seconds)],
        ["epsilon, the most of any client", number(summary["epsilon_max"])],
        ["quarantined updates", number(len(summary["quarantined"]))],
    ]
    rows += [
        [key_words(key), _show_fact(key, value)]
        for key, value in summary.items()
        if not isinstance(value, list) and key not in APART and value not in (None, {})
    ]
    return [row for row in rows if row[1] != "–"]


def _count_of(summary: dict[str, Any]) -> str:
    records = summary.get("test_records")
    return f", {number(records)} records" if records else ""


def _show_score(score: dict[str, Any] | None) -> str:
    """Accuracy and loss, and after which round."""
    if not score:
        return "–"
    values = [("accuracy", percent), ("loss", number)]
    shown = [f"{key} {show(score[key])}" for key, show in values if score.get(key) is not None]
    return f"{', '.join(shown)} (round {score.get('round', 0)})" if shown else "–"


def _baselines_of(summary: dict[str, Any]) -> list[tuple[str, float]]:
    """Accuracies of what needed no federation, in words; why one is missing is in summary.json."""
    given = summary["baselines"]
    return [(lead.named(key, summary), given[key]) for key in NAMES if isinstance(given.get(key), int | float)]


def _show_fact(key: str, value: Any) -> str:
    if isinstance(value, dict):
        shown = ((inner, item) for inner, item in value.items() if not isinstance(item, dict) and item is not None)
        return ", ".join(f"{key_words(inner)} {_show_fact(inner, item)}" for inner, item in shown)
    if isinstance(value, list):
        return ", ".join(number(item) for item in value)
    if key.startswith("bytes_"):
        return size(value)
    return cell(key, value)


def cell(key: str, value: Any) -> str:
    """A value of a summary or table, written by what its key says that it is."""
    if key.startswith("mb_"):
        return size(None if value is None else 1e6 * value)
    if key == "seconds":
        return show_seconds(value)
    shares = (
        "accuracy",
        "standard_error",
        "_logistic",
        "largest_class",
        "local",
        "local_worst",
        "central",
        "constant",
        "frozen_head",
        "forgetting",
        "gap",
    )
    return percent(value) if key.endswith(shares) and isinstance(value, float) else number(value)
