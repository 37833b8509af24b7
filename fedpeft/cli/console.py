"""Commands print tables for people, JSON for programs, and errors on standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from fedpeft.cli import alive
from fedpeft.record.words import show_seconds, size

PIPE_WIDTH = 200  # where nobody looks at a terminal: lines of a table are not broken
# Nothing that is printed is rich's markup: names, paths and reasons come from users, and [a] or :b: in one is no style.
PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH, **PLAIN)
err = Console(stderr=True, **PLAIN)
CLIENTS_SHOWN = 20  # rows of a table with one a client


def emit(result: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    """Print a command's result, as JSON or by `show`."""
    if as_json:
        # Not by rich, which breaks lines; and not with NaN, which no other program reads as JSON.
        sys.stdout.write(json.dumps(result, indent=2, allow_nan=False) + "\n")
    else:
        show(result)


def fail(message: str) -> None:
    """Print an error on standard error."""
    err.print("error:", style="bold red", end=" ")
    err.print(message, soft_wrap=True)


def note(message: str) -> None:
    """A line that is no error, on standard error."""
    alive.spoke()
    err.print(message, soft_wrap=True)


def logged(level: str, text: str, style: str) -> None:
    """A line of a log, unbroken where it is longer than the terminal is wide."""
    alive.spoke()
    err.print(f"{level:<8}", style=style, end=" ")
    err.print(text, soft_wrap=True)


def run_result(summary: dict[str, Any]) -> None:
    """What a reader takes away, first; then the table, traffic, sections of its own kind, warnings and paths."""
    out.print(summary["headline"], style="bold", soft_wrap=True)
    strategy = " + ".join([summary["strategy"], *summary["wrap"]])
    table = Table(
        title=f"{strategy} over {summary['clients']} clients, {summary['rounds']} rounds, seed {summary['seed']}"
    )
    table.add_column("model")
    table.add_column("accuracy", justify="right")
    table.add_column("loss", justify="right")
    reasons: list[str] = []
    for name, row in _model_rows(summary):
        if row and row.get("accuracy") is not None:
            loss = f"{row['loss']:.3f}" if row.get("loss") is not None else ""
            table.add_row(name, _with_error(row), loss, style="bold" if name.startswith("federated, final") else None)
        elif row and row.get("reason"):
            table.add_row(name, "not fitted", "")
            reasons.append(f"{name}: not fitted: {row['reason']}")
    out.print(table)
    for line in reasons:
        out.print(line, style="yellow", soft_wrap=True)
    # Who reads that a regression has more must know what it saw.
    fitted = any(key.endswith("_logistic") for key in summary.get("baselines") or {})
    pooled = "; the logistic regressions see all clients' data pooled" if fitted else ""
    count = f", n = {summary['test_records']:,}" if summary.get("test_records") else ""
    out.print(f"evaluated on {summary['evaluated_on']}{count}{pooled}", style="dim")
    out.print(
        f"{size(summary['bytes_up'])} up, {size(summary['bytes_down'])} down, {show_seconds(summary['seconds'])} in "
        f"rounds, {summary['trainable_parameters']:,} trained parameters a client"
    )
    if privacy := summary.get("privacy"):
        protected = "record" if privacy["unit"] == "sample" else "client"
        spent = summary["epsilon_max"]
        epsilon = "in the clients' ledgers" if spent is None else f"{spent:.4g}"
        out.print(
            f"privacy of one {protected}: epsilon {epsilon} at delta {privacy['delta']:g}; randomness: "
            f"{privacy['randomness']}"
        )
    if sequence := summary.get("continual"):
        tasks(sequence)
    if tta := summary.get("tta"):
        test_time(tta)
    if text := summary.get("secure_aggregation"):
        out.print(text, style="dim")
    _named_clients(summary)
    for name in ("adapter", "report.html", "plots", "metrics.jsonl", "summary.json"):
        out.print(f"{name:<14}{summary['out']}/{name}", soft_wrap=True)


def _model_rows(summary: dict[str, Any]) -> list[tuple[str, dict[str, Any] | None]]:
    """Rows of the table: what needs no federation, then what was federated, the answer last."""
    sequence = summary.get("sequence")
    constant = (summary.get("baselines") or {}).get("largest_class_name")
    rows = [
        (f"always '{constant}'", _row_of(summary, "largest_class")),
        ("each client its most frequent answer", _row_of(summary, "clients_largest_class")),
        ("frozen model, same head, all classes" if sequence else "no adaptation (round 0)", summary.get("baseline")),
        ("frozen features + logistic regression", _row_of(summary, "frozen_logistic")),
        ("pixels or words + logistic regression", _row_of(summary, "pixels_or_words_logistic")),
        ("each client alone, mean on the test set", _row_of(summary, "local")),
        ("each client alone, on its own records", _row_of(summary, "clients_local")),
        ("one model of all records (central)", _row_of(summary, "central")),
        ("one model of all records, on the clients' own", _row_of(summary, "clients_central")),
    ]
    final = {**(summary.get("final") or {}), "standard_error": summary.get("standard_error")}
    if sequence:
        seen = f"{sequence['classes']} classes, task {sequence['tasks_done']} of {sequence['tasks']}"
        return [
            *rows,
            ("classifier as trained, classes seen", sequence["trained_classifier"]),
            (f"federated, final: head {sequence['head']}, {seen}", final),
        ]
    last = summary.get("last_rounds") or {}
    return [
        *rows,
        ("federated, best round (picked on the same records)", summary.get("best")),
        (f"federated, mean of the last {len(last.get('rounds', []))} evaluated rounds", last),
        ("federated, final", final),
    ]


def _with_error(row: dict[str, Any]) -> str:
    error = row.get("standard_error")
    return f"{row['accuracy']:.1%}" + (f" ± {100 * error:.1f}" if error is not None else "")


def _named_clients(summary: dict[str, Any]) -> None:
    """Whose updates were far beyond the others', cut by a robust rule, or quarantined."""
    from fedpeft.record.lead import list_warnings

    for text in list_warnings(summary):
        out.print(f"warning: {text}", style="yellow", soft_wrap=True)
    for row in summary.get("updates", []):
        # Those that were far have had their line.
        if row["treated_rounds"] and not row["far_rounds"]:
            out.print(
                f"{row['client']}: {row['treated']} (in {len(row['treated_rounds'])} rounds)",
                style="dim",
                soft_wrap=True,
            )
    for client, rows in _by_client(summary["quarantined"]).items():
        often = f"in {len(rows)} rounds, last" if len(rows) > 1 else f"in round {rows[0]['round']}"
        out.print(f"quarantined: {client} {often}: {rows[-1]['reason']}", style="yellow", soft_wrap=True)


def tasks(result: dict[str, Any]) -> None:
    """Accuracy on every task after every task, and what follows from it."""
    table = Table(title=f"accuracy on each task after each task: body {result['body']}, head {result['head']}")
    table.add_column("after")
    for number, names in enumerate(result["tasks"]):
        table.add_column(f"{number}: {', '.join(names[:4])}{'...' if len(names) > 4 else ''}", justify="right")
    for number, row in enumerate(result["right"]):
        cells = [f"{right / count:.1%}" if count else "" for right, count in zip(row, result["count"], strict=True)]
        table.add_row(f"task {number}", *cells[: number + 1], style="bold" if number + 1 == len(row) else None)
    out.print(table)
    if result["metrics"]:
        shown = ("acc_micro", "aia_micro", "forgetting_chaudhry", "learning_acc")
        values = result["metrics"]["values"]
        out.print(", ".join(f"{key} {values[key]:.1%}" for key in shown if values[key] is not None))


def test_time(result: dict[str, Any]) -> None:
    """Accuracy of each client on its own stream, without and with the test-time method, and the gain in points."""
    table = Table(title=f"each client on its own stream, severity {result['severity']}, after round {result['round']}")
    for column in ("client", "stream", "clean records", "as trained", result["method"], "gain"):
        table.add_column(column, justify="left" if column in ("client", "stream") else "right")
    keys = ("accuracy", "source_accuracy", "tta_accuracy")
    rows = list(result["clients"].items())
    for client, row in rows[:CLIENTS_SHOWN]:
        table.add_row(client, row["stream"], *(f"{row[key]:.1%}" for key in keys), _points_gained(row))
    if len(rows) > CLIENTS_SHOWN:
        table.add_row(f"{len(rows) - CLIENTS_SHOWN} more", "see summary.json")
    table.add_row("mean", "", *(f"{result[key]:.1%}" for key in keys), _points_gained(result), style="bold")
    out.print(table)


def _points_gained(row: dict[str, Any]) -> str:
    return f"{100 * (row['tta_accuracy'] - row['source_accuracy']):+.1f}"


def _by_client(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["client"], []).append(row)
    return dict(sorted(found.items()))


def _row_of(summary: dict[str, Any], key: str) -> dict[str, Any] | None:
    found = summary.get("baselines") or {}
    return {"accuracy": found.get(key), "reason": found.get(f"{key}_reason")}


def aggregate_result(result: dict[str, Any]) -> None:
    """Print what merging adapters gave: its size, the method's notes in yellow, and the folder that it lies in."""
    name = result["strategy"] if "strategy" in result else result["method"]
    out.print(f"{name}: {result['adapters']} adapters, {result['sites']} modules, rank {result['rank']}")
    for note in result["notes"]:
        out.print(note, style="yellow")
    out.print(result["out"], soft_wrap=True)


def listing(tables: dict[str, Any]) -> None:
    """Print a table for each kind; its rows are mappings with `name` and, where there is one, `summary`; adapters also
    with what was measured of them.
    """
    if len(tables) > 1:
        out.print("  ".join(f"{name} {len(rows)}" for name, rows in tables.items()), style="dim")
        out.print("one of them: fedpeft list TABLE; one entry: fedpeft show NAME\n", style="dim")
    for name, rows in tables.items():
        table = Table(title=name, title_justify="left", box=None, padding=(0, 2, 0, 0))
        table.add_column("name", style="bold")
        table.add_column("what it is")
        measured = [key for key in ("average", "a layer sends") if any(key in row for row in rows)]
        for key in measured:
            table.add_column(key)
        for row in rows:
            table.add_row(row["name"], row.get("summary", ""), *(row.get(key, "") for key in measured))
        out.print(table)
        out.print()


def entry(result: dict[str, Any]) -> None:
    """Print one registry entry: what is known of it, its options, and its module's text up to the first example."""
    out.print(f"{result['name']} ({result['table']})", style="bold")
    for key in ("summary", "paper", "needs", "path"):
        if result.get(key):
            out.print(f"{key}: {result[key]}")
    for line in result.get("notes", []):
        out.print(line)
    for what, names in result.get("works_with", {}).items():
        out.print(f"{what}: {', '.join(names) or 'none'}")
    if result.get("measured"):
        _print_measured(result["measured"])
    if result.get("also"):
        out.print(f"of the same name: {', '.join(result['also'])}")
    if result.get("options"):
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("option", "default", "allowed", "meaning"):
            table.add_column(column)
        for row in result["options"]:
            table.add_row(row["name"], str(row["default"]), row["allowed"], row["help"])
        out.print(table)
    if result.get("description"):
        out.print()
        out.print(result["description"].partition("\n    >>>")[0], soft_wrap=True)


def _print_measured(rows: list[dict[str, Any]]) -> None:
    from fedpeft.cli.adapter_facts import write_cells

    table = Table(box=None, padding=(0, 2, 0, 0))
    for row in rows:
        cells = write_cells(row)
        for head in cells if row is rows[0] else ():
            table.add_column(head)
        table.add_row(*cells.values())
    out.print(table)
    out.print(
        "i and o are inputs and outputs of a layer, bytes what a client sends of tiny-bert in a round beside the head",
        style="dim",
    )


def valid(result: dict[str, Any]) -> None:
    """Print a config as YAML with every default written out, and that it is valid."""
    import yaml

    out.print(yaml.safe_dump(result["config"], sort_keys=False), end="")
    valid_line(result)


def valid_line(result: dict[str, Any]) -> None:
    """Print what a config is of, in a line, and that it is valid, as far as can be seen without its model and data."""
    tree = result["config"]
    strategy, model, data = tree["strategy"]["name"], tree["model"]["name"], tree["data"]["source"]
    out.print(f"{strategy}, {model}, {data}, {tree['run']['rounds']} rounds:", end=" ", soft_wrap=True)
    out.print("valid", style="bold green", end=". ")
    if (traffic := result.get("traffic")) is None:
        out.print("Model and data were not opened.")
        return
    out.print(
        f"In a round each of {traffic['clients']} clients sends {traffic['up']:,} bytes, {traffic['up_head']:,} of "
        f"them of the head, and is sent {traffic['down']:,}: {traffic['round_mb']:.3g} MB a round, "
        f"{traffic['run_mb']:.3g} MB in {tree['run']['rounds']} rounds.",
        soft_wrap=True,
    )


def comparison(result: dict[str, Any]) -> None:
    """One column a run: there are few runs and many numbers."""
    rows = result["runs"]
    if len(rows) > 1:
        out.print(result["ranking"], style="bold", soft_wrap=True)
        for line in result["differences"]:
            out.print(f"differ in {line}", style="yellow", soft_wrap=True)
    table = Table(show_header=False)
    for key in rows[0]:
        name, style = key.removeprefix("mb_").replace("_", " "), "bold" if key == "run" else None
        table.add_row(name, *(_show_fact(key, row[key]) for row in rows), style=style)
    out.print(table)
    out.print(result["report"], soft_wrap=True)


def _show_fact(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key.startswith("mb_"):
        return size(1e6 * value)
    if key == "seconds":
        return show_seconds(value)
    if isinstance(value, float):
        return f"{value:.1%}" if key.endswith(("accuracy", "standard_error")) else f"{value:.4g}"
    return str(value)


def pairs(result: dict[str, Any]) -> None:
    """Print a line `key: value` for each item, unbroken where it is longer than the terminal is wide."""
    for key, value in result.items():
        out.print(f"{key}: {value}", soft_wrap=True)


def privacy(result: dict[str, Any]) -> None:
    """The answer first, then what it was asked for and what it assumes."""
    table = Table(show_header=False)
    for number, (key, value) in enumerate((key, value) for key, value in result.items() if key != "assumptions"):
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        table.add_row(key.replace("_", " "), shown, style=None if number else "bold")
    out.print(table)
    for line in result["assumptions"]:
        out.print(f"- {line}")


def ledgers(result: dict[str, Any]) -> None:
    """Print what each ledger has spent, a row for each account, and the largest epsilon of one record (or client)."""
    table = Table(title=f"spent at delta {result['delta']:g}, by {result['accountant']}")
    for name in ("ledger", "epsilon", "releases", "steps", "runs"):
        table.add_column(name, justify="left" if name == "ledger" else "right")
    rows = list(result["ledgers"].items())
    if len(rows) > CLIENTS_SHOWN:
        rows = sorted(rows, key=lambda item: -item[1]["epsilon"])[:CLIENTS_SHOWN]
    for name, row in rows:
        table.add_row(name, f"{row['epsilon']:.4g}", *(str(row[key]) for key in ("releases", "steps", "runs")))
    if len(result["ledgers"]) > len(rows):
        table.add_row(f"{len(result['ledgers']) - len(rows)} more", "spent no more; --json has all")
    out.print(table)
    out.print(
        f"At most {result['epsilon_max']:.4g} for one record (or client): of a run's tasks a record is in one. "
        "Every release that was reserved is counted, sent or not; each party's epsilon is its own.",
        style="dim",
    )


def audit_result(result: dict[str, Any]) -> None:
    """Every check beside what it allows; then the claim and what was measured of it."""
    table = Table()
    for column in ("check", "measured", "allowed", "", "what"):
        table.add_column(column, justify="right" if column in ("measured", "allowed") else "left")
    for check in result["checks"]:
        low, high = ("" if bound is None else f"{bound:.4g}" for bound in check["allowed"])
        measured = "not finite" if check["measured"] is None else f"{check['measured']:.4g}"
        verdict, style = ("ok", None) if check["passed"] else ("FAILED", "bold red")
        allowed = low if low == high else f"{low} to {high}" if low and high else f"from {low}" if low else f"to {high}"
        table.add_row(check["name"], measured, allowed, verdict, check["what"], style=style)
    out.print(table)
    claim, seen = result["claim"], result["seen"]
    asked = "none is asked for" if claim["asked"] is None else f"asked for: {claim['asked']:g}"
    out.print(
        f"claimed epsilon {claim['epsilon']:.4g} ({asked}) at delta {claim['delta']:g}: {claim['steps']} steps, "
        f"q = {claim['sample_rate']:.4g}, sigma = {claim['noise_multiplier']:.4g}; measured at least "
        f"{result['measured_epsilon']:.4g}",
        style="bold",
    )
    out.print(
        f"Seen: {len(seen['clients'])} of {seen['of']} clients ({', '.join(seen['clients'])}), rounds "
        f"{', '.join(map(str, seen['rounds']))}, trained {' and in a '.join(seen['engines'])}. A right program "
        f"fails a check in {result['false_alarm']:g} of audits at most.",
        style="dim",
    )
    for sentence in result["limits"]:
        out.print(f"- {sentence}", style="dim")
    failed = [check["name"] for check in result["checks"] if not check["passed"]]
    out.print(f"failed: {', '.join(failed)}" if failed else "passed", style="bold red" if failed else "bold green")
