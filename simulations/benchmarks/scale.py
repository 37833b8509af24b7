"""`fedpeft bench scale`: seconds and memory of a simulation as each of its sizes grows, with the exponent of each.

One size grows along an axis, the others stay where they are (`scale_work.Size`). Every point is a run, or a sequence of
tasks, in a process of its own, so that its peak memory is its own; seconds are CPU seconds of one thread, as a machine
may have other work. Over the points of an axis a quantity y is fitted to the size x:

    log y = a + e log x        e: exponent, by least squares;        last: the same between the two largest points

What does not grow by itself (libraries, the base model) keeps e low; `last` shows where it goes. Above `LINEAR` a
quantity grows faster than its size: `WHY` has the reason, or the table says that there is none.
"""

from __future__ import annotations

import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft import files, registry
from fedpeft.errors import InputError
from fedpeft.simulations.benchmarks import cells, scale_work
from fedpeft.simulations.benchmarks.cells import Progress, Tell, silent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINEAR = 1.1  # an exponent up to here is linear: a second point is good to a few percent
Row = dict[str, Any]

AXES: dict[str, tuple[str, tuple[int, ...]]] = {  # axis -> what grows, and its points
    "clients": ("clients in all, 64 of them a round", (1000, 10_000, 100_000)),
    "asked": ("clients a round", (10, 100, 1000)),
    "records": ("records of a client", (50, 200, 1000)),
    "rank": ("rank", (4, 32, 128)),
    "tokens": ("tokens of a record", (128, 512, 2048)),
    "layers": ("layers of the model", (2, 8, 24)),
    "classes": ("classes", (10, 200, 2500)),
    "tasks": ("tasks of a sequence", (10, 30, 100)),
}
QUICK = {
    "clients": (20, 40),
    "asked": (5, 10),
    "records": (20, 40),
    "rank": (2, 4),
    "tokens": (16, 32),
    "layers": (1, 2),
    "classes": (4, 8),
    "tasks": (2, 4),
}
WHY = {
    ("tokens", "round s"): "attention compares every token with every other",
    ("tokens", "peak MB"): "attention's weights, of which the backward pass keeps one a pair of tokens",
}


def run(out: Path, axes: tuple[str, ...] = (), quick: bool = False, tell: Tell = silent) -> Row:
    """Measure every point of these axes (all by default) and write results.json, table.md and scale.png to `out`.

    Args:
        quick: two small points an axis: shows that it runs.
        tell: is given a line for every point.

    Raises:
        InputError: an unknown axis.
    """
    chosen = axes or tuple(AXES)
    unknown = next((name for name in chosen if name not in AXES), None)
    if unknown is not None:
        raise InputError(registry.unknown("--axes", unknown, AXES))
    points = {name: QUICK[name] if quick else AXES[name][1] for name in chosen}
    progress = Progress(tell, sum(map(len, points.values())))
    rows: list[Row] = []
    for name, values in points.items():
        for value in values:
            rows.append({"axis": name, "size": value, **measure_apart(name, value, quick)})
            progress(f"{AXES[name][0]}: {value}")
    given = f" --axes {','.join(axes)}" * bool(axes) + " --quick" * quick
    results = {
        "reproduce": f"fedpeft bench scale --out DIR{given}",
        "quick": quick,
        "versions": cells.versions(),
        "rows": rows,
        "fits": [fit for name in chosen for fit in fit_axis([row for row in rows if row["axis"] == name])],
    }
    files.write_bytes(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    files.write_bytes(out / "table.md", f"{markdown(results)}\n".encode())
    draw(results).savefig(out / "scale.png", dpi=120)
    return results


def measure_apart(axis: str, value: int, quick: bool) -> dict[str, float]:
    """`scale_work.measure` in a fresh process."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(scale_work.measure, axis, value, quick).result()


def fit_axis(rows: list[Row]) -> list[Row]:
    """The exponents of every quantity of an axis.

    >>> fit_axis([{"axis": "rank", "size": 2, "s": 1.0}, {"axis": "rank", "size": 8, "s": 16.0}])
    [{'axis': 'rank', 'quantity': 's', 'exponent': 2.0, 'last': 2.0}]
    """
    found = []
    for quantity in (key for key in rows[0] if key not in ("axis", "size")):
        points = [(row["size"], row[quantity]) for row in rows if row[quantity] > 0]
        if len(points) > 1:
            x, y = np.log(np.array(points, dtype=float)).T
            (x0, y0), (x1, y1) = zip(x[-2:], y[-2:], strict=True)
            slope = float(np.polyfit(x, y, 1)[0])
            found.append(
                {
                    "axis": rows[0]["axis"],
                    "quantity": quantity,
                    "exponent": round(slope, 2),
                    "last": round(float((y1 - y0) / (x1 - x0)), 2),
                }
            )
    return found


def verdict(fit: Row) -> str:
    """What is to be said of an exponent: nothing where it is linear or less, else why, or that nobody knows."""
    if max(fit["exponent"], fit["last"]) <= LINEAR:
        return ""
    return WHY.get((fit["axis"], fit["quantity"]), "worse than linear, and not explained")


def table_rows(results: Row) -> list[list[str]]:
    """A line for each axis and quantity: what was measured at each size, the exponents, the reason."""
    lines = []
    for fit in results["fits"]:
        own = [row for row in results["rows"] if row["axis"] == fit["axis"]]
        sizes = ", ".join(f"{row['size']:,}" for row in own)
        values = ", ".join(show_number(row[fit["quantity"]]) for row in own)
        name = AXES[fit["axis"]][0]
        lines.append([name, sizes, fit["quantity"], values, f"{fit['exponent']:g}", f"{fit['last']:g}", verdict(fit)])
    return lines


def show_number(value: float) -> str:
    """Three digits, and no more than one after the point from 10 on.

    >>> show_number(0.01234), show_number(12.34), show_number(1234.5)
    ('0.0123', '12.3', '1234')
    """
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


HEAD = ("what grows", "to", "quantity", "measured", "exponent", "last", "why")


def markdown(results: Row) -> str:
    """The table for REPRODUCIBILITY."""
    lines = [list(HEAD), ["---"] * len(HEAD), *table_rows(results)]
    return "\n".join(f"| {' | '.join(line)} |".replace("  ", " ") for line in lines)


def draw(results: Row) -> Figure:
    """A panel for each axis: every quantity in seconds against the size, both logarithmic, with its exponent."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(fit["axis"] for fit in results["fits"]))
    columns = min(4, len(names))
    drawn = Figure(figsize=(3.6 * columns, 3.0 * math.ceil(len(names) / columns)), layout="constrained")
    panels = drawn.subplots(math.ceil(len(names) / columns), columns, squeeze=False).flat
    for axes, name in zip(panels, names, strict=False):
        draw_axis(axes, results, name)
    for axes in list(drawn.axes)[len(names) :]:
        axes.set_visible(False)
    return drawn


def draw_axis(axes: Any, results: Row, name: str) -> None:
    """Seconds of one axis, memory dashed beside them."""
    rows = [row for row in results["rows"] if row["axis"] == name]
    for fit in (fit for fit in results["fits"] if fit["axis"] == name):
        quantity = fit["quantity"]
        points = [(row["size"], row[quantity]) for row in rows if row[quantity] > 0]
        style = "--" if quantity.endswith("MB") else "-"
        label = f"{quantity}, {fit['last']:g}"
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linestyle=style, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(AXES[name][0], fontsize=9)
    axes.legend(frameon=False, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def show(results: Row) -> None:
    """Print the table and the command that makes it."""
    from rich.table import Table

    from fedpeft.cli.console import out

    table = Table(title="CPU seconds of one thread, and MB, as one size grows", title_justify="left")
    for column in HEAD:
        table.add_column(column, overflow="fold")
    for line in table_rows(results):
        table.add_row(*line)
    out.print(table)
    out.print("exponent: of all points; last: between the two largest; 1 is linear", style="dim")
    out.print(f"REPRODUCE: {results['reproduce']}", soft_wrap=True)
