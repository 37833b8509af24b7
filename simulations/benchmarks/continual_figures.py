"""The continual benchmark's plots: accuracy over tasks, forgetting against bytes kept, and the matrices."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fedpeft.continual.matrix import accuracy_curve, accuracy_matrix
from fedpeft.record import drawing
from fedpeft.simulations.benchmarks.cells import label
from fedpeft.simulations.benchmarks.federated_report import distinct, select

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vPX*<>"
MOST_NUMBERS = 10  # tasks whose numbers can be read in a matrix
FILLINGS = ("full", "none", "left", "bottom")
Row = dict[str, Any]


def figures(results: Row) -> dict[str, Figure]:
    """By name: accuracy over tasks, forgetting against bytes, heat maps of the matrices."""
    ran = [row for row in results["rows"] if not row["refused"]]
    if not ran:
        return {}
    drawn = {"tasks": over_tasks(ran), "forgetting": against_bytes(results["summary"]), "matrices": matrices(ran)}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def over_tasks(ran: list[Row]) -> Figure:
    """Accuracy on the tasks seen, after each task, mean over seeds and a band of one standard deviation; a panel a
    head.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    heads = distinct(ran, "head")
    bodies = distinct(ran, "body")
    figure = Figure(figsize=(min(3.6 * len(heads) + 1, 16), 4.2 + 0.06 * len(bodies)))
    panels = figure.subplots(1, len(heads), sharey=True, squeeze=False)[0]
    for axes, head in zip(panels, heads, strict=True):
        for number, body in enumerate(bodies):
            curves = [accuracy_curve(row["right"], row["tests"]) for row in select(ran, body=body, head=head)]
            if curves:
                color, dashes = _look(number)
                tasks, middle = range(1, len(curves[0]) + 1), 100 * np.mean(curves, axis=0)
                axes.plot(tasks, middle, color=color, linestyle=dashes, label=label(body))
                if len(curves) > 1:
                    band = 100 * np.std(curves, axis=0, ddof=1)
                    axes.fill_between(tasks, middle - band, middle + band, color=color, alpha=0.15, linewidth=0)
        axes.set_title(head)
        axes.set_xlabel("tasks learned")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(0, 100)
    panels[0].set_ylabel("accuracy on the tasks seen in %")
    known = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=5)
    return figure


def against_bytes(rows: list[Row]) -> Figure | None:
    """Forgetting against what must be kept; None where forgetting is not defined."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    ran = [row for row in rows if not row["refused"] and row["metrics"]["forgetting_chaudhry"] is not None]
    if not ran:
        return None
    bodies, heads = distinct(ran, "body"), distinct(ran, "head")
    figure = Figure(figsize=(9.5, max(4.6, 0.23 * (len(bodies) + len(heads)))))
    axes = figure.subplots()
    for row in ran:
        axes.plot(
            row["bytes"] / 1000,
            100 * row["metrics"]["forgetting_chaudhry"],
            markersize=7,
            marker=MARKERS[heads.index(row["head"]) % len(MARKERS)],
            **_filled(bodies.index(row["body"])),
        )
    for number, body in enumerate(bodies):
        axes.plot([], [], "s", label=label(body), **_filled(number))
    for number, head in enumerate(heads):
        axes.plot([], [], MARKERS[number % len(MARKERS)], color=drawing.GREY, label=f"head {head}")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")  # powers would need mathematical type
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="kB kept by body and head after the last task", ylabel="forgetting_chaudhry in points")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return figure


def matrices(ran: list[Row]) -> Figure:
    """Accuracy in % on each task (columns) after each task (rows), mean over seeds; nothing lies in the future."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    bodies, heads = distinct(ran, "body"), distinct(ran, "head")
    figure = Figure(figsize=(1.75 * len(heads) + 2.6, 1.6 * len(bodies) + 0.5))
    grid = figure.subplots(len(bodies), len(heads) + 1, squeeze=False, width_ratios=[0.7, *[1] * len(heads)])
    mesh = None
    for body, (side, *across) in zip(bodies, grid, strict=True):
        side.set_axis_off()
        side.text(1, 0.5, body.replace(":", ":\n").replace(",", ",\n"), fontsize=8, ha="right", va="center")
        for head, axes in zip(heads, across, strict=True):
            axes.grid(False)
            axes.set(xticks=[], yticks=[])
            own = [accuracy_matrix(row["right"], row["tests"]) for row in select(ran, body=body, head=head)]
            if own:
                R = np.mean(own, axis=0)
                mesh = axes.imshow(np.where(np.tri(len(R), dtype=bool), R, math.nan), vmin=0, vmax=1, cmap="viridis")
                if len(R) <= MOST_NUMBERS:
                    _write_numbers(axes, R)
            else:
                axes.set_axis_off()
            if body == bodies[0]:
                axes.set_title(head, fontsize=9)
    if mesh is not None:
        figure.colorbar(mesh, ax=grid, format=PercentFormatter(1.0), shrink=min(1.0, 3 / len(bodies)))
    return figure


def _write_numbers(axes: Axes, R: Any) -> None:
    """Percent in each cell of a matrix [tasks, tasks], as large as a cell has room for."""
    size = min(7.0, 34.0 / len(R))
    for row, values in enumerate(R):
        for column, value in enumerate(values[: row + 1]):
            color = "white" if value < 0.6 else "black"  # viridis is dark below
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=size, color=color)


def _look(number: int) -> tuple[str, str]:
    turn, place = divmod(number, len(drawing.COLORS))
    return drawing.COLORS[place], drawing.DASHES[turn % len(drawing.DASHES)]


def _filled(number: int) -> dict[str, Any]:
    """Colour and filling of a body's marks."""
    color, dashes = _look(number)
    return {"color": color, "fillstyle": FILLINGS[drawing.DASHES.index(dashes)]}
