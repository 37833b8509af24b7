"""How our figures look, and what several of them share: lines, axes, names that do not overlap.

All are drawn on matplotlib's Agg canvas without pyplot, inside `style()`, so that no display, global state or user's
setting has a say in the files.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
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
# Told apart by the colour-blind, and seen on white as on a dark page.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#9a5bb0", "#707070")
DASHES = ("-", "--", "-.", ":")
GREY = "#777777"
INK, GRID = "#262626", "#e4e4e4"  # of all that is no data; a page puts its own in their place
SUFFIXES: dict[str, tuple[str, dict[str, Any]]] = {  # of a figure's files: its ground, and what would differ each time
    "png": ("white", {"Software": None}),
    "svg": ("none", {"Date": None, "Creator": None}),
    "pdf": ("none", {"CreationDate": None, "Creator": None, "Producer": None}),
}
STYLE = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.xmargin": 0.01,
    "axes.facecolor": "none",
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    "figure.constrained_layout.use": True,
    "figure.dpi": 130,
    "font.size": 10,
    "grid.color": GRID,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
    # Else ids are drawn at random, and the same figure has other bytes each time.
    "svg.hashsalt": "fedpeft",
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


def files(figure: Figure) -> dict[str, bytes]:
    """The figure by file suffix: PNG on white, SVG and PDF on nothing. The same figure gives the same bytes."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # where all lies is settled; else each format would work it out again
    made = {}
    for suffix, (ground, metadata) in SUFFIXES.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, metadata=metadata, facecolor=ground)
        made[suffix] = buffer.getvalue()
    return made


def axes_of(title: str, height: float = 1.0) -> tuple[Figure, Axes]:
    """A figure as wide as a column of a paper, or a phone; `height` is in units of 3.1 inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.1 * height))
    axes = figure.subplots()
    axes.set_title("\n".join(textwrap.wrap(title, 52)))
    return figure, axes


def label_ends(axes: Axes) -> None:
    """Write each line's label beside where it ends, in place of a legend; labels that would meet are moved apart.

    The limits of the y axis must be settled.
    """
    import numpy as np
    from matplotlib.lines import Line2D

    low, high = axes.get_ylim()
    figure: Any = axes.get_figure(root=True)
    row = 0.075 * 3.1 / figure.get_figheight()  # of the axes' height, a line of text
    ends = []
    for drawn in axes.lines:
        values = [value for value in np.asarray(drawn.get_ydata(), float).tolist() if math.isfinite(value)]
        if values and not str(drawn.get_label()).startswith("_"):
            text = textwrap.fill(str(drawn.get_label()).replace(" %", "\u00a0%"), 22)
            ends.append(((values[-1] - low) / (high - low), text, drawn))
    ends.sort(key=lambda end: end[0])
    places = moved_apart([end[0] for end in ends], [row * (1 + end[1].count("\n")) for end in ends])
    for (_, text, drawn), at in zip(ends, places, strict=True):
        key = Line2D([1.02, 1.07], [at, at], transform=axes.transAxes, clip_on=False, color=drawn.get_color())
        key.set(linestyle=drawn.get_linestyle(), linewidth=drawn.get_linewidth())
        axes.add_artist(key)
        axes.text(1.09, at, text, transform=axes.transAxes, va="center", fontsize=8.5)


def label_points(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each point's label right of the axes, at its height or moved so far that none meets another, and a thin
    line from the point to it. The limits of the axes must be settled.

    Args:
        points: x, y and label, in data coordinates.
    """
    figure: Any = axes.get_figure(root=True)
    row = 0.16 / figure.get_figheight() / axes.get_position().height  # of the axes' height, a line of text
    shares = [tuple(axes.transAxes.inverted().transform(axes.transData.transform(point[:2]))) for point in points]
    order = sorted(range(len(points)), key=lambda index: shares[index][1])
    places = moved_apart([shares[index][1] for index in order], [row] * len(order))
    for index, at in zip(order, places, strict=True):
        (x, y), text = shares[index], points[index][2]
        line = axes.plot([x, 1.03], [y, at], color=GREY, linewidth=0.5, alpha=0.6, transform=axes.transAxes)
        line[0].set(clip_on=False, zorder=1)
        axes.text(1.04, at, text, transform=axes.transAxes, va="center", fontsize=8.5)


def moved_apart(places: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Middles of boxes, moved so far that none meets another; as a whole they stay in [0, 1] where that has room.

    Args:
        places: from low to high.

    >>> [round(place, 2) for place in moved_apart([0.5, 0.5, 0.95], [0.2, 0.2, 0.2])]
    [0.5, 0.7, 0.9]
    """
    moved: list[float] = []
    for place, height in zip(places, heights, strict=True):
        least = moved[-1] + (heights[len(moved) - 1] + height) / 2 if moved else height / 2
        moved.append(max(place, least))
    top = 1.0
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], top - heights[index] / 2)
        top = moved[index] - heights[index] / 2
    return moved


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


def name_ticks(axis: Axis, names: list[str], *, most: int = 40, upright: bool = False) -> None:
    """Names at integer positions; every n-th where more than `most` would overlap."""
    shown = range(0, len(names), max(1, math.ceil(len(names) / most)))
    labels = [name if len(name) <= 18 else name[:17] + "…" for name in (names[index] for index in shown)]
    axis.set_ticks(list(shown), labels, rotation=90 if upright else 0, fontsize=8)


def are_crowded(names: list[str]) -> bool:
    """Whether names beside each other would overlap."""
    return sum(min(len(name), 18) + 2 for name in names) > 55


def accuracy_axis(axes: Axes) -> None:
    """Label the y axis as accuracy, a share in [0, 1] shown in percent."""
    axes.set_ylabel("accuracy")
    axes.yaxis.set_major_formatter(percent_format())


def percent_format() -> Any:
    """A matplotlib formatter that shows 1.0 as "100 %", and no more digits than there are."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{round(100 * value, 6):g} %")


def round_axis(axes: Axes) -> None:
    """Label the x axis as rounds, with ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def with_labels(figure: Figure) -> Figure:
    """The same figure, with labels at the ends of its lines."""
    for axes in figure.axes:
        label_ends(axes)
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
