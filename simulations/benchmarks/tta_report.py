"""The test-time benchmark's report: means over seeds, tables, plots and a page, from results.json alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from html import escape
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from fedpeft.record import drawing, pages
from fedpeft.simulations.benchmarks.cells import label, percent, plus_minus, publish, spread
from fedpeft.simulations.benchmarks.federated_report import distinct, select

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

SCORES = ("error", "nll", "brier", "ece", "worst_window")
WINDOW = 256  # rows that a point of the curve averages, of one domain
HEADS = (
    "method",
    "error %",
    "against source",
    "NLL",
    "Brier",
    "ECE",
    "worst 256",
    "forwards",
    "backwards",
    "rows",
    "copies",
    "CPU s",
    "note",
)
SHORT = ("method", "error %", "against source", "ECE", "worst 256", "rows", "CPU s")  # fit a terminal
LEGEND = (
    "± on an error is a standard deviation over seeds, on a difference (paired by seed, in points) a standard "
    "error; worst 256: largest error in % of 256 rows in a row; forwards, backwards: passes a batch; rows: rows "
    "forwarded per row answered; copies: numbers that a method keeps beside the model, in model sizes; CPU s: "
    "of a run, preparation on source data included."
)
RULES = (
    "Methods have their published defaults. Nothing was tuned on a test stream: no option below was chosen by its "
    "result. The kind of augmented views follows the inputs (images, small images, tokens). Options after a "
    "colon were given by hand. Methods see inputs only, no label and no domain."
)
Row = dict[str, Any]


def summary(rows: list[Row]) -> list[Row]:
    """One row for every stream, model and method: means over the seeds that it ran with, or why it did not run."""
    found = []
    for where, own in cells(rows):
        source = {row["seed"]: row["error"] for row in select(own, method="source") if not row["refused"]}
        for method in distinct(own, "method"):
            given = select(own, method=method)
            ran = [row for row in given if not row["refused"]]
            found.append(
                {
                    **where,
                    "method": method,
                    "seeds": len(ran),
                    "refused": None if ran else given[0]["refused"],
                    **(_means(ran, source) if ran else {}),
                }
            )
    for _, own in cells(found):
        ran = [row for row in own if not row["refused"]]
        if ran:
            best = min(ran, key=lambda row: row["error"])
            best["level"] = [row["method"] for row in ran if row is not best and _is_level(rows, row, best)]
    return found


def _is_level(rows: list[Row], row: Row, best: Row) -> bool:
    """Whether a method is no more than two standard errors behind the best, paired by seed; of one seed, if equal."""
    where = {"stream": row["stream"], "model": row["model"]}
    errors = {
        one["method"]: {
            each["seed"]: each["error"] for each in select(rows, method=one["method"], **where) if not each["refused"]
        }
        for one in (row, best)
    }
    first, second = errors[row["method"]], errors[best["method"]]
    pairs = [first[seed] - second[seed] for seed in first if seed in second]
    deviation = spread(pairs)
    allowed = 0.0 if deviation is None else 2 * deviation / math.sqrt(len(pairs))
    return bool(pairs) and mean(pairs) <= allowed


def cells(rows: list[Row]) -> Iterator[tuple[Row, list[Row]]]:
    """{stream, model} and the rows that have these."""
    for stream, model in dict.fromkeys((row["stream"], row["model"]) for row in rows):
        yield {"stream": stream, "model": model}, select(rows, stream=stream, model=model)


def _means(ran: list[Row], source: dict[int, float]) -> Row:
    pairs = [row["error"] - source[row["seed"]] for row in ran if row["seed"] in source]
    batches = [len(row["curve"]) for row in ran]
    cost = {key: [row["cost"][key] for row in ran] for key in ran[0]["cost"]}
    return {
        **{key: mean(row[key] for row in ran) for key in SCORES},
        "error_sd": spread([row["error"] for row in ran]),
        "difference": mean(pairs) if pairs else None,
        "difference_error": None if (sd := spread(pairs)) is None else sd / math.sqrt(len(pairs)),
        "domains": {name: mean(row["domains"][name] for row in ran) for name in ran[0]["domains"]},
        "forwards": mean(count / own for count, own in zip(cost["forwards"], batches, strict=True)),
        "backwards": mean(count / own for count, own in zip(cost["backwards"], batches, strict=True)),
        "rows": mean(count / row["rows"] for count, row in zip(cost["rows"], ran, strict=True)),
        "copies": mean(count / row["parameters"] for count, row in zip(cost["held"], ran, strict=True)),
        "resets": mean(cost["resets"]),
        "skipped": mean(row["skipped"] / own for row, own in zip(ran, batches, strict=True)),
        "cpu_seconds": mean(cost["cpu_seconds"]),
    }


# Tables ---------------------------------------------------------------------------------------------------------------


def show(results: Row) -> None:
    """Print a table for every stream and source model, notes on its methods, and the command that makes them."""
    from fedpeft.cli.console import out

    for text in notes(results):
        out.print(text, soft_wrap=True)
    for where, own in cells(results["summary"]):
        out.print(f"{where['stream']}, {where['model']}, {results['seeds']} seeds", style="bold")
        out.print(_table(own))
        for row in own:
            if note(row):
                out.print(f"{row['method']}: {note(row)}")
        out.print(sentence(own))
        out.print()
    out.print(LEGEND, style="dim")
    out.print(f"REPRODUCE: {results['reproduce']}", soft_wrap=True)


def _table(own: list[Row]) -> Table:
    from rich.table import Table

    table = Table()
    for head in SHORT:
        table.add_column(head.replace(" ", "\n"), justify="left" if head == "method" else "right", no_wrap=True)
    for row in own:
        texts = dict(zip(HEADS, line(row), strict=True))
        if row["refused"]:
            texts["error %"] = "refused"
        table.add_row(*(texts[head] for head in SHORT))
    return table


def line(row: Row) -> list[str]:
    """The texts of a method's row, in the order of HEADS."""
    if row["refused"]:
        return [row["method"], *["–"] * (len(HEADS) - 2), f"refused: {row['refused']}"]
    difference = "–" if row["difference"] is None else f"{100 * row['difference']:+.1f}"
    return [
        row["method"],
        percent(row["error"], row["error_sd"]),
        difference + plus_minus(row["difference_error"]),
        f"{row['nll']:.2f}",
        f"{row['brier']:.2f}",
        f"{row['ece']:.2f}",
        f"{100 * row['worst_window']:.0f}",
        f"{row['forwards']:.1f}",
        f"{row['backwards']:.1f}",
        f"{row['rows']:.1f}",
        f"{row['copies']:.2g}",
        f"{row['cpu_seconds']:.0f}",
        note(row),
    ]


def note(row: Row) -> str:
    """What a reader must know beside the numbers."""
    found = []
    if row["skipped"] > 0:
        found.append(f"{100 * row['skipped']:.0f} % of the batches not learned from")
    if row["resets"] > 0:
        found.append(f"{row['resets']:.1f} resets a run")
    elif row["method"].partition(":")[0] == "rdumb":
        found.append("no reset: the stream is shorter than its period")
    return "; ".join(found)


def notes(results: Row) -> list[str]:
    """What holds of all numbers, in the terminal and on the page."""
    quick = "A quick version: it shows that the benchmark runs and says nothing of methods."
    return [RULES, *([quick] if results["quick"] else [])]


def lead(rows: list[Row]) -> str:
    """The answer first: of one stream and model its sentence, of several a clause each."""
    found = [(where, own) for where, own in cells(rows) if any(not row["refused"] for row in own)]
    if len(found) == 1:
        return sentence(found[0][1])
    clauses = []
    for where, own in found:
        ran = [row for row in own if not row["refused"]]
        best, source = min(ran, key=lambda row: row["error"]), select(ran, method="source")[0]
        level = f" (level: {', '.join(best['level'])})" if best.get("level") else ""
        clauses.append(
            f"{where['stream']}, {where['model']}: {best['method']}{level}, {100 * best['error']:.1f} % of errors, "
            f"without adaptation {100 * source['error']:.1f} %"
        )
    return f"Lowest error. {'; '.join(clauses)}."


def sentence(own: list[Row]) -> str:
    """What a reader takes away of one stream and model: the best, who is level with it, and who is worse than none."""
    ran = [row for row in own if not row["refused"]]
    best, source = min(ran, key=lambda row: row["error"]), select(ran, method="source")[0]
    worse = [
        row["method"]
        for row in ran
        if row["difference_error"] is not None and row["difference"] > 2 * row["difference_error"] > 0
    ]
    level = f"; within two standard errors of it: {', '.join(best['level'])}" if best.get("level") else ""
    text = (
        f"Lowest error: {best['method']}, {100 * best['error']:.1f} %{level}; without adaptation "
        f"{100 * source['error']:.1f} %."
    )
    return text + (f" Worse than no adaptation by more than two standard errors: {', '.join(worse)}." if worse else "")


# Plots ----------------------------------------------------------------------------------------------------------------


def figures(results: Row) -> dict[str, Figure]:
    """By name: over the stream, and against cost, for every stream and source model."""
    drawn = {}
    for number, (where, own) in enumerate(cells(results["rows"])):
        ran = [row for row in own if not row["refused"]]
        if ran:
            title = f"{where['stream']}, {where['model']}"
            drawn[f"stream-{number}"] = over(title, ran)
            drawn[f"cost-{number}"] = against_cost(title, select(results["summary"], **where))
    return drawn


def over(title: str, ran: list[Row]) -> Figure:
    """Error of the last 256 rows of the same domain, mean over seeds, with the domains' borders."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4.6))
    axes = figure.subplots()
    for index, method in enumerate(distinct(ran, "method")):
        curves = [smooth(row) for row in select(ran, method=method)]
        length = min(map(len, curves))
        points = [100 * mean(curve[place] for curve in curves) for place in range(length)]
        color, dashes, width = _look(index, method)
        axes.plot(range(length), points, color=color, linestyle=dashes, linewidth=width, label=label(method))
    for name, first in ran[0]["segments"]:
        axes.axvline(first - 0.5, color=drawing.GREY, linewidth=0.8)
        if len(ran[0]["segments"]) <= 20:
            axes.text(first - 0.3, 1.01, name, transform=axes.get_xaxis_transform(), rotation=30, fontsize=8)
    axes.set(xlabel="batch", ylabel="error in %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def smooth(row: Row) -> list[float]:
    """A run's curve, each point the mean of the batches up to it that lie in its domain and in the last WINDOW rows."""
    starts = [first for _, first in row["segments"]]
    curve, window = row["curve"], max(1, round(WINDOW * len(row["curve"]) / row["rows"]))
    found = []
    for place in range(len(curve)):
        own = max(first for first in starts if first <= place)
        part = curve[max(own, place - window + 1) : place + 1]
        found.append(sum(part) / len(part))
    return found


def against_cost(title: str, own: list[Row]) -> Figure:
    """Error against rows forwarded per row answered; filled where the method takes gradients."""
    from matplotlib.figure import Figure

    ran = [row for row in own if not row["refused"]]
    figure = Figure(figsize=(8.5, max(4.2, 1.4 + 0.17 * len(ran))))
    axes = figure.subplots()
    for index, row in enumerate(ran):
        color, _, _ = _look(index, row["method"])
        axes.errorbar(
            row["rows"],
            100 * row["error"],
            None if row["error_sd"] is None else 100 * row["error_sd"],
            fmt="o",
            markersize=7,
            color=color,
            markerfacecolor=color if row["backwards"] else "none",
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")  # powers would need mathematical type
    axes.set(xlabel="rows forwarded per row answered (filled: gradients too)", ylabel="error in %")
    axes.set_title(title)
    axes.set_ylim(axes.get_ylim())
    drawing.label_points(axes, [(row["rows"], 100 * row["error"], row["method"]) for row in ran])
    return figure


def _look(index: int, method: str) -> tuple[str, str, float]:
    """Colour, dashes and width of a method's line; the source model is thick and grey."""
    if method == "source":
        return drawing.INK, "-", 2.6
    turn, place = divmod(index, len(drawing.COLORS))
    return drawing.COLORS[place], drawing.DASHES[turn % len(drawing.DASHES)], 1.4


# Page -----------------------------------------------------------------------------------------------------------------


def write(out: Path) -> list[Path]:
    """Draw the plots and write report.html from `out`/results.json (see `cells.publish`)."""
    return publish(out, "tta", figures, page)


def page(results: Row, images: dict[str, bytes]) -> str:
    """One HTML page that loads nothing from elsewhere."""
    body = [f'<p class="lead">{escape(lead(results["summary"]))}</p>', *map(pages.html_note, notes(results))]
    found = list(cells(results["summary"]))
    for number, (where, own) in enumerate(found):
        runs = select(results["rows"], **where)
        said = [f"{row['method']}: {line(row)[-1]}" for row in own if line(row)[-1]]
        name = escape(f"{where['stream']}, {where['model']}")
        body += [
            f"<h2>{name}</h2>",
            *([f"<p>{escape(sentence(own))}</p>"] if len(found) > 1 else []),
            pages.html_table(list(HEADS[:-1]), [line(row)[:-1] for row in own]),
            *([pages.html_list(said)] if said else []),
        ]
        body += [
            pages.html_whole(what, images[key])
            for key, what in ((f"stream-{number}", "error over the stream"), (f"cost-{number}", "error against cost"))
            if key in images
        ]
        body += ["<h2>Error of each domain in %</h2>", _domains(own), "<h2>Runs</h2>", _runs(runs)]
    facts = [["command", results["reproduce"]], *([name, value] for name, value in results["versions"].items())]
    body += [f"<p>{escape(LEGEND)}</p>", "<h2>How it was made</h2>", pages.html_table([], facts)]
    return pages.html_page("Test-time adaptation", body)


def _domains(own: list[Row]) -> str:
    ran = [row for row in own if not row["refused"]]
    names = list(ran[0]["domains"])
    return pages.html_table(
        ["method", *names], [[row["method"], *(f"{100 * row['domains'][name]:.1f}" for name in names)] for row in ran]
    )


def _runs(runs: list[Row]) -> str:
    """Which plan and which source model every seed had, and what the methods were given."""
    seeds = [[str(row["seed"]), row["plan_sha256"], row["model_sha256"]] for row in select(runs, method="source")]
    given = [
        [
            row["method"],
            json.dumps(row["options"]),
            "; ".join(f"{reason} ({count})" for reason, count in (row.get("reasons") or {}).items()),
        ]
        for row in select(runs, seed=runs[0]["seed"])
    ]
    return (
        "<details><summary>plans, source models, options</summary>"
        + pages.html_table(["seed", "sha256 of the plan", "sha256 of the source model"], seeds)
        + pages.html_table(["method", "options (others: default)", "not learned from, first seed"], given)
        + "</details>"
    )
