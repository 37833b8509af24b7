"""What a run was measured by, beside its headline: every measure on the server's records, and over the clients.

Of the clients: the mean of theirs, by their numbers of records, the worst, the 10 % quantile (of those where less is
better: the 90 % one) and the spread, which is the standard deviation over clients. A client whose records do not define
a measure is left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fedpeft.record.drawing import quantile_of
from fedpeft.record.pages import html_folded, html_table
from fedpeft.record.words import number, percent

Event = dict[str, Any]
TAIL = 0.1
PLAIN: dict[str, dict[str, Any]] = {  # of a run that was recorded before runs said what they are measured by
    "accuracy": {"words": "accuracy", "higher": True, "share": True},
    "loss": {"words": "loss", "higher": False, "share": False},
}


def table(events: list[Event], where: str, at: int | None) -> dict[str, Any]:
    """By measure: `words`, `higher`, `share`; `final`, `best`, `best_round` and `frozen` on the records of the run's
    scores; `clients` of round `at`, None where they were not evaluated. Measures that nobody took are not in it.

    Args:
        where: "" for the server's records, "client_" for the mean of the clients'.
        at: the round of the final score.
    """
    start = next((event for event in events if event["event"] == "start"), {})
    evaluated = [event for event in events if event["event"] in ("round", "evaluate")]
    clients: dict[str, Event] = next(
        (event["clients"] for event in events if event["event"] == "clients_evaluated" and event["round"] == at), {}
    )
    means = mean_over_clients([(row, row["num-examples"]) for row in clients.values()])
    rows = {}
    for name, about in (start.get("measures") or PLAIN).items():
        taken = {event["round"]: event.get(where + name) for event in evaluated}
        # Round 0 is the frozen model, and never the best round of a run.
        known = {key: value for key, value in taken.items() if value is not None and key > 0}
        each = {client: row[name] for client, row in clients.items() if row.get(name) is not None}
        if not known and not each:
            continue
        best = (max if about["higher"] else min)(known, key=lambda key: known[key], default=None)
        rows[name] = {
            **about,
            "final": known.get(at),
            "best": known.get(best),
            "best_round": best,
            "frozen": taken.get(0),
            "clients": over_clients(each, means[name], about["higher"]) if each else None,
        }
    return rows


def mean_over_clients(rows: Sequence[tuple[Mapping[str, float], float]]) -> dict[str, float]:
    """Each measure's mean over the clients that have it.

    Args:
        rows: what each client measured, and what it counts for: how many records, as a rule.

    >>> mean_over_clients([({"loss": 1.0, "f1": 0.5}, 1), ({"loss": 2.0}, 3)])
    {'f1': 0.5, 'loss': 1.75}
    """
    means = {}
    for key in sorted({key for row, _ in rows for key in row}):
        having = [(row[key], count) for row, count in rows if count > 0 and row.get(key) is not None]
        if having:
            means[key] = sum(value * count for value, count in having) / sum(count for _, count in having)
    return means


def over_clients(each: dict[str, float], mean: float, higher: bool) -> dict[str, Any]:
    """
    >>> over_clients({"a": 0.5, "b": 0.7, "c": 0.9}, 0.7, higher=True)["quantile_10"]
    0.54
    """
    values = sorted(each.values())
    worst = (min if higher else max)(each, key=lambda client: each[client])
    return {
        "clients": len(values),
        "mean": mean,
        "worst": each[worst],
        "worst_client": worst,
        "quantile_10": quantile_of(values, TAIL if higher else 1 - TAIL),
        "spread": statistics.pstdev(values),
    }


def by_class(events: list[Event]) -> Event | None:
    """F1 of each class and the confusion matrix after the last round, with the names of the classes."""
    return next((event["by_class"] for event in reversed(events) if event.get("by_class")), None)


def show_measure(row: Event, value: float | None) -> str:
    """A value of a measure, for readers."""
    return percent(value) if row["share"] else number(value)


def html_measures(rows: dict[str, Any], classes: Event | None) -> list[str]:
    """The report's tables; nothing where accuracy and loss of the server are all that there is."""
    body = []
    if set(rows) - set(PLAIN) or any(row["clients"] for row in rows.values()):
        each = any(row["clients"] for row in rows.values())
        heads = ["measure", "final", "best", "frozen model"]
        heads += ["mean of clients", "worst client", "10 % quantile", "spread"] * each
        body += ["<h2>Measures</h2>", html_table(heads, [_row_cells(row)[: len(heads)] for row in rows.values()])]
    if classes:
        names, matrix = classes["names"], classes["confusion"]
        cells = [
            [name, percent(f1), *map(str, row)] for name, f1, row in zip(names, classes["f1"], matrix, strict=True)
        ]
        body += [
            "<h2>Classes</h2>",
            html_folded(
                f"F1 of each of {len(names)} classes, and how often each was answered for which",
                html_table(["true class", "F1", *(f"answered {name}" for name in names)], cells),
            ),
        ]
    return body


def _row_cells(row: Event) -> list[str]:
    over = row["clients"] or {}
    best = show_measure(row, row["best"]) + (f" (round {row['best_round']})" if row["best_round"] else "")
    worst = f"{show_measure(row, over['worst'])} ({over['worst_client']})" if over else "–"
    less = "" if row["higher"] else " (less is better)"
    return [
        row["words"] + less,
        show_measure(row, row["final"]),
        best,
        show_measure(row, row["frozen"]),
        show_measure(row, over.get("mean")),
        worst,
        show_measure(row, over.get("quantile_10")),
        show_measure(row, over.get("spread")),
    ]
