"""How numbers are written for readers, the same in the report, the plots and the headline."""

from __future__ import annotations

from typing import Any


def percent(value: float | None) -> str:
    """
    >>> percent(0.9155), percent(None)
    ('91.5 %', '–')
    """
    return "–" if value is None else f"{100 * value:.1f} %"


def show_points(gain: float) -> str:
    """A difference of two shares, in percentage points.

    >>> points(-0.0312)
    '-3.1 points'
    """
    shown = f"{100 * gain:+.1f}"
    return f"{'0.0' if shown in ('-0.0', '+0.0') else shown} points"


def number(value: Any) -> str:
    """A number as a reader wants it: integers whole, others to four significant digits; other values as text."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def show_duration(seconds: float) -> str:
    """A length of time as people say it.

    >>> about(12.4), about(150), about(9000)
    ('12 s', '2 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def key_words(key: str) -> str:
    """A key as words: underscores become spaces."""
    return key.replace("_", " ")
