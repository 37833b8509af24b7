"""`fedpeft bench memory`: peak memory of `fedpeft simulate` against the number of virtual clients.

All runs have the same records, dealt out to more or fewer clients, and ask as many clients a round, so that what is
left is what a client costs that only exists: its list of record numbers, its node, its name. The model:

    peak(N) = fixed + N KB_PER_CLIENT

`fixed` is the libraries, the base model, all records once, one pass of `run.cohort_tokens` tokens, and the adapters of
the clients of a round; it is taken from the smallest run, and the others are compared with the formula. It holds up to
the end of training; drawing the report of thousands of clients comes on top.
"""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from fedpeft import files, seeds
from fedpeft.errors import InputError
from fedpeft.simulations.benchmarks.cells import Progress, Tell, silent
from fedpeft.simulations.benchmarks.server_cost import resident

ASKED, ROUNDS, TOKENS, LABELS = 64, 3, 16, 4
KB_PER_CLIENT = 1.0  # record numbers 0.4, node 0.3, name 0.1, rounded up
Row = dict[str, Any]


def run(out: Path, clients: tuple[int, ...] = (100, 1000, 10_000), tell: Tell = silent) -> Row:
    """One run for each number of clients, in a process of its own; writes results.json to `out`.

    `tell` is given a line for each.

    Raises:
        InputError: no number of clients, or one below 1.
    """
    if not clients or min(clients) < 1:
        raise InputError(f"--clients: {clients}: give numbers from 1 up.")
    records = 2 * max(*clients, ASKED)
    peaks: dict[int, tuple[float | None, float | None]] = {}
    progress = Progress(tell, len(clients))
    for count in sorted(clients):
        with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
            peaks[count] = pool.submit(measure, count, records).result()
        progress(f"{count} clients")
    first = peaks[min(peaks)][0]
    rows = [
        {
            "clients": count,
            "asked": min(ASKED, count),
            "peak_mb": peak,
            "with_report_mb": report,
            "formula_mb": None if first is None else first + (count - min(peaks)) * KB_PER_CLIENT / 1e3,
        }
        for count, (peak, report) in peaks.items()
    ]
    results = {
        "reproduce": f"fedpeft bench memory --out DIR --clients {','.join(map(str, clients))}",
        "records": records,
        "kb_per_client": KB_PER_CLIENT,
        "rows": rows,
    }
    files.write_bytes(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    return results


def measure(clients: int, records: int) -> tuple[float | None, float | None]:
    """Peak resident MB of this process at the end of training, and of the run; None where it cannot be measured."""
    from fedpeft.simulations.run import simulate

    torch.set_num_threads(1)
    trained: list[float | None] = []

    def watch(event: Row) -> None:
        if event["event"] == "end":
            trained.append(_peak())

    with TemporaryDirectory() as made:
        folder = Path(made)
        for name, count in (("train", records), ("test", ASKED)):
            generator = seeds.numpy_generator(0, "bench", "memory", name)
            letters = generator.integers(ord("a"), ord("z") + 1, (count, TOKENS), dtype=np.uint8)
            rows = [f"{bytes(row).decode()},{index % LABELS}" for index, row in enumerate(letters)]
            (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows, ""]))
        simulate(
            {
                "model": {"name": "tiny-bert", "task": "sequence-classification", "max_length": TOKENS},
                "data": {
                    "source": str(folder / "train.csv"),
                    "test": str(folder / "test.csv"),
                    "clients": clients,
                    "partition": {"name": "iid"},
                },
                "client": {"local_steps": 1, "local_epochs": None, "batch_size": 2},
                "run": {"rounds": ROUNDS, "clients_per_round": min(ASKED, clients), "baselines": False},
            },
            out=folder / "run",
            on_event=watch,
        )
    return trained[0], _peak()


def _peak() -> float | None:
    peak = resident("VmHWM")
    return None if peak is None else peak / 1e6


def show(results: Row) -> None:
    """Print the rows."""
    from rich.table import Table

    from fedpeft.cli.console import out

    table = Table(title=f"peak memory of a run, {results['records']} records in all, up to {ASKED} clients a round")
    for column in ("clients", "peak MB", "formula MB", "MB with the report"):
        table.add_column(column, justify="right")
    for row in results["rows"]:
        table.add_row(
            str(row["clients"]),
            *(
                "not measured" if row[key] is None else f"{row[key]:.0f}"
                for key in ("peak_mb", "formula_mb", "with_report_mb")
            ),
        )
    out.print(table)
    out.print(f"formula: the smallest run and {results['kb_per_client']:g} KB a client more", style="dim")
    out.print(f"REPRODUCE: {results['reproduce']}", soft_wrap=True)
