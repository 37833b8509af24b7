"""`fedpeft bench private`: LoRA rules under sample-level DP on a real model and real records, at several epsilons.

The federation is the shipped config `fedsvd_dp`; each cell is a whole run of it with another rule, epsilon, learning
rate and seed (which draws the adapter, the split, the batches and the noise). Rules see the same seeds, so differences
are paired. Nothing is tuned: every rule is shown at every rate of a small grid that was fixed before the test records
were looked at. A cell that is there is not run again, so an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import shutil
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from fedpeft import __version__, files
from fedpeft.errors import InputError
from fedpeft.simulations.benchmarks.cells import Progress, Tell, silent
from fedpeft.simulations.benchmarks.federated_report import above, distinct, equal, paired, select

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIG = "fedsvd_dp"
METHODS: dict[str, dict[str, Any]] = {
    "FedIT": {"strategy.name": "fedit"},
    "FFA": {"strategy.name": "ffa_lora"},
    "FFA orthonormal": {"strategy.name": "ffa_lora", "strategy.init": "orthonormal"},
    "FedSVD": {"strategy.name": "fedsvd"},
}
EPSILONS = (1.0, 3.0, 6.0)
RATES = (0.125, 0.25, 0.5)
PAIRS = (
    ("FedSVD", "FFA", above),
    ("FedSVD", "FedIT", above),
    ("FFA", "FedIT", above),
    ("FedSVD", "FFA orthonormal", equal),
)
Row = dict[str, Any]


def run(out: Path, seeds: int = 3, quick: bool = False, tell: Tell = silent) -> Row:
    """Run what is missing of the grid into `out`/cells, and write results.json and accuracy.png.

    Args:
        seeds: runs of each cell, two at least.
        quick: two rounds, one rate, two epsilons: shows that the benchmark works, says nothing about rules.
        tell: is given a line for every cell that is run.

    Raises:
        InputError: fewer than two seeds.
    """
    if seeds < 2:
        raise InputError(f"seeds={seeds}: a paired difference needs two seeds at least.")
    epsilons, rates = ((1.0, 6.0), (0.25,)) if quick else (EPSILONS, RATES)
    progress, rows = Progress(tell, len(epsilons) * len(rates) * seeds * len(METHODS)), []
    for epsilon, rate, seed, name in itertools.product(epsilons, rates, range(seeds), METHODS):
        where = (out / "cells", name, epsilon, rate, seed, quick)
        there = (folder_of(*where) / "summary.json").exists()
        rows.append(cell(*where))
        if there:
            progress.skip()
        else:
            progress(f"{name} epsilon {epsilon:g} lr {rate:g} seed {seed}: {rows[-1]['final']:.1f} %")
    import torch

    command = f"fedpeft bench private --out DIR --seeds {seeds}{' --quick' if quick else ''}"
    versions = {"fedpeft": __version__, "torch": torch.__version__, "python": platform.python_version()}
    results = {
        "reproduce": command,
        "quick": quick,
        "config": CONFIG,
        "seeds": seeds,
        "versions": versions,
        "claims": claims(rows),
        "rows": rows,
    }
    files.write_bytes(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    from fedpeft.record import drawing

    with drawing.style():
        files.write_bytes(out / "accuracy.png", drawing.png(figure(rows)))
    return results


def folder_of(cells: Path, name: str, epsilon: float, rate: float, seed: int, quick: bool) -> Path:
    """The folder of one run; with quick settings it is another than without."""
    return cells / f"{name.replace(' ', '_')}-epsilon{epsilon:g}-lr{rate:g}-seed{seed}{'-quick' if quick else ''}"


def cell(folder: Path, name: str, epsilon: float, rate: float, seed: int, quick: bool) -> Row:
    """One run's row, from its summary if it has been run."""
    from fedpeft.simulations.run import simulate

    where = folder_of(folder, name, epsilon, rate, seed, quick)
    if not (where / "summary.json").exists():
        shutil.rmtree(where, ignore_errors=True)  # a run that was cut off
        changes = {
            **METHODS[name],
            "privacy.epsilon": epsilon,
            "client.lr": rate,
            "run.seed": seed,
            "run.baselines": False,
            "run.evaluate_every": 1000,
        }
        simulate(CONFIG, {**changes, "run.rounds": 2} if quick else changes, where)
    summary = json.loads((where / "summary.json").read_text())
    return {
        "method": name,
        "epsilon": epsilon,
        "lr": rate,
        "seed": seed,
        "final": 100 * summary["final"]["accuracy"],
        "frozen": 100 * summary["baseline"]["accuracy"],
        "epsilon_spent": summary["epsilon_max"],
        "bytes_up": summary["bytes_up"],
        "seconds": summary["seconds"],
    }


def claims(rows: list[Row]) -> list[Row]:
    """Paired differences in points, their standard errors and verdicts, for every epsilon and rate."""
    found = []
    for epsilon in distinct(rows, "epsilon"):
        for rate in distinct(rows, "lr"):
            for one, two, verdict in PAIRS:
                difference, error, count = paired(select(rows, epsilon=epsilon, lr=rate), one, two)
                found.append(
                    {
                        "claim": f"{one} {'=' if verdict is equal else '>'} {two}",
                        "epsilon": epsilon,
                        "lr": rate,
                        "difference": difference,
                        "error": error,
                        "seeds": count,
                        "verdict": verdict(difference, error),
                    }
                )
    return found


def spread(values: list[float]) -> str:
    """Mean and standard deviation, as 71.2 ± 1.5."""
    return f"{mean(values):.1f} ± {stdev(values) if len(values) > 1 else math.nan:.1f}"


def figure(rows: list[Row]) -> Figure:
    """Mean final accuracy against epsilon, a panel a learning rate; bars are standard deviations over seeds."""
    from matplotlib.figure import Figure

    rates = distinct(rows, "lr")
    drawn = Figure(figsize=(3.4 * len(rates) + 1, 3.4))
    for axes, rate in zip(drawn.subplots(1, len(rates), sharey=True, squeeze=False)[0], rates, strict=True):
        for name in METHODS:
            each = {
                epsilon: [row["final"] for row in select(rows, method=name, epsilon=epsilon, lr=rate)]
                for epsilon in distinct(rows, "epsilon")
            }
            axes.errorbar(
                list(each),
                [mean(values) for values in each.values()],
                [stdev(values) for values in each.values()],
                marker="o",
                capsize=3,
                label=name,
            )
        axes.axhline(mean(row["frozen"] for row in rows), color="#777777", linestyle="--", label="frozen model")
        axes.set_title(f"learning rate {rate:g}")
        axes.set_xlabel("epsilon")
    drawn.axes[0].set_ylabel("final test accuracy in %")
    drawn.legend(*drawn.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return drawn


def show(results: Row) -> None:
    """Print accuracies and claims."""
    from rich.table import Table

    from fedpeft.cli.console import out

    rows = results["rows"]
    columns = [(epsilon, rate) for epsilon in distinct(rows, "epsilon") for rate in distinct(rows, "lr")]
    table = Table(title=f"final test accuracy in %, {results['seeds']} seeds, config {results['config']}")
    table.add_column("rule")
    for epsilon, rate in columns:
        table.add_column(f"eps {epsilon:g}\nlr {rate:g}", justify="right")
    for name in METHODS:
        table.add_row(
            name,
            *(
                spread([row["final"] for row in select(rows, method=name, epsilon=epsilon, lr=rate)])
                for epsilon, rate in columns
            ),
        )
    out.print(table)
    for claim in results["claims"]:
        out.print(
            f"epsilon {claim['epsilon']:g}, lr {claim['lr']:g}: {claim['claim']}: {claim['difference']:+.2f} ± "
            f"{claim['error']:.2f} points, {claim['verdict']}"
        )
    frozen = mean(row["frozen"] for row in rows)
    out.print(
        f"frozen model {frozen:.1f} %; ± on an accuracy is a standard deviation over seeds, on a difference a "
        "standard error; two errors decide, three for =",
        style="dim",
    )
