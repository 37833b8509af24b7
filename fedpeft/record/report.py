"""The page of a run folder: PNG plots and one self-contained HTML file. `side_by_side` puts several runs together.

Everything is computed from `metrics.jsonl`, with `resolved.yaml` and `split.json`, so that an interrupted run can be
reported as far as it came; once it has ended, `summary.json` adds the entries that only it has. MB are 10^6 bytes.
"""

from __future__ import annotations

import html
import logging
from pathlib import Path
from typing import Any

from fedpeft.files import write_bytes
from fedpeft.record import drawing, lead, metrics, plots
from fedpeft.record.measured import html_measures
from fedpeft.record.pages import html_folded, html_image, html_list, html_note, html_page, html_table
from fedpeft.record.run_folder import Run, load
from fedpeft.record.words import key_words, number, percent, show_points

log = logging.getLogger("fedpeft")
MOST_ROWS = 1000  # of a table with a row for each client and round
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
)  # have a place of their own


def write(run: str | Path) -> list[Path]:
    """Draw the plots that the run has data for into `plots/`, and write `report.html`; the files written, page last.

    Raises:
        InputError: a file of the run is missing or broken; names it.
    """
    run = Path(run)
    loaded = load(run, run.resolve().name)
    folder = run / "plots"
    folder.mkdir(exist_ok=True)
    images: dict[str, bytes] = {}
    with drawing.style():
        for name, draw in plots.PLOTS.items():
            try:
                figure = draw(loaded)
            except Exception as error:  # one plot must not cost the page
                log.warning("the plot %s could not be drawn: %s: %s", name, type(error).__name__, error)
                figure = None
            if figure is None:
                (folder / f"{name}.png").unlink(missing_ok=True)  # left by a report of an earlier state of the run
                continue
            images[name] = drawing.png(figure)
            write_bytes(folder / f"{name}.png", images[name])
    page = run / "report.html"
    write_bytes(page, _run_page(loaded, images).encode())
    return [*(folder / f"{name}.png" for name in images), page]


# The page -------------------------------------------------------------------------------------------------------------


def _run_page(run: Run, images: dict[str, bytes]) -> str:
    summary = run.summary
    first, *others = lead.sentences(summary, run.config)
    body = [f'<p class="lead">{html.escape(first)}</p>', *(f"<p>{html.escape(line)}</p>" for line in others)]
    if not run.ended:
        body.append(html_note(f"This run has not ended; this is its state after round {summary['rounds']}."))
    body += [html_note(line) for line in lead.list_warnings(summary)]
    if summary.get("tta"):
        body += _test_time(summary["tta"])
    if summary.get("sequence"):
        body += _show_sequence(summary)
    body += html_measures(summary.get("measures") or {}, summary.get("by_class"))
    facts = [
        [key_words(key), _show_fact(key, value)]
        for key, value in summary.items()
        if not isinstance(value, list) and key not in APART and value not in (None, {})
    ]
    facts.append(["quarantined updates", str(len(summary["quarantined"]))])
    body += ["<h2>Summary</h2>", html_table([], facts), "<h2>Plots</h2>"]
    body += [html_image(key_words(name), image) for name, image in images.items()]
    if run.hides_counts:
        body.append(
            html_note(
                "Each client's numbers of records and of labels are left out: the guarantee does not "
                "cover them. They stand in the simulation's own split.json, which is not to be passed "
                "on; privacy.release_metrics=true shows them here."
            )
        )
    if summary.get("skipped") and not run.hides_counts:
        body += _show_skipped(summary["skipped"])
    if summary.get("privacy"):
        body += _show_privacy(summary["privacy"])
    if summary.get("continual"):
        body += _show_tasks(summary["continual"])
    if summary.get("answers"):
        body += _show_answers(summary["answers"])
    body += _show_updates(run)
    if summary["quarantined"]:
        rows = [[str(entry[key]) for key in ("round", "client", "reason")] for entry in summary["quarantined"]]
        body += ["<h2>Quarantined updates</h2>", html_table(["round", "client", "reason"], rows)]
    body += ["<h2>Rounds</h2>", html_rounds(run), "<h2>Config</h2>", f"<pre>{html.escape(run.config_text)}</pre>"]
    return html_page(f"{summary['strategy']}: {run.label}", body)


def _test_time(tta: dict[str, Any]) -> list[str]:
    """Each client's accuracies and gain, the mean over all rows of the streams last."""
    gain = lead.gains(tta)
    rows = [
        [
            name,
            str(row["stream"]),
            number(row["records"]),
            percent(row["accuracy"]),
            percent(row["source_accuracy"]),
            percent(row["tta_accuracy"]),
            show_points(row["tta_accuracy"] - row["source_accuracy"]),
        ]
        for name, row in tta["clients"].items()
    ]
    rows.append(
        [
            "mean over records",
            "",
            number(sum(row["records"] for row in tta["clients"].values())),
            percent(tta["accuracy"]),
            percent(tta["source_accuracy"]),
            percent(tta["tta_accuracy"]),
            show_points(gain["gain"]),
        ]
    )
    heads = ["client", "stream", "records", "clean", "as trained", f"with {tta['method']}", "gain"]
    return [
        f"<h2>Test-time adaptation, severity {html.escape(str(tta['severity']))}, after round {tta['round']}</h2>",
        html_table(heads, rows),
    ]


def _show_sequence(summary: dict[str, Any]) -> list[str]:
    """The head that answers, after each task; beside it the frozen model with the same head."""
    sequence = summary["sequence"]
    frozen = sequence.get("frozen_head_by_task") or []
    rows = [
        [
            str(task + 1),
            str(sequence["rounds_of_tasks"][task]),
            percent(value),
            percent(frozen[task] if task < len(frozen) else None),
        ]
        for task, value in enumerate(sequence["accuracy_by_task"])
    ]
    heads = ["after task", "round", f"head {sequence['head']}, classes so far", "frozen model, same head"]
    trained = sequence["trained_classifier"] or {}
    body = ["<h2>The head that answers</h2>", html_table(heads, rows)]
    if trained.get("accuracy") is not None:
        body.append(
            f"<p>The classifier as trained has {percent(trained['accuracy'])} after round "
            f"{trained['round']}, on the classes seen by then.</p>"
        )
    return body


def _show_skipped(entries: list[dict[str, Any]]) -> list[str]:
    """What of the data was left out or cut, with a few examples."""
    rows = [
        [
            entry["where"],
            " of ".join(str(entry[key]) for key in ("count", "total") if entry[key]),
            entry["what"],
            ", ".join(entry["examples"]),
        ]
        for entry in entries
    ]
    return ["<h2>Left out or cut</h2>", html_table(["where", "how many", "what", "for example"], rows)]


def _show_privacy(section: dict[str, Any]) -> list[str]:
    """What is claimed, what is outside of the claim, and the clients' ledgers."""
    body = ["<h2>Privacy</h2>", f"<p>{html.escape(section['claim']).replace(chr(10), '<br>')}</p>"]
    if section["outside"]:
        body += ["<p>Outside of the guarantee:</p>", html_list(section["outside"])]
    keys = [key for key, value in section.items() if not isinstance(value, list | dict) and key != "claim"]
    body.append(html_table([], [[key_words(key), number(section[key])] for key in keys]))
    if section["clients"]:
        heads = list(next(iter(section["clients"].values())))
        rows = [[name, *(number(row[key]) for key in heads)] for name, row in section["clients"].items()]
        body.append(html_table(["client", *map(key_words, heads)], rows))
    return body


def _show_tasks(section: dict[str, Any]) -> list[str]:
    """Accuracy on every task after every task, and the metrics with the reasons for those that are undefined."""
    heads = ["after", *(f"{number}: {', '.join(names)}" for number, names in enumerate(section["tasks"]))]
    rows = [
        [
            f"task {number}",
            *(
                percent(right / count) if count and task <= number else ""
                for task, (right, count) in enumerate(zip(row, section["count"], strict=True))
            ),
        ]
        for number, row in enumerate(section["right"])
    ]
    body = [
        f"<h2>Tasks: body {html.escape(section['body'])}, head {html.escape(section['head'])}</h2>",
        html_table(heads, rows),
    ]
    if section["metrics"]:
        values, reasons = section["metrics"]["values"], section["metrics"]["undefined"]
        body.append(
            html_table(
                [],
                [
                    [key, percent(value) if value is not None else f"undefined: {reasons[key]}"]
                    for key, value in values.items()
                ],
            )
        )
    return body


def _show_answers(section: dict[str, Any]) -> list[str]:
    """What the model answered before and after training, beside what was wanted."""
    scores = [
        [name, percent(section[name]["exact_match"]), percent(section[name]["rouge_l"])] for name in ("base", "tuned")
    ]
    keys = ("prompt", "base", "tuned", "wanted")
    return [
        f"<h2>Answers to {section['records']} test conversations, greedy</h2>",
        html_table(["model", "exact match", "ROUGE-L"], scores),
        html_table(list(keys), [[sample[key] for key in keys] for sample in section["samples"]]),
    ]


def _show_updates(run: Run) -> list[str]:
    """How far each update went beside the others of its round, and what became of it; nothing where none was seen."""
    rounds = [event for event in run.of("round") if event.get("update_norms")]
    if not rounds:
        return []
    rows = [row for event in rounds for row in _updates_of(event)]
    shown = rows if len(rows) <= MOST_ROWS else [row for row in rows if row[2] != "used" or row[6]][:MOST_ROWS]
    left = f" of {len(rows):,}, of clients that stand out; metrics.jsonl has all" if len(shown) < len(rows) else ""
    heads = ["round", "client", "update", "norm", "times the round's median", "distance to the median", ""]
    return ["<h2>Clients' updates</h2>", html_folded(f"{len(shown)} rows{left}", html_table(heads, shown))]


def _updates_of(event: metrics.Event) -> list[list[str]]:
    """Rows of one round."""
    norms, distances, at = event["update_norms"], event.get("update_distances", {}), str(event["round"])
    middle = drawing.quantile_of(sorted(norms.values()), 0.5)
    rows = []
    for name, norm in norms.items():
        times = norm / middle if middle else None
        far = "far beyond the others" if name in event.get("far_updates", {}) else ""
        rows.append(
            [
                at,
                name,
                event.get("treated", {}).get(name, "used"),
                number(norm),
                number(times),
                number(distances.get(name)),
                far,
            ]
        )
    return rows + [[at, name, "quarantined", "–", "–", "–", ""] for name in event["quarantined"]]


def html_rounds(run: Run) -> str:
    """The rounds of a run as a folded table."""
    scores = {score["round"]: score for score in run.scores}
    rows = []
    for event in run.of("round"):
        score = scores.get(event["round"], {})
        rows.append(
            [
                str(event["round"]),
                str(len(event["clients"])),
                number(event.get("train_loss")),
                number(score.get("loss")),
                percent(score.get("accuracy")),
                number(event["bytes_up"] / drawing.MB),
                number(event["bytes_down"] / drawing.MB),
                number(event["seconds"]),
            ]
        )
    what = "accuracy"
    if run.summary.get("sequence"):
        what = "accuracy of the classifier as trained, classes so far"
    heads = ["round", "updates used", "training loss", "loss", what, "MB up", "MB down", "seconds"]
    return html_folded(f"{len(rows)} rounds", html_table(heads, rows))


def _show_fact(key: str, value: Any) -> str:
    if isinstance(value, dict):
        shown = ((inner, item) for inner, item in value.items() if not isinstance(item, dict) and item is not None)
        return ", ".join(f"{key_words(inner)} {_show_fact(inner, item)}" for inner, item in shown)
    if isinstance(value, list):
        return ", ".join(number(item) for item in value)
    if key.startswith("bytes_"):
        return f"{number(value)} ({number(value / drawing.MB)} MB)"
    return show_cell(key, value)


def show_cell(key: str, value: Any) -> str:
    """A value of a summary or table, written by what its key says that it is."""
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
