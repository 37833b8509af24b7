"""The page of a run folder: PNG plots and one self-contained HTML file. `side_by_side` puts several runs together.

Everything is computed from `metrics.jsonl`, with `resolved.yaml` and `split.json`, so that an interrupted run can be
reported as far as it came; once it has ended, `summary.json` adds the entries that only it has. MB are 10^6 bytes.
"""

from __future__ import annotations

import html
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.files import write_bytes
from fedpeft.record import drawing, lead, metrics, plots
from fedpeft.record.in_numbers import summary_rows
from fedpeft.record.made import html_config, html_made, title_of
from fedpeft.record.measured import html_measures
from fedpeft.record.pages import html_figures, html_folded, html_list, html_note, html_page, html_table
from fedpeft.record.run_folder import Run, load
from fedpeft.record.unlearned import html_unlearned
from fedpeft.record.words import key_words, number, percent, show_points, show_seconds, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("fedpeft")
MOST_ROWS = 1000  # of a table with a row for each client and round
FEW_ROUNDS = 20  # whose table stands open


def write(run: str | Path) -> list[Path]:
    """Draw the plots that the run has data for into `plots/`, as PNG, SVG and PDF, and write `report.html`; the files
    written, page last.

    Raises:
        InputError: a file of the run is missing or broken; names it.
    """
    run = Path(run)
    loaded = load(run, run.resolve().name)
    folder = run / "plots"
    folder.mkdir(exist_ok=True)
    images: dict[str, bytes] = {}
    written: list[Path] = []
    # Ahead of the page, which holds them.
    with drawing.style():
        for name, draw in plots.PLOTS.items():
            for suffix, content in _draw_plot(name, draw, loaded).items():
                if suffix == "svg":
                    images[key_words(name)] = content
                written.append(folder / f"{name}.{suffix}")
                write_bytes(written[-1], content)
    for path in (folder / f"{name}.{suffix}" for name in plots.PLOTS for suffix in drawing.SUFFIXES):
        if path not in written:  # of an earlier state of the run
            path.unlink(missing_ok=True)
    page = run / "report.html"
    write_bytes(page, _run_page(loaded, images).encode())
    return [*written, page]


def _draw_plot(name: str, draw: Callable[[Run], Figure | None], run: Run) -> dict[str, bytes]:
    """By file suffix; nothing where the run has no data for it."""
    try:
        figure = draw(run)
        return {} if figure is None else drawing.files(figure)
    except Exception as error:  # one plot must not cost the page
        log.warning("the plot %s could not be drawn: %s: %s", name, type(error).__name__, error)
        return {}


# The page -------------------------------------------------------------------------------------------------------------


def _run_page(run: Run, images: dict[str, bytes]) -> str:
    summary = run.summary
    first, *others = lead.sentences(summary, run.config)
    body = [f'<p class="lead">{html.escape(first)}</p>', *(f"<p>{html.escape(line)}</p>" for line in others)]
    if not run.ended:
        body.append(html_note(f"This run has not ended; this is its state after round {summary['rounds']}."))
    body += [html_note(line) for line in lead.list_warnings(summary)]
    if summary.get("unlearning"):
        body += html_unlearned(summary["unlearning"])
    if summary.get("tta"):
        body += _test_time(summary["tta"])
    if summary.get("sequence"):
        body += _show_sequence(summary)
    if images:
        body += ["<h2>Figures</h2>", html_figures(images)]
    if not summary.get("unlearning"):
        body += html_measures(summary.get("measures") or {}, summary.get("by_class"))
    body += ["<h2>Summary</h2>", html_table([], summary_rows(run))]
    if run.hides_counts:
        body.append(html_note(HIDDEN))
    if summary.get("skipped") and not run.hides_counts:
        body += _show_skipped(summary["skipped"])
    if summary.get("privacy"):
        body += _show_privacy(summary["privacy"])
    if summary.get("continual"):
        body += _show_tasks(summary["continual"])
    if summary.get("answers"):
        body += _show_answers(summary["answers"])
    body += [*_show_updates(run), *_show_quarantine(summary)]
    if run.of("round"):
        body += ["<h2>Rounds</h2>", html_rounds(run)]
    body += [*html_made(run), *html_config(run)]
    return html_page(f"{title_of(run)}: {run.label}", body)


HIDDEN = (
    "Each client's numbers of records and of labels are left out: the guarantee does not cover them. They stand in the "
    "simulation's own split.json, which is not to be passed on; privacy.release_metrics=true shows them here."
)


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
    # Of too many those that somebody may look for: what was not simply used, or was far.
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


def _show_quarantine(summary: dict[str, Any]) -> list[str]:
    """A row for each client: in how many rounds its updates were refused, which, and why."""
    if not summary["quarantined"]:
        return []
    by_client: dict[str, list[dict[str, Any]]] = {}
    for entry in summary["quarantined"]:
        by_client.setdefault(entry["client"], []).append(entry)
    rows = []
    for client, entries in sorted(by_client.items(), key=lambda item: (-len(item[1]), drawing.natural_key(item[0]))):
        rounds = sorted({entry["round"] for entry in entries})
        reasons = list(dict.fromkeys(entry["reason"] for entry in entries))
        more = f" (and {len(reasons) - 1} other reasons)" if len(reasons) > 1 else ""
        rows.append([client, str(len(rounds)), lead.list_rounds(rounds), f"{reasons[-1]}{more}"])
    each = [[str(entry[key]) for key in ("round", "client", "reason")] for entry in summary["quarantined"]]
    return [
        "<h2>Quarantined updates</h2>",
        html_table(["client", "how often", "rounds", "reason"], rows),
        html_folded(f"All {len(each)}, by round", html_table(["round", "client", "reason"], each[:MOST_ROWS])),
    ]


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
                size(event["bytes_up"]),
                size(event["bytes_down"]),
                show_seconds(event["seconds"]),
            ]
        )
    what = "accuracy"
    if run.summary.get("sequence"):
        what = "accuracy of the classifier as trained, classes so far"
    heads = ["round", "updates used", "training loss", "loss", what, "up", "down", "time"]
    return html_folded(f"{len(rows)} rounds", html_table(heads, rows), opened=len(rows) <= FEW_ROUNDS)
