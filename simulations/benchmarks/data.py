"""`fedpeft bench data`: what texts and photos cost a run in memory and time, and what reading them costs.

Every row is a process of its own, or a tree of them: one process, two workers (`run.workers=2`), or two actors of Ray.
Memory is looked at twice a second, and is that of the whole tree (`data_memory`), from its start to the end of
training; the report is not in it. It is resident memory of one process, and of several the sum in which shared pages
count once. Above the model is: less what a process has that has loaded libraries and model and no data. For workers and
Ray, which load as many models as there are processes, it is: less what the same run has on FEW records. Growth is the
largest anonymous memory in the last round less that in the first.

A cold start has no cache, a warm one that of the run before, of which reading the data is timed by itself too, when all
is imported; the pages of files may be in the kernel's memory in both. Seconds are from the command on, Python's imports
in them. On a machine that does other work trust CPU seconds.

The rival (`photo_loop`) makes two passes over some of the photos with the same model in one process, and so do we, in
turn; rates are of the second. Over photos of unequal size, which both change anew in every pass, both go to a result:
an accuracy on other photos and an adapter on disk, ours with the report besides.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from fedpeft import files
from fedpeft.errors import InputError
from fedpeft.simulations.benchmarks.cells import Progress, Tell, silent
from fedpeft.simulations.benchmarks.data_memory import Sample, peak, watched
from fedpeft.simulations.benchmarks.data_work import BATCH, CLIENTS, config_of, model_of, prepare

ENGINES: dict[str, dict[str, Any]] = {"one": {}, "workers": {"workers": 2}, "ray": {"workers": 2, "engine": "ray"}}
ROUNDS, PASSES, FEW = 3, 2, 40
STEPS = {"texts": 10, "photos": 3}  # of a client in a round: 3,200 texts, 960 photos
GOALS = {"texts": (300.0, 60.0), "photos": (600.0, 10.0)}  # MB above the model, seconds to the first step when warm
READ_S = 2.0  # to have the data from a warm cache, when all is imported
Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Folders of a benchmark: what it runs on, and what it makes of it."""

    data: Path
    work: Path


def run(
    out: Path,
    data: Path | None = None,
    texts: int = 300_000,
    photos: int = 20_000,
    rival: int = 5000,
    unequal: int = 5000,
    engines: tuple[str, ...] = tuple(ENGINES),
    repeats: int = 3,
    quick: bool = False,
    tell: Tell = silent,
) -> Row:
    """Measure, and write results.json to `out`.

    Args:
        data: where texts and photos are, or are made, and stay; None makes them for this once.
        texts, photos: how many; 0 leaves them out.
        rival: photos of the comparison with a plain loop; 0 leaves it out.
        unequal: photos of unequal size of the comparison to a result; 0 leaves it out.
        engines: of ENGINES.
        repeats: of those comparisons.
        quick: few records in one process, to see that it works.
        tell: is given a line for every row.

    Raises:
        InputError: an unknown engine, too few records, or nothing to measure.
        RunError: a run failed.
    """
    if quick:
        texts, photos, rival, unequal, engines, repeats = FEW, FEW, FEW, FEW, ("one",), 1
    _require(engines, {"texts": texts, "photos": photos, "rival": rival, "unequal": unequal}, repeats)
    sizes = {kind: count for kind, count in (("texts", texts), ("photos", photos)) if count}
    each = 3 + sum(1 if name == "one" else 2 for name in engines)
    races = {kind: count for kind, count in (("photos", rival), ("unequal", unequal)) if count}
    progress = Progress(tell, each * len(sizes) + 2 * repeats * len(races))
    asked = f"--texts {texts} --photos {photos} --rival {rival} --unequal {unequal}"
    asked += f" --engines {','.join(engines)} --repeats {repeats}"
    results: Row = {
        "reproduce": "fedpeft bench data --out DIR " + ("--quick" if quick else asked),
        "quick": quick,
        "cores": os.cpu_count(),
        "rows": [],
        "rival": [],
    }

    def keep(part: str, row: Row) -> None:  # at once: some rows take minutes
        results[part].append(row)
        results["goals"] = goals(results["rows"], results["rival"])
        files.write_bytes(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())

    with TemporaryDirectory(prefix="fedpeft-bench-") as made:
        work = Path(made).resolve()
        place = Place(work / "data" if data is None else data.resolve(), work)
        for kind, count in sizes.items():
            for row in _runs(place, kind, count, engines, progress):
                keep("rows", row)
        for kind, count in races.items():
            for row in _races(place, kind, count, repeats, progress):
                keep("rival", row)
    return results


def _require(engines: tuple[str, ...], counts: dict[str, int], repeats: int) -> None:
    wrong = [name for name in engines if name not in ENGINES]
    if wrong or not engines:
        raise InputError(f"--engines: {', '.join(wrong) or 'none'} given; known are {', '.join(ENGINES)}.")
    if not any(counts.values()):
        raise InputError("--texts, --photos, --rival and --unequal are all 0: there is nothing to measure.")
    if "one" not in engines:
        raise InputError("--engines: one is among them, as others go on with its cache.")
    for name, count in counts.items():
        if count and count < 2 * CLIENTS:
            raise InputError(f"--{name}: {count}; {CLIENTS} clients need {2 * CLIENTS}, and 0 leaves them out.")
    if repeats < 1:
        raise InputError(f"--repeats: {repeats}; at least 1.")


def _runs(place: Place, kind: str, count: int, engines: tuple[str, ...], progress: Progress) -> Iterator[Row]:
    """The rows of one kind of records: the model alone, a cold and a warm start, and those of more processes."""
    source, few = prepare(place.data, kind, count), prepare(place.data, kind, FEW)
    steps = min(STEPS[kind], max(1, count // CLIENTS // BATCH))
    model, _ = _process(place, {"work": "model", "config": config_of(place.data, kind, source, 1, 1, place.work / "x")})
    progress(f"{kind}: model alone")
    for engine in engines:
        for cache in ("cold", "warm") if engine == "one" else ("warm",):
            config = config_of(place.data, kind, source, steps, ROUNDS, place.work / f"cache-{kind}")
            config["run"] |= ENGINES[engine]
            noted, samples = _process(place, {"work": "run", "config": config})
            base = model["memory"]
            if engine != "one":
                progress(f"{kind}, {engine}")
                config["data"] |= {"source": str(few), "cache": str(place.work / f"cache-few-{kind}")}
                small, seen = _process(place, {"work": "run", "config": config})
                base = {key: peak(seen, key, until=small["end"][0]) for key in base}
            row = {"kind": kind, "records": count, "engine": engine, "cache": cache, "load": os.getloadavg()[0]}
            row |= {"model_s": model["end"][0], "model_cpu_s": model["end"][1]}
            if cache == "warm" and engine == "one":
                seconds = _process(place, {"work": "read", "config": config})[0]["seconds"]
                row |= {"read_s": seconds[0], "read_cpu_s": seconds[1]}
                progress(f"{kind}: read from the cache")
            yield row | describe(noted, samples, base, min(count, steps * CLIENTS * BATCH), engine == "one")
            progress(f"{kind}, {engine}, {cache} cache{'' if engine == 'one' else ', few records'}")


def describe(noted: Row, samples: list[Sample], base: dict[str, float], records: int, alone: bool) -> Row:
    """A row of what was noted of a run and of its memory.

    Args:
        base: MB that are no data's.
        records: that a round trains on.
        alone: it is one process.
    """
    rounds, end = noted["rounds"], noted["end"][0]
    peaks = {key: peak(samples, key, until=end) for key in base}
    counted = "resident" if alone else "shared"
    first = peak(samples, "anonymous", until=rounds[0][0])
    last = peak(samples, "anonymous", since=rounds[-2][0], until=end)
    step = noted.get("first_step")
    return {
        **{f"{key}_mb": value for key, value in peaks.items()},
        "peak_mb": peaks[counted],
        "above_mb": peaks[counted] - base[counted],
        "anonymous_above_mb": peaks["anonymous"] - base["anonymous"],
        "growth_mb": last - first,
        "first_step_s": None if step is None else step[0],
        "first_step_cpu_s": None if step is None else step[1],
        "records_per_s": (len(rounds) - 1) * records / (rounds[-1][0] - rounds[0][0]),
        "records_per_cpu_s": None if step is None else (len(rounds) - 1) * records / (rounds[-1][1] - rounds[0][1]),
    }


def _races(place: Place, kind: str, count: int, repeats: int, progress: Progress) -> list[Row]:
    """Passes over the photos, ours and the rival's in turn, unequal ones to a result; a row of medians for each."""
    source, model, whole = prepare(place.data, kind, count), model_of(place.data, kind), kind == "unequal"
    config = config_of(place.data, kind, source, None, PASSES, place.work / f"cache-{kind}-rival")
    where: Row = {"model": model, "source": str(source), "cache": str(place.work / "rival")}
    where |= {"augment": config["data"].get("augment", []), "test": config["data"]["test"] if whole else None}
    jobs: dict[str, Row] = {
        "rival": {"work": "loop", "passes": PASSES, **where},
        "fedpeft": {"work": "run", "config": config, "whole": whole},
    }
    found: dict[str, list[Row]] = {name: [] for name in jobs}
    for repeat in range(repeats):
        for name in list(jobs)[:: 1 if repeat % 2 else -1]:
            noted, samples = _process(place, jobs[name])
            before, last = noted["rounds"]
            end = noted["end"] if whole else last
            found[name].append(
                {
                    "first_step_s": noted["first_step"][0],
                    "first_step_cpu_s": noted["first_step"][1],
                    "seconds": end[0],
                    "cpu_seconds": end[1],
                    "records_per_s": count / (last[0] - before[0]),
                    "records_per_cpu_s": count / (last[1] - before[1]),
                    "peak_mb": peak(samples, "resident", until=noted["end"][0]),
                    "load": os.getloadavg()[0],
                    **({"accuracy": noted["accuracy"]} if whole else {}),
                }
            )
            progress(f"{count} {kind}, {name}")
    return [
        {"kind": kind, "engine": name, "records": count, **{key: median(row[key] for row in every) for key in every[0]}}
        for name, every in found.items()
    ]


def _process(place: Place, job: Row) -> tuple[Row, list[Sample]]:
    """Do a job of `data_work` in a fresh process; what it noted, and its memory, at seconds since it was started."""
    with TemporaryDirectory(dir=place.work) as made:
        job |= {"out": f"{made}/run", "result": f"{made}/result.json"}
        (Path(made) / "job.json").write_text(json.dumps(job))
        script = "import sys; from fedpeft.simulations.benchmarks.data_work import main; main(sys.argv[1])"
        quiet = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "FLWR_TELEMETRY_ENABLED": "0"}
        began, samples = watched([sys.executable, "-c", script, f"{made}/job.json"], {**os.environ, **quiet})
        noted = json.loads((Path(made) / "result.json").read_text())
    for key, value in noted.items():
        if key in ("first_step", "end"):
            noted[key] = [value[0] - began, value[1]]
        elif key == "rounds":
            noted[key] = [[wall - began, cpu] for wall, cpu in value]
    return noted, [(moment - began, found) for moment, found in samples]


def goals(rows: list[Row], races: list[Row]) -> list[Row]:
    """What was to be reached at full size, what was, and whether."""
    found = []
    for row in rows:
        most, soon = GOALS[row["kind"]]
        name = f"{row['records']} {row['kind']}, {row['engine']}, {row['cache']}"
        found.append((f"{name}: MB above the model", most, row["above_mb"]))
        if row["cache"] == "warm" and row["first_step_s"] is not None:
            found.append((f"{name}: seconds to the first step", soon, row["first_step_s"]))
            found.append((f"{name}: seconds to read the data from the cache", READ_S, row["read_s"]))
    for kind in dict.fromkeys(row["kind"] for row in races):
        by_name = {row["engine"]: row for row in races if row["kind"] == kind}
        if len(by_name) == 2:
            ours, theirs = by_name["fedpeft"], by_name["rival"]
            whole = kind == "unequal"
            ratio = (
                ours["cpu_seconds"] / theirs["cpu_seconds"]
                if whole
                else theirs["records_per_cpu_s"] / ours["records_per_cpu_s"]
            )
            what = "a run to its result over" if whole else "a pass over"
            name = f"{what} {ours['records']} {kind}: CPU seconds over those of a plain loop"
            found.append((name, 1.0, ratio))
    return [{"goal": name, "most": most, "measured": value, "met": value <= most} for name, most, value in found]


def show(results: Row) -> None:
    """Print the rows, the comparison and the goals."""
    from rich.table import Table

    from fedpeft.cli.console import out

    def table(title: str, keys: dict[str, str], rows: list[Row]) -> None:
        made = Table(title=title, title_justify="left")
        for key, name in keys.items():
            made.add_column(name, justify="left" if key in ("records", "engine", "cache") else "right", no_wrap=True)
        for row in rows:
            made.add_row(*(_shown(row, key) for key in keys))
        out.print(made)

    names = {"records": "records", "engine": "engine", "cache": "cache"}
    memory = {"peak_mb": "peak\nMB", "above_mb": "above", "anonymous_above_mb": "anon.\nabove", "growth_mb": "grows"}
    times = {"read_s": "read\ns", "first_step_s": "step 1\ns", "first_step_cpu_s": "CPU s", "records_per_s": "/s"}
    if results["rows"]:
        table("memory, start and records per second", names | memory | times, results["rows"])
    if results["rival"]:
        each = {"records": "records", "engine": "engine", "seconds": "seconds", "cpu_seconds": "CPU s"}
        each |= {"records_per_s": "records/s", "records_per_cpu_s": "/CPU s", "accuracy": "accuracy"}
        table("passes over photos, a plain loop's beside ours", each, results["rival"])
    for row in results["goals"]:
        out.print(
            f"{'met' if row['met'] else 'MISSED'}: {row['goal']}: {row['measured']:.2f}, at most {row['most']:g}",
            soft_wrap=True,
        )
    out.print(f"REPRODUCE: {results['reproduce']}", soft_wrap=True)


def _shown(row: Row, key: str) -> str:
    if key == "records" and "kind" in row:
        return f"{row['records']} {row['kind']}"
    value = row.get(key)
    if key == "accuracy" and value is not None:
        return f"{value:.1%}"
    return (
        value if isinstance(value, str) else "" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"
    )
