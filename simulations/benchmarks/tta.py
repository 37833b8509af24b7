"""`fedpeft bench tta`: test-time methods on drifting streams, built in and real.

A cell is one stream, source model, method and seed; the seed draws the stream, the source model and the method. Cells
are files: one that is there is read and not run again, so an interrupted benchmark goes on where it was. Methods have
their published defaults, nothing is tuned on a test stream; only the kind of augmented views follows the inputs. A
method that cannot run on a model has a row with the reason.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft import config as configs
from fedpeft import files, registry
from fedpeft.data.drift import TestStream, plan_hash
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from fedpeft.simulations.benchmarks import cells, tta_report, tta_sources, tta_streams
from fedpeft.simulations.benchmarks.cells import slug
from fedpeft.simulations.benchmarks.tta_streams import Bench
from fedpeft.tta.deployed import Deployed
from fedpeft.tta.method import make
from fedpeft.tta.play import run_stream, source_answers

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
BASELINES = ("source", "aug_average", "em_prior", "rdumb")
QUICK = ("bn_adapt", "tent", "lame")
Row = dict[str, Any]


class World:
    """What the cells of one stream, model and seed share; made when the first of them runs."""

    def __init__(self, bench: Bench, plan: Row, model: str, seed: int, sources: Path) -> None:
        self.bench, self.plan, self.model, self.seed, self.sources = bench, plan, model, seed, sources

    @cached_property
    def stream(self) -> TestStream:
        """The stream of the plan."""
        return self.bench.load(self.plan)

    @cached_property
    def source(self) -> tuple[Deployed, Encoded]:
        """The source model and the records it was trained on; trained parts are kept on disk."""
        return self.bench.source(self.model, self.seed, self.sources / slug(self.bench.name))

    @cached_property
    def references(self) -> list[Tensor]:
        """What the source model, unadapted, answers to each batch."""
        return source_answers(self.stream, self.source[0])

    @cached_property
    def facts(self) -> Row:
        """What a row says of model and stream: hash, number of parameters, segments."""
        deployed, _ = self.source
        return {
            "model_sha256": tta_sources.fingerprint(deployed),
            "parameters": tta_sources.parameters(deployed),
            "segments": segments(self.stream),
        }


def run(
    out: Path,
    streams: str,
    methods: str = "",
    models: str = "",
    seeds: int = 3,
    quick: bool = False,
    tell: cells.Tell = cells.silent,
) -> Row:
    """Run what is missing of the grid into `out`, then write results.json, plots and report.html.

    Args:
        streams: names with commas between, as `tta_streams` reads them.
        methods: names with commas between, options after a colon (lame:base=bn_adapt); empty is all. The baselines
            are always run.
        models: source models; empty is all that a stream has.
        seeds: runs of each cell.
        quick: small streams and source models, few methods: shows that the benchmark works.
        tell: is given a line for every finished cell.

    Raises:
        InputError: an unknown name or option, data that are not prepared, or cells in `out` of another plan.
    """
    if seeds < 1:
        raise InputError(f"--seeds: {seeds} is out of range; allowed: >= 1.")
    benches = [tta_streams.open_stream(name, quick) for name in cells.entries(streams)]
    if not benches:
        raise InputError("--stream: none given; for example digits-c/iid.")
    chosen = asked_methods(methods, quick)
    grid = [(bench, model) for bench in benches for model in asked_models(bench, models)]
    rows, progress = [], cells.Progress(tell, len(grid) * seeds * len(chosen))
    for bench, model in grid:
        for seed in range(seeds):
            plan = manifest(out / "manifests", bench, seed)
            world = World(bench, plan, model, seed, out / "sources")
            for method in chosen:
                rows.append(cell(out / "cells", world, method, quick, progress))
    command = "fedpeft bench tta --stream " + ",".join(bench.name for bench in benches)
    command += f" --methods {methods}" if methods else ""
    command += f" --models {models}" if models else ""
    command += f" --seeds {seeds}{' --quick' if quick else ''} --out DIR"
    results = {
        "version": VERSION,
        "reproduce": command,
        "quick": quick,
        "seeds": seeds,
        "versions": cells.versions(),
        "summary": tta_report.summary(rows),
        "rows": rows,
    }
    cells.write(out / "results.json", results)
    tta_report.write(out)
    return results


def asked_methods(text: str, quick: bool) -> list[str]:
    """Baselines, then the methods of a list, or all that are registered; each with the options given to it.

    Raises:
        InputError: an unknown method or option, or a value out of bounds.
    """
    names = cells.entries(text) or (QUICK if quick else registry.names("tta"))
    for entry in names:
        cells.registered("tta", entry, "--methods")
    return list(dict.fromkeys([*BASELINES, *names]))


def asked_models(bench: Bench, text: str) -> list[str]:
    """The models that `--models` names, each once; all of the stream where it names none.

    Raises:
        InputError: the stream has no such model.
    """
    names = [name.strip() for name in text.split(",") if name.strip()] or list(bench.models)
    for name in names:
        if name not in bench.models:
            raise InputError(registry.unknown(f"--models of {bench.name}", name, bench.models))
    return list(dict.fromkeys(names))


def manifest(folder: Path, bench: Bench, seed: int) -> Row:
    """The plan of a stream, from its file if it is there.

    Raises:
        InputError: the file was changed after it was made.
    """
    path = folder / f"{slug(bench.name)}-seed{seed}.json"
    if path.exists():
        plan: Row = json.loads(path.read_text())
        if plan.get("plan_sha256") != plan_hash(plan):
            raise InputError(f"{path}: the plan does not fit its hash; it was changed after it was made.")
        return plan
    plan = bench.manifest(seed)
    files.write_bytes(path, (json.dumps(plan) + "\n").encode())
    return plan


def cell(folder: Path, world: World, method: str, quick: bool, progress: cells.Progress) -> Row:
    """The row of one cell, read if it has been run.

    Raises:
        InputError: the cell that is there was run with another plan or other options.
    """
    name, given = cells.registered("tta", method, "--methods")
    options = {**views(name, world.bench), **given}
    key = {
        "version": VERSION,
        "stream": world.bench.name,
        "plan_sha256": world.plan["plan_sha256"],
        "model": world.model,
        "method": method,
        "options": options,
        "seed": world.seed,
        "quick": quick,
    }
    path = folder / f"{slug(world.bench.name)}-{world.model}-{slug(method)}-seed{world.seed}.json"
    if (found := cells.read(path, key)) is not None:
        progress.skip()
        return found
    row = {**key, **world.facts, **play(world, name, options)}
    cells.write(path, row)
    outcome = f"refused: {row['refused']}" if row["refused"] else f"error {100 * row['error']:.1f} %"
    progress(f"{world.bench.name} {world.model} seed {world.seed} {method}: {outcome}")
    return row


def views(name: str, bench: Bench) -> Row:
    """The kind of augmented views that fits a stream's inputs, for a method that uses any."""
    return {"augment": bench.augment} if "augment" in configs.options_of(registry.load("tta", name)) else {}


def play(world: World, name: str, options: Row) -> Row:
    """Scores of one method on the stream; or `refused`, why it cannot run."""
    deployed, data = world.source
    if name == "bn_adapt" and not deployed.norms:
        return {"refused": "the model has no batch norms: it would answer as source does, bit for bit"}
    references = world.references  # made once, and no part of a method's cost
    start, processor = time.perf_counter(), time.process_time()
    try:
        method = make(name, deployed, options, world.seed, data)
        prepared = time.perf_counter() - start
        result = run_stream(method, world.stream, deployed, references=references)
    except InputError as error:
        return {"refused": str(error)}
    reasons = Counter(entry["reason"] for entry in result["batches"] if entry["reason"] is not None)
    kept = {key: value for key, value in result.items() if key not in ("method", "stream", "seed", "batches")}
    kept["cost"] |= {"prepare_seconds": round(prepared, 3), "cpu_seconds": round(time.process_time() - processor, 3)}
    return {"refused": None, **kept, "reasons": dict(reasons)}


def segments(stream: TestStream) -> list[list[Any]]:
    """[name, first batch] of each stretch of batches of one domain; "mixed" where a batch holds several."""
    found: list[list[Any]] = []
    for number, part in enumerate(stream.parts):
        names = set(stream.domains[part])
        name = stream.domains[part.start] if len(names) == 1 else "mixed"
        if not found or found[-1][0] != name:
            found.append([name, number])
    return found
