"""`fedpeft bench dtype`: what runs over a frozen base in bfloat16 end at, beside the same runs in float32.

Both federations of `encoders`, all layers of their models, LoRA of rank 8 on queries and values, without DP and at
epsilon 3. The two runs of a seed share adapter, head, split, batches and noise, so differences are paired. A cell that
is there is not run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from fedpeft.errors import InputError
from fedpeft.simulations.benchmarks import cells, encoders
from fedpeft.simulations.benchmarks.cells import Progress, Row, Tell, silent
from fedpeft.simulations.benchmarks.federated_report import equal, paired, select

DTYPES = ("float32", "bfloat16")
RATES = (0.004, 0.016)  # without and with DP
LORA = {"adapter.r": 8, "adapter.alpha": 16, "run.rounds": 4}


def run(out: Path, sets: Sequence[str] = (), seeds: int = 5, quick: bool = False, tell: Tell = silent) -> Row:
    """Run what is missing into `out`/cells, and write results.json.

    Args:
        sets: names of `encoders.SCHEDULES`; none is all.
        seeds: runs of each cell; two at least.
        quick: two rounds, few records: shows that the benchmark works, says nothing about dtypes.

    Raises:
        InputError: an unknown set, one that is not prepared, or fewer than two seeds.
    """
    if seeds < 2:
        raise InputError(f"seeds={seeds}: a paired difference needs two seeds at least.")
    chosen = list(sets or encoders.SCHEDULES)
    settings = {name: encoders.load_setting(name, False, quick) for name in chosen}
    progress, rows = Progress(tell, 2 * len(chosen) * seeds * len(DTYPES)), []
    for name in chosen:
        for private in (False, True):
            for seed in range(seeds):
                for dtype in DTYPES:
                    key = {"set": name, "private": private, "seed": seed, "method": dtype, "quick": quick}
                    place = f"{name}{'-dp' if private else ''}-{dtype}-seed{seed}{'-quick' if quick else ''}"
                    path = out / "cells" / f"{place}.json"
                    row = cells.read(path, key)
                    if row is not None:
                        progress.skip()
                    else:
                        changes = {
                            **LORA,
                            **encoders.schedule_of(name, private, quick),
                            "client.lr": RATES[private],
                            "model.dtype": dtype,
                            "run.seed": seed,
                        }
                        row = {**key, **encoders.play_run(settings[name], changes, "test", out / "run")}
                        cells.write(path, row)
                        progress(f"{place}: {row['accuracy']:.1f} %, loss {row['loss']:.4f}")
                    rows.append(row)
    options = [f"--sets {','.join(sets)}"] if sets else []
    return cells.write_results(out, "dtype", options, seeds, quick, table(rows), rows)


def table(rows: list[Row]) -> list[Row]:
    """A line for each set, privacy and measure: means, deviations, bfloat16 minus float32 and whether it is nothing."""
    found = []
    for name, private in dict.fromkeys((row["set"], row["private"]) for row in rows):
        here = select(rows, set=name, private=private)
        for measure in ("accuracy", "loss"):
            difference, error, _ = paired(here, "bfloat16", "float32", measure)
            line: Row = {"set": name, "private": private, "measure": measure}
            for dtype in DTYPES:
                values = [row[measure] for row in select(here, method=dtype)]
                line[dtype] = [mean(values), cells.spread(values)]
            line |= {"difference": difference, "error": error, "verdict": equal(difference, error)}
            line["largest"] = max(
                abs(one[measure] - two[measure])
                for one, two in zip(*(select(here, method=dtype) for dtype in DTYPES), strict=True)
            )
            found.append(line)
    return found


def show(results: Row) -> None:
    """Print one table."""
    from rich.table import Table

    from fedpeft.cli.console import out

    shown = Table(title=f"a base in float32 and in bfloat16, {results['seeds']} seeds, test records")
    for head in ("", "float32", "bfloat16", "bfloat16 minus float32", "largest of a seed", "equal"):
        shown.add_column(head, justify="left" if not head else "right")
    for line in results["table"]:
        places = 2 if line["measure"] == "accuracy" else 4
        under = f", epsilon {encoders.EPSILON:g}" if line["private"] else ""
        shown.add_row(
            f"{line['set']}{under}, {line['measure']}{' in %' if line['measure'] == 'accuracy' else ''}",
            *(f"{line[dtype][0]:.{places}f} ± {line[dtype][1]:.{places}f}" for dtype in DTYPES),
            f"{line['difference']:+.{places}f} ± {line['error']:.{places}f}",
            f"{line['largest']:.{places}f}",
            line["verdict"],
        )
    out.print(shown)
    out.print(
        "± of a mean is a standard deviation over seeds, of a difference a standard error; three errors decide",
        style="dim",
    )
