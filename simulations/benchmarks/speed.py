"""`fedpeft bench speed`: local training of many clients, by our cohort and by what else there is.

Before anything is timed, all engines train the same few clients in float64 and have to agree. Engines of one model are
then timed in one process with one thread, one after another in every repeat, each repeat starting with the next one, so
that a slow minute of the machine hits all. Seconds are medians over the repeats; a ratio is the median of the repeats'
own ratios, `sequential peft / engine`: above 1 is faster than the plain peft loop. On a shared CPU trust the ratios of
CPU seconds. Peak memory is that of a process of its own, above the loaded model. Beside each row stands what share of
its time this machine takes for the bare products of the frozen base (`speed_limit`); the table is named after the
machine, as another one has other ratios.

Whole runs (`simulate`, and with `model.dtype=auto` `simulate-auto`, `flower`, `pfl`) are timed from the command to its
end; their ratio is `flower / engine`.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import multiprocessing
import platform
import re
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from fedpeft import __version__, extras, files, seeds
from fedpeft.errors import InputError, RunError
from fedpeft.models import rates
from fedpeft.run.world import find_device as device_of
from fedpeft.simulations.benchmarks import speed_limit, whole_run
from fedpeft.simulations.benchmarks.cells import Progress, Tell, silent
from fedpeft.simulations.benchmarks.server_cost import resident
from fedpeft.simulations.benchmarks.speed_engines import ENGINES, Engine, adapted, make
from fedpeft.simulations.benchmarks.speed_work import MODELS, Work, backbone, work

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXACT = 1e-10
ROUNDS = 10  # of a whole run
DEFAULT = ("peft", "sequential", "cohort", "cohort-dp", "opacus", "opacus-ghost")
NEEDED = {"opacus": "opacus", "opacus-ghost": "opacus", "flower": "ray"}  # engine -> the package that it is of
Row = dict[str, Any]
Times = dict[str, list[tuple[float, float]]]  # engine -> wall and CPU seconds of each repeat


def usable_engines(where: torch.device) -> tuple[str, ...]:
    """All engines that can be run here."""
    bfloat16 = rates.choose(rates.measure(rates.shapes_of(backbone("S")), where)) == "bfloat16"
    extra = {
        "graphs": where.type == "cuda",
        "peft-bf16": bfloat16,
        "cohort-bf16": bfloat16,
        "simulate": True,
        "simulate-auto": bfloat16,
        "flower": _installed("ray"),
        "pfl": _installed("pfl"),
    }
    return (*DEFAULT, *(name for name, here in extra.items() if here))


def run(
    out: Path,
    models: tuple[str, ...] = ("S",),
    clients: tuple[int, ...] = (8, 64),
    batch: tuple[int, ...] = (1, 2, 4, 8, 16),
    engines: tuple[str, ...] = (),
    repeats: int = 5,
    seq: int = 64,
    steps: int = 2,
    quick: bool = False,
    device: str = "auto",
    tell: Tell = silent,
) -> Row:
    """Check, time, and write results.json and speed.png to `out`.

    Args:
        engines: of `speed_engines.ENGINES` and `whole_run.ENGINES`; none are all that can be run here.
        quick: a tiny model and a few clients, to see that it works.
        tell: is given a line for every engine's peak memory and every race.

    Raises:
        InputError: an unknown name, a number below 1, or an engine that cannot run here.
        RunError: an engine does not compute what the others do, or a whole run failed.
    """
    where = device_of(device)
    names = engines or (DEFAULT if quick else usable_engines(where))
    if quick:
        models, clients, batch, repeats, seq = ("tiny",), (3,), (1, 2), 1, 16
    _require(models, names, (*(clients or (0,)), *(batch or (0,)), repeats, seq, steps), where)
    local = [name for name in names if name in ENGINES]
    whole = [name for name in names if name in whole_run.ENGINES]
    sizes = len(models) * len(clients) * len(batch)
    progress = Progress(tell, sizes * (1 + bool(whole)) + bool(local))
    rows, before = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        distance = check(local, where) if local else None
        if local:
            progress("engines checked against each other")
        cells = [(count, size) for count in clients for size in batch]
        for model in models:
            timed = _race_cells(model, local, cells, (seq, steps, repeats), where, progress)
            for (count, size), (times, bare) in zip(cells, timed, strict=True):
                case = {"model": model, "clients": count, "batch": size, "seq": seq, "steps": steps}
                peaks = {name: _child(name, case, where.type) for name in local}
                rows += [
                    {**case, **row, "products_seconds": bare.get(row["engine"])}
                    for row in summarise(times, peaks, "peft")
                ]
                if whole:
                    rows += [{**case, "rounds": ROUNDS, **row} for row in _whole(out, whole, case, repeats, where)]
                    progress(f"{model}, {count} clients, batch {size}: whole runs timed")
    finally:
        torch.set_num_threads(before)
    asked = {"models": models, "clients": clients, "batch": batch, "engines": names}
    options = {"repeats": repeats, "seq": seq, "steps": steps}
    results = {**describe(asked, options, quick, where), "largest_difference": distance, "rows": rows}
    _write_results(out, results)
    return results


def _write_results(out: Path, results: Row) -> None:
    """results.json, this machine's table, and the figure."""
    files.write_bytes(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    slug = re.sub(r"[^a-z0-9]+", "-", results["machine"].lower()).strip("-")
    files.write_bytes(out / f"{slug}.md", speed_limit.markdown(results).encode())
    from fedpeft.record import drawing

    with drawing.style():
        files.write_bytes(out / "speed.png", drawing.png(figure(results["rows"])))


def _race_cells(
    model: str,
    engines: list[str],
    cells: list[tuple[int, int]],
    lengths: tuple[int, int, int],
    where: torch.device,
    progress: Progress,
) -> list[tuple[Times, dict[str, float]]]:
    """Seconds of each engine in each cell (clients, batch), and of its bare products; the engines are gone when it
    returns.

    Args:
        lengths: tokens of a text, steps, repeats.
    """
    seq, steps, repeats = lengths
    built = {name: make(name, model, where) for name in engines}
    start = adapted(model, where, torch.float32).state().tensors
    timed = []
    for count, size in cells:
        case = work(start, count, size, seq, steps)
        bare = {
            name: speed_limit.bare_seconds(speed_limit.products_of(engine, case), where)
            for name, engine in built.items()
            if name != "graphs"  # whose products are replayed, and not called
        }
        timed.append((race(built, case, repeats, where), bare))
        progress(f"{model}, {count} clients, batch {size}: local training timed")
    return timed


def describe(asked: dict[str, tuple[Any, ...]], options: dict[str, int], quick: bool, where: torch.device) -> Row:
    """The command that makes these figures again, and what they were measured on."""
    words = [f"--{key} {','.join(map(str, value))}" for key, value in asked.items()]
    words += [f"--{key} {value}" for key, value in options.items()]
    machine = speed_limit.machine_name(where)
    return {
        "reproduce": f"fedpeft bench speed --out DIR {' '.join(words)}{' --quick' if quick else ''}",
        "quick": quick,
        "repeats": options["repeats"],
        "device": f"{where.type} ({machine})",
        "machine": machine,
        "threads": 1,
        "versions": {"fedpeft": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _require(models: tuple[str, ...], names: tuple[str, ...], numbers: tuple[int, ...], where: torch.device) -> None:
    known = (*ENGINES, *whole_run.ENGINES)
    for key, given, allowed in (("models", models, tuple(MODELS)), ("engines", names, known)):
        wrong = [name for name in given if name not in allowed]
        if wrong or not given:
            raise InputError(f"--{key}: {', '.join(wrong) or 'none'} given; known are {', '.join(allowed)}.")
    if min(numbers) < 1:
        raise InputError(f"bench speed: clients, batch, repeats, seq and steps must be at least 1, not {min(numbers)}.")
    if "graphs" in names and where.type != "cuda":
        raise InputError(f"--engines: graphs needs a CUDA device, not {where.type}.")
    for name, package in NEEDED.items():
        if name in names:
            extras.require(package, f"--engines: {name}")
    if "pfl" in names and not _installed("pfl"):
        raise InputError("--engines: pfl needs pfl-research: pip install --no-deps pfl==0.6.0 prv-accountant==0.2.0")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def check(names: list[str], device: torch.device) -> float:
    """Largest difference of a trained value from the plain peft loop's, or of a private one from Opacus'; in float64,
    with AdamW, no noise, a clip that bites, and Poisson draws, one of them empty.

    Raises:
        RunError: it is above rounding, or training moved nothing.
    """
    generator = seeds.torch_generator(0, "bench", "check")
    form = adapted("tiny", device, torch.float64).state().tensors
    start = {
        key: 0.2 * torch.randn(value.shape, generator=generator, dtype=torch.float64) for key, value in form.items()
    }
    case = work(start, 5, 2, 12, 4, sigma=0.0, clip=0.3)
    worst, reference = 0.0, {}
    for dp, name in ((False, "peft"), (True, "opacus")):
        reference[dp] = make(name, "tiny", device, torch.float64)(case)
    for name in names:
        if ENGINES[name][1].get("base"):
            continue  # a base in bfloat16 is another model
        ends, dp = make(name, "tiny", device, torch.float64)(case), ENGINES[name][2]
        for end, wanted, other in zip(ends, reference[dp], reference[not dp], strict=True):
            distance = max(float((end[key] - value).abs().max()) for key, value in wanted.items())
            moved = min(float((end[key] - value).abs().max()) for key, value in start.items())
            apart = max(float((end[key] - value).abs().max()) for key, value in other.items())
            if not (distance < EXACT < min(moved, apart)):
                raise RunError(
                    f"bench speed: {name} is {distance:.1e} away from the reference (moved {moved:.1e}); "
                    "nothing was timed."
                )
            worst = max(worst, distance)
    return worst


def race(built: dict[str, Engine], case: Work, repeats: int, device: torch.device) -> Times:
    """Time every engine in every repeat, after a warm-up on two clients."""
    times: Times = {name: [] for name in built}
    few = Work(case.start, case.data[:2], case.config, case.plan, case.seed)
    for engine in built.values():
        engine(few)
    order = list(built)
    for _ in range(repeats):
        for name in order:
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            built[name](case)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        order = [*order[1:], *order[:1]]
    return times


def summarise(times: Times, peaks: dict[str, float | None], base: str) -> list[Row]:
    """A row an engine; ratios are to `base`, null where it was not timed."""
    rows = []
    for name, own in times.items():
        ratios = [
            median(first[kind] / max(second[kind], 1e-9) for first, second in zip(times[base], own, strict=True))
            if base in times
            else None
            for kind in range(2)
        ]
        rows.append(
            {
                "engine": name,
                "dp": name in ENGINES and ENGINES[name][2],
                "seconds": median(wall for wall, _ in own),
                "cpu_seconds": median(cpu for _, cpu in own),
                f"ratio_to_{'sequential' if base == 'peft' else base}": ratios[0],
                f"cpu_ratio_to_{'sequential' if base == 'peft' else base}": ratios[1],
                "peak_mb": peaks[name],
            }
        )
    return rows


def peak(engine: str, case: Row, device: str) -> float | None:
    """MB above the loaded model that one step of this case takes at most; called in a fresh process."""
    torch.set_num_threads(1)
    where = torch.device(device)
    built = make(engine, case["model"], where)
    start = adapted(case["model"], where, torch.float32).state().tensors
    given = work(start, case["clients"], case["batch"], case["seq"], 1)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before: int | None = torch.cuda.memory_allocated()
    else:
        before = resident("VmRSS")
    built(given)
    after = torch.cuda.max_memory_allocated() if where.type == "cuda" else resident("VmHWM")
    return None if after is None or before is None else max(0, after - before) / 1e6


def _child(engine: str, case: Row, device: str) -> float | None:
    """`peak` in a fresh process, forked from one that has only imported what is needed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "peft", "opacus", "transformers.models.bert.modeling_bert"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(peak, engine, case, device).result()


def _whole(out: Path, names: list[str], case: Row, repeats: int, device: torch.device) -> list[Row]:
    folder = (out / "work" / f"{case['model']}-{case['clients']}").absolute()
    whole_run.prepare(folder, case["model"], case["clients"], case["seq"])
    done: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            done[name].append(
                whole_run.measure(
                    name, folder, case["clients"], case["batch"], case["seq"], case["steps"], ROUNDS, device.type
                )
            )
    times = {name: [(each["seconds"], each["cpu_seconds"]) for each in every] for name, every in done.items()}
    return summarise(times, {name: max(each["peak_mb"] for each in every) for name, every in done.items()}, "flower")


def figure(rows: list[Row]) -> Figure:
    """Ratio of CPU seconds (on a GPU, of wall seconds) to the plain peft loop against the batch size."""
    from matplotlib.figure import Figure

    local = [row for row in rows if row["engine"] in ENGINES]
    panels = list(dict.fromkeys((row["model"], row["clients"]) for row in local)) or [("none", 0)]
    drawn = Figure(figsize=(4.2 * len(panels) + 1.8, 3.8))
    for axes, (model, clients) in zip(
        drawn.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        here = [row for row in local if (row["model"], row["clients"]) == (model, clients)]
        for name in dict.fromkeys(row["engine"] for row in here):
            own = [row for row in here if row["engine"] == name and row["cpu_ratio_to_sequential"] is not None]
            axes.plot(
                [str(row["batch"]) for row in own],
                [row["cpu_ratio_to_sequential"] for row in own],
                marker="o",
                label=name,
                linestyle="--" if ENGINES[name][2] else "-",
            )
        axes.set_title(f"{model}, {clients} clients")
        axes.set_xlabel("batch size")
    drawn.axes[0].set_ylabel("times faster than a peft loop\n(CPU seconds)")
    drawn.legend(*drawn.axes[0].get_legend_handles_labels(), loc="outside right center")
    return drawn


def show(results: Row) -> None:
    """Print the rows."""
    from rich.table import Table

    from fedpeft.cli.console import out

    table = Table(
        title=f"seconds of a round's local training on {results['device']}, one thread, medians of "
        f"{results['repeats']}",
        title_justify="left",
    )
    for column in ("model", "clients", "batch", "engine"):
        table.add_column(column, no_wrap=True)
    for column in ("seconds", "CPU s", "times\nfaster", "in\nCPU s", "% of\nproducts", "peak\nMB"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in results["rows"]:
        ratios = [value for key, value in row.items() if key.startswith(("ratio", "cpu_ratio"))]
        table.add_row(
            row["model"],
            str(row["clients"]),
            str(row["batch"]),
            row["engine"],
            f"{row['seconds']:.2f}",
            f"{row['cpu_seconds']:.2f}",
            *("" if value is None else f"{value:.2f}x" for value in ratios),
            speed_limit.share(row),
            "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
        )
    out.print(table)
    out.print(
        "% of products: the share of a row's CPU seconds that the bare products of the frozen base take here",
        style="dim",
    )
    out.print("times faster: than peft, whole runs (simulate, flower, pfl) than flower", style="dim")
    if results["largest_difference"] is not None:
        out.print(
            f"checked in float64 before timing: largest difference {results['largest_difference']:.0e}", style="dim"
        )
    out.print(f"REPRODUCE: {results['reproduce']}", soft_wrap=True)
