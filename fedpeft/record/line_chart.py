"""A line chart as SVG inside an HTML page: small, drawn without a library, in the colours of the page's style.

Colours and dashes are classes (`c0` to `c7`, `dashed`) that the page's style sheet fills, so dark and light are its
matter. Whoever does not see the picture is read the title, and the first and the last value of every line.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from itertools import groupby

from fedpeft.record.words import number, percent

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 34  # around the field, in units of the picture
MOST_POINTS = 1000  # of one line
Point = tuple[int, float, object]


@dataclass(frozen=True)
class Line:
    """Points (round, value, group), of which those of one group are joined: what unlike classes have is not."""

    label: str
    place: int
    points: list[Point]

    @property
    def css(self) -> str:
        """Classes of the style sheet."""
        return f"c{self.place % 8}{' dashed' if self.place >= 8 else ''}"


def svg_lines(key: str, title: str, lines: list[Line], shares: bool) -> str:
    """A figure with its legend; empty where no line has a point.

    Args:
        key: tells this picture from others on the page.
        shares: whether values are shares, written in percent.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    show = percent if shares else number
    across = _choose_scale([point[0] for line in lines for point in line.points], LEFT, WIDTH - RIGHT, whole=True)
    up = _choose_scale([point[1] for line in lines for point in line.points], HEIGHT - BOTTOM, TOP)
    drawn = [*_draw_grid(across, up, shares), *(mark for line in lines for mark in _draw_marks(line, across, up))]
    words = "; ".join(
        f"{line.label}: {show(line.points[0][1])} in round {line.points[0][0]}, {show(line.points[-1][1])} in round "
        f"{line.points[-1][0]}"
        for line in lines
    )
    legend = "".join(
        f'<li><svg class="key" viewBox="0 0 24 8" aria-hidden="true"><path class="{line.css}" d="M0 4H24"/></svg>'
        f"{html.escape(line.label)} <b>{show(line.points[-1][1])}</b></li>"
        for line in lines
    )
    return (
        f'<figure><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-labelledby="{key}-title {key}-desc"><title id="{key}-title">{html.escape(title)}</title>'
        f'<desc id="{key}-desc">{html.escape(words)}</desc>{"".join(drawn)}</svg>'
        f'<ul class="legend">{legend}</ul></figure>'
    )


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    stop: float
    ticks: list[float]

    def at(self, value: float) -> float:
        """Where a value lies in the picture."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def _choose_scale(values: list[float] | list[int], start: float, stop: float, whole: bool = False) -> _Scale:
    low, high = float(min(values)), float(max(values))
    if high == low:
        low, high = (low - 1, high + 1) if whole else (low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1))
    # Five steps at most; 1e-9 keeps rounding from taking the next wider one, or the outermost tick.
    rough = (high - low) / 5
    size = 10 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    first, count = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return _Scale(low, high, start, stop, [tick * step for tick in range(first, count + 1)])


def _draw_grid(across: _Scale, up: _Scale, shares: bool) -> list[str]:
    marks = []
    for tick in up.ticks:
        y, text = up.at(tick), f"{100 * tick:.4g} %" if shares else f"{tick:.4g}"
        marks.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in across.ticks:
        x = across.at(tick)
        marks.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:.0f}</text>')
    marks.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">round</text>')
    return marks


def _draw_marks(line: Line, across: _Scale, up: _Scale) -> list[str]:
    """The line, and a dot at the end of each group, which may be all that it has."""
    every = math.ceil(len(line.points) / MOST_POINTS)
    # Counted from the end, so that the newest point is always drawn.
    points = [point for place, point in enumerate(reversed(line.points)) if place % every == 0][::-1]
    marks = []
    for _, group in groupby(points, key=lambda point: point[2]):
        places = [f"{across.at(x):.1f} {up.at(y):.1f}" for x, y, _ in group]
        x, y = places[-1].split(" ")
        marks.append(f'<path class="{line.css}" d="M{"L".join(places)}"/>')
        marks.append(f'<circle class="{line.css}" cx="{x}" cy="{y}" r="3"/>')
    return marks
