"""`fedpeft bench unlearn`: what each way of unlearning a client leaves, beside the run and the run without the client.

Two small federations, digits on the embedded ViT and film, product and news sentences on MiniLM, each trained until it
knows its records by heart, so that there is something to forget. A cell is one way on one seed, which draws adapter,
split and batches. All methods have their default options; a fifth of each client's records is held out for them to end
by, and no test record is looked at before the table. A cell that is there is not run again.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import mean
from typing import Any

from fedpeft import registry
from fedpeft.data import prepare
from fedpeft.errors import InputError
from fedpeft.simulations.benchmarks import cells
from fedpeft.simulations.benchmarks.cells import Progress, Row, Tell, silent

CLIENT = "client-001"
COMMON: dict[str, Any] = {
    "strategy.name": "fedit",
    "data.clients": 5,
    "data.holdout": 0.2,
    "client.local_epochs": 2,
    "run.clients_per_round": None,
    "run.baselines": False,
    "run.evaluate_every": 1000,
}
SETS: dict[str, tuple[str, dict[str, Any]]] = {
    "digits": (
        "quickstart",
        {**COMMON, "data.limit": 400, "data.partition": {"name": "dirichlet", "alpha": 1.0}, "run.rounds": 20},
    ),
    "vader": (
        "text",
        {
            **COMMON,
            "model.name": "minilm",
            "model.max_length": 32,
            "data.source": "vader",
            "data.limit": 300,
            "data.partition": {"name": "iid"},
            "client.lr": 0.003,
            "run.rounds": 10,
        },
    ),
}
COLUMNS = {
    "attack AUC": "attack_auc",
    "advantage": "attack_advantage",
    "forget accuracy": "forget_accuracy",
    "retain accuracy": "retain_accuracy",
    "test accuracy": "test_accuracy",
    "distance": "distance",
    "agreement": "agreement",
}
FIGURE = {name: key for name, key in COLUMNS.items() if key.endswith("accuracy") or key == "attack_auc"}


def run(out: Path, sets: tuple[str, ...] = (), seeds: int = 3, quick: bool = False, tell: Tell = silent) -> Row:
    """Run what is missing into `out`/cells, and write results.json and unlearn.png.

    Args:
        sets: names of SETS; none is all.
        seeds: runs of each cell.
        quick: two rounds over 100 records: shows that the benchmark works, says nothing about methods.

    Raises:
        InputError: an unknown set, or one that has not been prepared.
    """
    chosen = sets or tuple(SETS)
    for name in chosen:
        if name not in SETS:
            raise InputError(registry.unknown("--sets", name, SETS))
        for needed in ("minilm", "vader") if name == "vader" else ():
            if not prepare.home(needed).is_dir():
                raise InputError(f"--sets {name}: needs `fedpeft data prepare {needed}`; --sets digits needs nothing.")
    ways = ["retrain", *(name for name in registry.names("unlearning") if name != "retrain")]
    progress, rows = Progress(tell, len(chosen) * seeds * len(ways)), []
    for name in chosen:
        for seed in range(seeds):
            for way in ways:
                path = out / "cells" / f"{name}-{way}-seed{seed}{'-quick' if quick else ''}.json"
                key = {"set": name, "method": way, "seed": seed, "quick": quick}
                row = cells.read(path, key)
                if row is not None:
                    progress.skip()
                else:
                    row = {**key, **cell(out / "runs", name, way, seed, quick)}
                    cells.write(path, row)
                    progress(f"{name} {way} seed {seed}: {row['cost']['seconds']:.1f} s")
                rows.append(row)
            shutil.rmtree(out / "runs", ignore_errors=True)
    options = [f"--sets {','.join(sets)}"] if sets else []
    results = cells.write_results(out, "unlearn", options, seeds, quick, table(rows), rows)
    _draw(out / "unlearn.png", results["table"])
    return results


def cell(folder: Path, name: str, way: str, seed: int, quick: bool) -> Row:
    """One way on one seed; the run and its retraining are made where they are not there."""
    from fedpeft.simulations.run import simulate
    from fedpeft.unlearning.unlearn import unlearn

    where, against = folder / f"{name}-{seed}", folder / f"{name}-{seed}-retrain"
    config, changes = SETS[name]
    if not (where / "summary.json").exists():
        shutil.rmtree(where, ignore_errors=True)  # a run that was cut off
        small = {"run.rounds": 2, "data.limit": 100} if quick else {}
        simulate(config, {**changes, **small, "run.seed": seed}, where)
    target = against if way == "retrain" else folder / f"{name}-{seed}-{way}"
    if way != "retrain" and not (against / "summary.json").exists():  # its cell is there already, its folder is not
        shutil.rmtree(against, ignore_errors=True)
        unlearn(where, "retrain", client=CLIENT, out=against)
    shutil.rmtree(target, ignore_errors=True)
    options = {"strength": 0.05} if quick and way == "negation" else {}  # of so little there is nothing to choose by
    beside = None if way == "retrain" else against
    found = unlearn(where, way, client=CLIENT, options=options, out=target, against=beside)
    return {key: found[key] for key in ("rows", "cost", "asked", "notes")}


def table(rows: list[Row]) -> list[Row]:
    """A row for each set and model: mean and standard deviation over seeds of every column, and the seconds."""
    found = []
    for name in dict.fromkeys(row["set"] for row in rows):
        mine = [row for row in rows if row["set"] == name]
        models = [("as trained", "retrain", "trained"), ("retrained", "retrain", "retrained")]
        models += [(way, way, "unlearned") for way in dict.fromkeys(r["method"] for r in mine) if way != "retrain"]
        for label, way, model in models:
            own = [row for row in mine if row["method"] == way]
            line: Row = {"set": name, "model": label}
            for key in COLUMNS.values():
                values = [row["rows"][model][key] for row in own]
                line[key] = [mean(values), cells.spread(values)]
            line["seconds"] = None if label == "as trained" else mean(row["cost"]["seconds"] for row in own)
            line["record_passes"] = None if label == "as trained" else mean(row["cost"]["record_passes"] for row in own)
            found.append(line)
    return found


def show(results: Row) -> None:
    """Print a table for each set."""
    from rich.table import Table

    from fedpeft.cli.console import out

    for name in dict.fromkeys(line["set"] for line in results["table"]):
        mine = [line for line in results["table"] if line["set"] == name]
        shown = Table(title=f"{name}: {CLIENT} is forgotten, {results['seeds']} seeds")
        shown.add_column("")
        for line in mine:
            shown.add_column(line["model"], justify="right")
        for label, key in COLUMNS.items():
            shown.add_row(label, *(_cell(key, *line[key]) for line in mine))
        shown.add_row("seconds", *("" if line["seconds"] is None else f"{line['seconds']:.1f}" for line in mine))
        out.print(shown)
    out.print(
        "± is a standard deviation over seeds; distance and agreement are to the retrained model; AUC .5 is no attack",
        style="dim",
    )


def _cell(key: str, value: float, deviation: float | None) -> str:
    if key.endswith("accuracy") or key == "agreement":
        return cells.percent(value, deviation)
    return f"{value:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def _draw(path: Path, lines: list[Row]) -> None:
    """Bars of the models in each column; error bars are standard deviations."""
    from matplotlib.figure import Figure

    from fedpeft import files
    from fedpeft.record import drawing

    names = list(dict.fromkeys(line["set"] for line in lines))
    with drawing.style():
        drawn = Figure(figsize=(4.5 * len(names), 3.4))
        for axes, name in zip(drawn.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
            mine = [line for line in lines if line["set"] == name]
            for place, line in enumerate(mine):
                values = [line[key] for key in FIGURE.values()]
                axes.bar(
                    [column + 0.2 * place for column in range(len(FIGURE))],
                    [value for value, _ in values],
                    0.2,
                    yerr=[deviation or 0.0 for _, deviation in values],
                    label=line["model"],
                )
            axes.set_xticks([column + 0.3 for column in range(len(FIGURE))], list(FIGURE), fontsize=7)
            axes.set_title(name)
        drawn.legend(*drawn.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        files.write_bytes(path, drawing.png(drawn))
