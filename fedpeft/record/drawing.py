"""How our figures look, and what several of them share: lines, axes, names that do not overlap.

All are drawn on matplotlib's Agg canvas without pyplot, inside `style()`, so that no display, global state or user's
setting has a say in the files.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedpeft.record.words import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from fedpeft.record.metrics import Event
    from fedpeft.record.run_folder import Run

MB = 1e6  # bytes
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#5b5b5b")  # colour-blind safe
DASHES = ("-", "--", "-.", ":")
GREY = "#777777"
STYLE = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "figure.dpi": 130,
    "font.size": 10,
    "grid.color": "#e4e4e4",
    "legend.fontsize": 9,
    "legend.framealpha": 0.85,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "text.parse_math": False,  # client and folder names may hold a dollar sign
}


@contextmanager
def style() -> Iterator[None]:
    """Our look, whatever the user's matplotlibrc says: the same run gives the same files."""
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]):
        yield


def png(figure: Figure) -> bytes:
    """The figure as bytes of a PNG file, without the drawing library's name: the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def axes_of(titles: list[str], heights: Sequence[float] = (1,)) -> tuple[Figure, list[Axes]]:
    """One axes a title, below each other with a height (in units of 3.2 inches) each, else beside each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 3.2 * sum(heights)))
    if len(heights) > 1:
        grid = figure.subplots(len(titles), 1, squeeze=False, height_ratios=heights)
    else:
        grid = figure.subplots(1, len(titles), squeeze=False)
    for axes, title in zip(grid.flat, titles, strict=True):
        axes.set_title(title)
    return figure, list(grid.flat)


def draw_line(
    axes: Axes,
    events: list[Event],
    key: str,
    label: str,
    color: str,
    *,
    x: dict[int, float] | None = None,
    dashes: str = "-",
) -> None:
    """`key` of the events that have it, over rounds or over `x` of each round; a value that was not finite is a gap."""
    points = {event["round"]: event[key] for event in events if key in event}
    if any(value is not None for value in points.values()):
        axes.plot(
            [x[at] for at in points] if x else list(points),
            [math.nan if value is None else value for value in points.values()],
            marker="o" if len(points) <= 40 else "",
            linestyle=dashes,
            color=color,
            label=label,
        )


def frozen_line(axes: Axes, run: Run) -> None:
    """Draw a dashed line at the frozen model's accuracy, if it is known, labelled with what it was measured on."""
    value = (run.summary["baseline"] or {}).get("accuracy")
    if value is not None:
        where = run.summary["baseline"]["evaluated_on"]
        elsewhere = "" if where == run.summary["evaluated_on"] else f", {where}"
        label = f"frozen model ({percent(value)}{elsewhere})"
        axes.axhline(value, color=GREY, linestyle="--", linewidth=1.2, label=label)


def draw_bars(axes: Axes, heights: Sequence[float]) -> None:
    """A bar for each client; for more than can be told apart one filled outline, as a bar is an object of its own."""
    if len(heights) <= 400:
        axes.bar(range(len(heights)), heights, color=COLORS[0], width=0.8)
    else:
        axes.stairs(heights, [index - 0.5 for index in range(len(heights) + 1)], fill=True, color=COLORS[0])


def name_ticks(axis: Axis, names: list[str], *, most: int = 40, upright: bool = False) -> None:
    """Names at integer positions; every n-th where more than `most` would overlap."""
    shown = range(0, len(names), max(1, math.ceil(len(names) / most)))
    labels = [name if len(name) <= 18 else name[:17] + "…" for name in (names[index] for index in shown)]
    axis.set_ticks(list(shown), labels, rotation=90 if upright else 0, fontsize=8)


def are_crowded(names: list[str]) -> bool:
    """Whether names beside each other would overlap."""
    return sum(min(len(name), 18) + 2 for name in names) > 90


def accuracy_axis(axes: Axes) -> None:
    """Label the y axis as accuracy, a share in [0, 1] shown in percent."""
    axes.set_ylabel("accuracy")
    axes.yaxis.set_major_formatter(percent_format())


def percent_format() -> Any:
    """A matplotlib formatter that shows 1.0 as 100 %."""
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0)


def round_axis(axes: Axes) -> None:
    """Label the x axis as rounds, with ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def with_legends(figure: Figure) -> Figure:
    """The same figure, with a legend on each axes that has something labelled."""
    for axes in figure.axes:
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return figure


def has_accuracy(run: Run) -> bool:
    """Whether the run has an accuracy at all: tasks without labels have scores of loss alone."""
    return any(score["accuracy"] is not None for score in run.scores)


def sum_traffic(rounds: list[Event], key: str) -> dict[int, float]:
    """Round -> MB up to its end; 0 is before round 1."""
    total, sums = 0.0, {0: 0.0}
    for event in rounds:
        total += event[key] / MB
        sums[event["round"]] = total
    return sums


def quantile_of(values: list[float], share: float) -> float:
    """Of sorted values, by linear interpolation."""
    position = share * (len(values) - 1)
    low = math.floor(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that puts client-10 after client-9."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", name)]
