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

    >>> show_points(-0.0312)
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


def size(count: float | None) -> str:
    """Bytes as people say them, in powers of 1000.

    >>> size(640), size(7_818), size(6_254_000), size(1.26e9)
    ('640 bytes', '7.8 kB', '6.3 MB', '1.3 GB')
    """
    if count is None:
        return "–"
    if count < 1000:
        return f"{count:.0f} bytes"
    units = ((1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB"))
    unit, name = next((pair for pair in units if count < 1e3 * pair[0]), units[-1])
    shown = count / unit
    return f"{shown:.1f} {name}" if shown < 100 else f"{shown:.0f} {name}"


def show_duration(seconds: float) -> str:
    """A length of time as people say it.

    >>> show_duration(12.4), show_duration(150), show_duration(9000)
    ('12 s', '2 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def show_seconds(seconds: float | None) -> str:
    """A length of time as `show_duration` has it, and shorter ones to a digit that differs.

    >>> show_seconds(0.34), show_seconds(3.881), show_seconds(87)
    ('0.3 s', '3.9 s', '87 s')
    >>> show_seconds(0.0123)
    '12 ms'
    """
    if seconds is None:
        return "–"
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 10 else show_duration(seconds)


def key_words(key: str) -> str:
    """A key as words: underscores become spaces."""
    return key.replace("_", " ")
