"""The continual benchmark's report: means over seeds, a table, plots and a page, from results.json alone."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from statistics import mean
from typing import Any

from fedpeft.continual.matrix import NAMES
from fedpeft.record import pages, words
from fedpeft.simulations.benchmarks.cells import percent, plus_minus, publish, spread
from fedpeft.simulations.benchmarks.continual_figures import figures
from fedpeft.simulations.benchmarks.federated_report import distinct, select

SHORT = ("acc_micro", "aia_micro", "a_auc", "forgetting_chaudhry")  # fit a terminal
AGAINST = "against frozen"
FITTED = ("lda", "ranpac")
DECIDING = (AGAINST, "kB")  # what decides between methods comes first
COSTS = ("passes", "CPU s")
LEGEND = (
    "Accuracies in %, ± standard deviation over seeds. acc_micro: all test records after the last task; "
    "aia_micro: mean over tasks of the accuracy on what was seen; a_auc: that weighted by records, for streams "
    "without boundaries; forgetting_chaudhry: best earlier accuracy of a task minus its last, mean over tasks "
    "(below 0: later tasks helped); learning_acc: accuracy of each task right after it. against frozen: "
    "acc_micro minus that of the better of lda and ranpac over frozen, paired by seed, ± standard error. kB: "
    "what body and head must keep after the last task; passes: forward passes a prediction; CPU s: of the "
    "training that a head shares with the others of its body. A closed-form head over frozen needs none. Spreads "
    "are over seeds; where seeds share their test records they say nothing of these."
)
Row = dict[str, Any]


def summary(rows: list[Row]) -> list[Row]:
    """One row for every body and head: means over the seeds that it ran with, or why it did not run."""
    found = []
    for body in distinct(rows, "body"):
        for head in distinct(select(rows, body=body), "head"):
            given = select(rows, body=body, head=head)
            ran = [row for row in given if not row["refused"]]
            found.append(
                {
                    "body": body,
                    "head": head,
                    "seeds": len(ran),
                    "refused": None if ran else given[0]["refused"],
                    **(_means(ran) if ran else {}),
                }
            )
    if best := reference(found):
        fixed = {row["seed"]: row["metrics"]["acc_micro"] for row in select(rows, body="frozen", head=best["head"])}
        for row in found:
            own = [one for one in select(rows, body=row["body"], head=row["head"]) if not one["refused"]]
            pairs = [one["metrics"]["acc_micro"] - fixed[one["seed"]] for one in own]
            deviation = spread(pairs)
            row["difference"] = mean(pairs) if pairs else None
            row["difference_error"] = None if deviation is None else deviation / math.sqrt(len(pairs))
    return found


def reference(rows: list[Row]) -> Row | None:
    """Of the summary: the best of `FITTED` over the frozen body, what needs no training; None where there is none."""
    fitted = [
        row
        for row in rows
        if row["body"] == "frozen" and row["head"].partition(":")[0] in FITTED and not row["refused"]
    ]
    return max(fitted, key=lambda row: row["metrics"]["acc_micro"], default=None)


def _means(ran: list[Row]) -> Row:
    each = {name: [row["metrics"][name] for row in ran if row["metrics"][name] is not None] for name in NAMES}
    last = [row["ledger"][-1] for row in ran]
    kept = {kind: mean(entry["stored_bytes"][kind] for entry in last) for kind in last[0]["stored_bytes"]}
    head = mean(row["head_bytes"] for row in ran)
    return {
        "metrics": {name: mean(values) if values else None for name, values in each.items()},
        "sd": {name: spread(values) for name, values in each.items()},
        "undefined": ran[0]["undefined"],
        "stored_bytes": kept,
        "head_bytes": head,
        "bytes": sum(kept.values()) + head,
        "parameters": last[0]["parameters"],
        "passes": mean(entry["passes_per_prediction"] for entry in last),
        "train_cpu_s": mean(sum(entry["train_cpu_s"] for entry in row["ledger"]) for row in ran),
    }


# Tables ---------------------------------------------------------------------------------------------------------------


def show(results: Row) -> None:
    """Print the table, what was refused, and the command that makes it."""
    from fedpeft.cli.console import out

    out.print(f"{headline(results)}", style="bold")
    for text in lines(results["summary"]):
        out.print(text, soft_wrap=True)
    for line in notes(results):
        out.print(line, soft_wrap=True)
    out.print(sentence(results["summary"]), soft_wrap=True)
    out.print(LEGEND, style="dim")
    out.print(f"REPRODUCE: {results['reproduce']}", soft_wrap=True)


def headline(results: Row) -> str:
    """One line above the tables: stream, scenario, seeds, on what it was evaluated, and the training settings."""
    where = "a held-out part of the training set" if results["validation"] else "the test set"
    settings = ", ".join(f"{key} {value:g}" for key, value in results["train"].items())
    return (
        f"{results['stream']}, {results['scenario']} stream, {results['seeds']} seeds, evaluated on {where}; {settings}"
    )


def notes(results: Row) -> list[str]:
    """What a reader must know beside the numbers."""
    found = []
    if results["quick"]:
        found.append("A quick version: it shows that the benchmark runs and says nothing of methods.")
    if results["validation"]:
        found.append("Evaluated on a held-out part of the training set, to choose settings by; no result.")
    if results["added_heads"]:
        found.append(f"Not asked for, and always in the table: {', '.join(results['added_heads'])}.")
    refused = [row for row in results["summary"] if row["refused"]]
    return found + [f"Refused: {row['body']} with {row['head']}: {row['refused']}" for row in refused]


def sentence(rows: list[Row]) -> str:
    """What a reader takes away: the best of all, and what the features of the frozen model reach without training."""
    ran = sorted((row for row in rows if not row["refused"]), key=lambda row: -row["metrics"]["acc_micro"])
    if not ran:
        return "Nothing could be run."
    text = f"Highest accuracy after the last task: {_named(ran[0])}."
    best = reference(rows)
    if best is None:
        return text + " Not run: frozen, whose closed-form heads are what training has to beat."
    above = [
        f"{row['body']} with {row['head']}"
        for row in ran
        if row["difference_error"] is not None and row["difference"] > 2 * row["difference_error"]
    ]
    return (
        f"{text} Without any training of the body: {_named(best)}; above that by more than two standard errors: "
        f"{', '.join(above) or 'nothing'}."
    )


def _named(row: Row) -> str:
    return f"{row['body']} with {row['head']} ({percent(row['metrics']['acc_micro'], row['sd']['acc_micro'])} %)"


def heads_of(rows: list[Row], names: tuple[str, ...]) -> list[str]:
    """The metrics that are defined in any row, in this order."""
    return [name for name in names if any(not row["refused"] and row["metrics"][name] is not None for row in rows)]


def line(row: Row, names: list[str]) -> list[str]:
    """The texts of a row: body, head, what decides, metrics, costs."""
    if row["refused"]:
        return [row["body"], row["head"], "refused", *["–"] * (1 + len(names) + len(COSTS))]
    scores = ["–" if row["metrics"][name] is None else percent(row["metrics"][name], row["sd"][name]) for name in names]
    difference = "–" if row.get("difference") is None else f"{100 * row['difference']:+.1f}"
    return [
        row["body"],
        row["head"],
        difference + plus_minus(row.get("difference_error")),
        f"{row['bytes'] / 1000:,.1f}",
        *scores,
        f"{row['passes']:.3g}",
        f"{row['train_cpu_s']:.1f}",
    ]


def lines(rows: list[Row]) -> list[str]:
    """The table as text: a body's name in a line of its own, its heads below."""
    names = heads_of(rows, SHORT)
    heads = [*AGAINST.split(), "", "kB", *(half for name in names for half in name.split("_", 1))]
    above = [["", *heads[0::2], *[""] * len(COSTS)], ["", *heads[1::2], *COSTS]]
    texts = [line(row, names)[1:] for row in rows]
    widths = [max(len(text[place]) for text in [*above, *texts]) for place in range(len(above[0]))]
    found = [_padded(text, widths) for text in above]
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        if number == 0 or row["body"] != rows[number - 1]["body"]:
            found.append(row["body"])
        found.append(_padded(text, widths))
    return found


def _padded(text: list[str], widths: list[int]) -> str:
    first, *rest = [
        part.ljust(width) if place == 0 else part.rjust(width)
        for place, (part, width) in enumerate(zip(text, widths, strict=True))
    ]
    return " ".join([f"  {first}", *rest])


# Page -----------------------------------------------------------------------------------------------------------------


def write(out: Path) -> list[Path]:
    """Draw the plots and write report.html from `out`/results.json (see `cells.publish`)."""
    return publish(out, "continual", figures, page)


def page(results: Row, images: dict[str, bytes]) -> str:
    """One HTML page that loads nothing from elsewhere."""
    rows = results["summary"]
    names = heads_of(rows, NAMES)
    titles = {
        "tasks": "Accuracy over tasks",
        "forgetting": "Forgetting against bytes kept",
        "matrices": "Accuracy in % on each task (columns) after each task (rows), mean over seeds",
    }
    body = [
        f'<p class="lead">{escape(sentence(rows))}</p>',
        f"<p>{escape(headline(results))}. {escape(results['summary_of_stream'])}.</p>",
        *map(pages.html_note, notes(results)),
        pages.html_table(["body", "head", *DECIDING, *names, *COSTS], [line(row, names) for row in rows]),
        f"<p>{escape(LEGEND)}</p>",
    ]
    for name, image in images.items():
        body += [f"<h2>{titles[name]}</h2>", pages.html_whole(titles[name], image)]
    body += [
        "<h2>What is kept</h2>",
        _kept(rows),
        "<h2>Metrics that are not defined</h2>",
        _undefined(rows),
        "<h2>Runs</h2>",
        _runs(results["rows"]),
        "<h2>How it was made</h2>",
    ]
    facts = [
        ["command", results["reproduce"]],
        ["training", json.dumps(results["train"])],
        *([name, value] for name, value in results["versions"].items()),
    ]
    return pages.html_page(f"Continual learning: {results['stream']}", [*body, pages.html_table([], facts)])


def _kept(rows: list[Row]) -> str:
    """Bytes by kind after the last task; and parameters."""
    ran = [row for row in rows if not row["refused"]]
    kinds = list(ran[0]["stored_bytes"]) if ran else []
    heads = ["body", "head", "trained parameters", *(f"{kind}, bytes" for kind in kinds), "head, bytes"]
    return pages.html_table(
        heads,
        [
            [
                row["body"],
                row["head"],
                f"{row['parameters']:,}",
                *(f"{row['stored_bytes'][kind]:,.0f}" for kind in kinds),
                f"{row['head_bytes']:,.0f}",
            ]
            for row in ran
        ],
    )


def _undefined(rows: list[Row]) -> str:
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in (row.get("undefined") or {}).items():
            reasons.setdefault((name, reason), []).append(f"{row['body']} {row['head']}")
    return pages.html_table(
        ["metric", "why", "where"],
        [
            [name, reason, "everywhere" if len(where) == sum(not row["refused"] for row in rows) else ", ".join(where)]
            for (name, reason), where in reasons.items()
        ],
    )


def _runs(rows: list[Row]) -> str:
    """Every run's stream and scores, and the options of every body and head."""
    manifests = [
        [str(row["seed"]), row["manifest_sha256"]]
        for row in (select(rows, seed=seed)[0] for seed in distinct(rows, "seed"))
    ]
    scores = [
        [
            row["body"],
            row["head"],
            str(row["seed"]),
            words.percent(row["metrics"]["acc_micro"]),
            "yes" if row["resumed"] else "no",
            row["stream"],
        ]
        for row in rows
        if not row["refused"]
    ]
    options = [
        [kind, name, json.dumps(select(rows, **{kind: name})[0][f"{kind}_options"])]
        for kind in ("body", "head")
        for name in distinct(rows, kind)
    ]
    return (
        "<details><summary>streams, scores, options</summary>"
        + pages.html_table(["seed", "sha256 of the stream's manifest"], manifests)
        + pages.html_table(["body", "head", "seed", "acc_micro", "went on from a checkpoint", "stream"], scores)
        + pages.html_table(["", "name", "options"], options)
        + "</details>"
    )
