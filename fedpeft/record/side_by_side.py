"""Several runs on one page: what they reached where they can be compared, and in what they are unlike."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from fedpeft.errors import InputError
from fedpeft.record import drawing, plots
from fedpeft.record.findings import NAMES, find_comparable
from fedpeft.record.in_numbers import cell
from fedpeft.record.made import flatten
from fedpeft.record.pages import html_figures, html_list, html_note, html_page, html_table
from fedpeft.record.run_folder import Run, label_runs, load
from fedpeft.record.words import percent

COLUMNS = {  # key of a table's row -> its head on the page
    "run": "run",
    "strategy": "strategy",
    "rounds": "rounds",
    "test_records": "n",
    "frozen_accuracy": "frozen model",
    "best_baseline_accuracy": "best without federation",
    "largest_class_accuracy": "largest class",
    "common_accuracy": "at the last common round",
    "final_accuracy": "final accuracy",
    "standard_error": "± standard error",
    "last_rounds_accuracy": "mean of the last rounds",
    "best_accuracy": "best accuracy",
    "mb_up": "up",
    "mb_down": "down",
    "seconds": "time of the rounds",
    "epsilon_max": "epsilon",
    "evaluated_on": "evaluated on",
}


def compare(runs: list[Path], out: Path) -> Path:
    """Write the page `out`: what differs, the runs in one table, their accuracies, the config keys they differ in.

    Raises:
        InputError: no run, the same run twice, or a file of a run is missing or broken; names it.
    """
    loaded = load_all(runs)
    with drawing.style():
        image = drawing.files(plots.compared(loaded))["svg"]
    rows = _build_rows(loaded)
    cells = [[cell(key, row[key]) for key in COLUMNS] for row in rows]
    body = [f'<p class="lead">{html.escape(ranking(loaded))}</p>']
    unlike = differences(loaded)
    if unlike:
        body += [
            html_note("These runs are not alike, so their accuracies may not be comparable. They differ in:"),
            html_list(unlike),
        ]
    body += ["<h2>Runs</h2>", html_table(list(COLUMNS.values()), cells)]
    body += [html_note(f"{run.label} has not ended.") for run in loaded if not run.ended]
    body += ["<h2>Baselines of each</h2>", *_baseline_rows(loaded)]
    body += ["<h2>Accuracy</h2>", html_figures({"accuracy of all runs": image}), "<h2>Config keys that differ</h2>"]
    different = _config_differences(loaded)
    body.append(html_table(["key", *(run.label for run in loaded)], different) if different else "<p>None.</p>")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html_page(f"{len(loaded)} runs", body), encoding="utf-8")
    return out


def table(runs: list[Path]) -> list[dict[str, Any]]:
    """One row a run with the keys of `COLUMNS`: numbers (accuracies in [0, 1]), null where there is none."""
    return _build_rows(load_all(runs))


def said(runs: list[Path]) -> dict[str, Any]:
    """`ranking` and `differences` of run folders."""
    loaded = load_all(runs)
    return {"ranking": ranking(loaded), "differences": differences(loaded)}


def load_all(runs: list[Path]) -> list[Run]:
    """The runs, with labels that tell them apart."""
    if not runs:
        raise InputError("report: no run folder given.")
    return [load(run, label) for run, label in zip(runs, label_runs(runs), strict=True)]


def common_round(runs: list[Run]) -> int | None:
    """The last round that all runs evaluated on like classes; None where there is none, as between sequences."""
    if any(run.summary.get("sequence") for run in runs):
        return None
    # Without round 0: before any training there is nothing to rank.
    shared = set.intersection(
        *({score["round"] for score in run.scores if score["accuracy"] is not None and score["round"]} for run in runs)
    )
    return max(shared, default=None)


def _accuracy_at(run: Run, number_of: int | None) -> float | None:
    return next((score["accuracy"] for score in run.scores if score["round"] == number_of), None)


def ranking(runs: list[Run]) -> str:
    """The runs from the highest accuracy to the lowest, at the last round that all of them evaluated."""
    at = common_round(runs)
    values = {
        run.label: _accuracy_at(run, at) if at is not None else (run.summary["final"] or {}).get("accuracy")
        for run in runs
    }
    order = sorted((item for item in values.items() if item[1] is not None), key=lambda item: -(item[1] or 0.0))
    if not order:
        return "No run has an accuracy."
    when = f"At round {at}, the last that all evaluated" if at is not None else "At the end of each"
    errors = [run.summary["standard_error"] for run in runs if run.summary.get("standard_error") is not None]
    error = f" (one standard error is up to {100 * max(errors):.1f} points)" if errors else ""
    return f"{when}: {', '.join(f'{name} {percent(value)}' for name, value in order)}{error}."


def differences(runs: list[Run]) -> list[str]:
    """What has to be alike for accuracies to be compared and is not: a line each, with every run's value."""
    lines = []
    for name, values in _find_conditions(runs).items():
        if len(set(values)) > 1:
            each = "; ".join(f"{run.label} {value}" for run, value in zip(runs, values, strict=True))
            lines.append(f"{name}: {each}")
    return lines


def _find_conditions(runs: list[Run]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for run in runs:
        data, model, split = run.config.get("data") or {}, run.config.get("model") or {}, run.split or {}
        start = next(event for event in run.events if event["event"] == "start")
        sequence = run.summary.get("sequence")
        classes = (split.get("histogram") or {}).get("labels")
        for name, value in {
            "rounds": run.summary["rounds"],
            "clients": run.summary["clients"],
            "data source": data.get("source"),
            "training records (fingerprint)": _shorten_hash(split.get("fingerprint")),
            "test set (fingerprint)": _shorten_hash(start.get("test_fingerprint")),
            "test records": run.summary.get("test_records"),
            "classes": None
            if classes is None
            else f"{len(classes)} ({', '.join(map(str, classes[:5]))}{', ...' if len(classes) > 5 else ''})",
            "tasks": sequence["tasks"] if sequence else "no sequence",
            "classes at the end": sequence["classes"] if sequence else "all",
            "model": model.get("name"),
            "task of the model": model.get("task"),
            "evaluated on": run.summary["evaluated_on"],
        }.items():
            found.setdefault(name, []).append("unknown" if value is None else str(value))
    return found


def _shorten_hash(fingerprint: Any) -> str | None:
    return None if fingerprint is None else str(fingerprint)[:12]


def _build_rows(runs: list[Run]) -> list[dict[str, Any]]:
    at = common_round(runs)
    return [{**_build_row(run), "common_accuracy": _accuracy_at(run, at)} for run in runs]


def _build_row(run: Run) -> dict[str, Any]:
    summary = run.summary
    accuracy = {
        key: (summary[key] or {}).get("accuracy") for key in ("baseline", "final", "best", "comparison", "last_rounds")
    }
    return {
        "run": run.label,
        "strategy": summary["strategy"],
        "rounds": summary["rounds"],
        "test_records": summary["test_records"],
        "frozen_accuracy": accuracy["baseline"],
        "best_baseline_accuracy": accuracy["comparison"],
        "largest_class_accuracy": (summary["comparison"] or {}).get("constant"),
        "final_accuracy": accuracy["final"],
        "standard_error": summary["standard_error"],
        "last_rounds_accuracy": accuracy["last_rounds"],
        "best_accuracy": accuracy["best"],
        "mb_up": summary["bytes_up"] / drawing.MB,
        "mb_down": summary["bytes_down"] / drawing.MB,
        "seconds": summary["seconds"],
        "epsilon_max": summary["epsilon_max"],
        "evaluated_on": summary["evaluated_on"],
    }


def _baseline_rows(runs: list[Run]) -> list[str]:
    """A row for each model that no federation trained; columns are runs."""
    rows = []
    for key in NAMES:
        values = [find_comparable(run.summary).get(key) for run in runs]
        if any(value is not None for value in values):
            rows.append([NAMES[key], *map(percent, values)])
    return [html_table(["", *(run.label for run in runs)], rows)] if rows else ["<p>None was computed.</p>"]


def _config_differences(runs: list[Run]) -> list[list[str]]:
    """Rows `key, value in each run` of the dotted config keys that are not the same in all runs."""
    flat = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for tree in flat for key in tree)
    rows = [[key, *(tree.get(key, "–") for tree in flat)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]
