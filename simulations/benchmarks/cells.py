"""Benchmarks of many cells share lists of names with options, and cells as files that are not run again.

>>> entries("digits-c/dirichlet:delta=0.1,batch=16,vader/movie")
['digits-c/dirichlet:delta=0.1,batch=16', 'vader/movie']
>>> named("coso:side=in,r1=4")
('coso', {'side': 'in', 'r1': '4'})
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import stdev
from typing import TYPE_CHECKING, Any

from fedpeft import __version__, files, progress, registry
from fedpeft import config as configs
from fedpeft.errors import InputError
from fedpeft.record import drawing
from fedpeft.record.words import show_duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
Tell = Callable[[str], None]


class Progress:
    """Says of every finished part of a benchmark: what, how many of how many, and about how long the rest takes.

    Args:
        tell: is given a line.
        total: parts in all.
    """

    def __init__(self, tell: Tell, total: int) -> None:
        self.tell, self.total = tell, total
        self.done = self.ran = 0
        self.started = time.monotonic()
        progress.step("parts", 0, total)

    def __call__(self, line: str) -> None:
        self.done, self.ran = self.done + 1, self.ran + 1
        progress.step("parts", self.done, self.total)
        rest = (time.monotonic() - self.started) / self.ran * (self.total - self.done)
        self.tell(
            f"{self.done}/{self.total} {line}" + (f", {show_duration(rest)} left" if self.done < self.total else "")
        )

    def skip(self, parts: int = 1) -> None:
        """Count what was there already: it took no time, so the rest is not reckoned from it."""
        self.done += parts
        progress.step("parts", self.done, self.total)


def silent(line: str) -> None:
    """Tell nobody."""


def entries(text: str) -> list[str]:
    """A list with commas between, whose entries may hold commas in their options: name:key=value,key=value."""
    found: list[str] = []
    for piece in (part.strip() for part in text.split(",") if part.strip()):
        if re.match(r"\w+\s*=", piece) and found and ":" in found[-1]:
            found[-1] += f",{piece}"
        else:
            found.append(piece)
    return found


def named(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of an entry, as typed."""
    name, _, options = text.partition(":")
    return name, configs.parse_overrides(options.split(",")) if options else {}


def registered(table: str, text: str, flag: str) -> tuple[str, dict[str, Any]]:
    """Name and options, as users write them, of an entry of a registry table.

    Raises:
        InputError: an unknown name or option, or a value out of bounds; `flag` is blamed.
    """
    name, given = named(text)
    cls = registry.load(table, name, flag)
    known = configs.options_of(cls)
    for key in given:
        if key not in known:
            raise InputError(registry.unknown(f"{flag} {name}", key, known))
    built = configs.read_options(cls, given, f"{flag} {name}")
    return name, {key: built[known[key].name] for key in given}


def canonical(name: str, options: Any) -> str:
    """The name with all options that are not the default, in the order of their declaration."""
    changed = [
        f"{item.name}={getattr(options, item.name)}"
        for item in dataclasses.fields(options)
        if getattr(options, item.name) != configs.default_of(item)
    ]
    return name + (f":{','.join(changed)}" if changed else "")


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", name)


def read(path: Path, key: Row) -> Row | None:
    """The row of a finished cell, None where it has not been run.

    Raises:
        InputError: it was run with something else than `key`.
    """
    if not path.exists():
        return None
    row: Row = json.loads(path.read_text())
    other = [name for name, value in key.items() if row.get(name) != value]
    if other:
        raise InputError(f"{path}: this cell was run with another {' and '.join(other)}. Give another --out.")
    return row


def write(path: Path, row: Row) -> None:
    """Write a cell's row whole or not at all; a NaN or inf in it is a ValueError."""
    files.write_bytes(path, (json.dumps(row, indent=1, allow_nan=False) + "\n").encode())


def write_results(
    out: Path, name: str, options: Sequence[str], seeds: int, quick: bool, table: list[Row], rows: list[Row]
) -> Row:
    """Write results.json of a benchmark over seeds, and return its content: the command that makes it again, table and
    rows.

    Args:
        options: of the command, as it was called, but for --out, --seeds and --quick.
    """
    command = [f"fedpeft bench {name} --out DIR", *options, f"--seeds {seeds}", *(["--quick"] if quick else [])]
    results: Row = {"reproduce": " ".join(command), "seeds": seeds, "quick": quick, "versions": versions()}
    results |= {"table": table, "rows": rows}
    write(out / "results.json", results)
    return results


def versions() -> dict[str, str]:
    """Versions that a row is said to be made with: fedpeft, torch, Python."""
    import torch

    return {"fedpeft": __version__, "torch": torch.__version__, "python": platform.python_version()}


def spread(values: list[float]) -> float | None:
    """Standard deviation over seeds; None for one."""
    return stdev(values) if len(values) > 1 else None


def percent(value: float, deviation: float | None) -> str:
    """A share as 71.2 ± 1.5, in points."""
    return f"{100 * value:.1f}{plus_minus(deviation)}"


def plus_minus(value: float | None) -> str:
    """A share as " ± " and percent to one digit; nothing for None."""
    return "" if value is None else f" ± {100 * value:.1f}"


def publish(
    out: Path, name: str, figures: Callable[[Row], dict[str, Figure]], page: Callable[[Row, dict[str, bytes]], str]
) -> list[Path]:
    """Draw a benchmark's plots, as PNG, SVG and PDF, and write report.html from `out`/results.json alone; the files
    written, page last.

    Args:
        name: of the command, fedpeft bench NAME.
        page: makes the page of the results and the plots as SVG.

    Raises:
        InputError: there are no results.
    """
    path = out / "results.json"
    if not path.is_file():
        raise InputError(f"{path}: there are no results; run fedpeft bench {name} --out {out}.")
    results = json.loads(path.read_text())
    images: dict[str, bytes] = {}
    written: list[Path] = []
    with drawing.style():
        for image, figure in figures(results).items():
            made = drawing.files(figure)
            images[image] = made["svg"]
            for suffix, content in made.items():
                written.append(out / f"{image}.{suffix}")
                files.write_bytes(written[-1], content)
    files.write_bytes(out / "report.html", page(results, images).encode())
    return [*written, out / "report.html"]


def label(name: str) -> str:
    """A name for a legend: matplotlib leaves out what begins with an underscore."""
    return f" {name}" if name.startswith("_") else name
