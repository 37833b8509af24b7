"""`fedpeft bench adapters`: what parameterisations reach at LoRA's upload, on real encoders, with DP and without.

Two federations (`encoders`), short texts on MiniLM's upper layers and characters on a ViT. Each parameterisation has
the rank at which a client sends as much as LoRA of rank 8 on queries and values does, or less where its size hangs on
no rank. Each is tuned alike, on a seed of its own and by held-out training records: the two middle rates of a grid, and
outwards from the better one as long as that is better still. Then it runs at its rate on other seeds, of which all have
the same head, batches, noise and split, and only now test records are looked at. A cell that is there is not run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from fedpeft import registry
from fedpeft.errors import InputError
from fedpeft.simulations.benchmarks import cells, encoders
from fedpeft.simulations.benchmarks.cells import Progress, Row, Tell, silent
from fedpeft.simulations.benchmarks.federated_report import above, paired, select

RATES = (0.001, 0.004, 0.016, 0.064)
TUNED_ON = 100  # seed
LORA = "lora"


@dataclass(frozen=True)
class Form:
    """A parameterisation.

    Attributes:
        changes: of the config.
        ranks: by set, what `rank` is there; empty where its size hangs on none.
        rank: the key that they go into.
    """

    changes: dict[str, Any]
    rank: str = ""
    ranks: dict[str, int] = field(default_factory=dict)

    def config(self, name: str) -> dict[str, Any]:
        """Changes of the config for a set."""
        return {**self.changes, **({self.rank: self.ranks[name]} if self.rank else {})}


def _peft(kind: str, rank: str = "", ranks: dict[str, int] | None = None, **options: Any) -> Form:
    keys = {f"adapter.options.{key}": value for key, value in options.items()}
    changes = {"adapter.name": "peft", "adapter.type": kind, **keys}
    return Form(changes, f"adapter.options.{rank}" if rank else "", ranks or {})


def _both(rank: int) -> dict[str, int]:
    return dict.fromkeys(encoders.SCHEDULES, rank)


FORMS = {
    LORA: Form({"adapter.alpha": 16}, "adapter.r", _both(8)),
    "ffa_lora": Form({"strategy.name": "ffa_lora", "adapter.alpha": 32}, "adapter.r", _both(16)),
    "lora_sb": Form(
        {"strategy.name": "fed_sb", "adapter.name": "lora_sb", "adapter.alpha": 16},
        "adapter.r",
        {"texts": 78, "characters": 39},
    ),
    "pissa": _peft("LORA", "r", _both(8), init_lora_weights="pissa", lora_alpha=8),
    "dora": _peft("LORA", "r", _both(7), use_dora=True, lora_alpha=14),
    "ia3": _peft("IA3"),
    "vera": _peft("VERA", "r", _both(256)),
    "miss": _peft("MISS", "r", _both(16)),
}


def run(
    out: Path,
    sets: Sequence[str] = (),
    adapters: Sequence[str] = (),
    seeds: int = 3,
    quick: bool = False,
    tell: Tell = silent,
) -> Row:
    """Run what is missing into `out`/cells, and write results.json and adapters.png.

    Args:
        sets, adapters: names of `encoders.SCHEDULES` and of FORMS; none is all. LoRA is always there.
        seeds: runs of each at its best rate; two at least.
        quick: two rates, two rounds, few records: shows that the benchmark works, says nothing about adapters.

    Raises:
        InputError: an unknown set or adapter, one that is not prepared, or fewer than two seeds.
    """
    if seeds < 2:
        raise InputError(f"seeds={seeds}: a paired difference needs two seeds at least.")
    for name in adapters:
        if name not in FORMS:
            raise InputError(registry.unknown("--adapters", name, FORMS))
    names, chosen = list(dict.fromkeys((LORA, *(adapters or FORMS)))), list(sets or encoders.SCHEDULES)
    settings = {name: encoders.load_setting(name, True, quick) for name in chosen}
    rates = RATES[1:3] if quick else RATES
    progress, rows = Progress(tell, 2 * len(chosen) * len(names) * (len(rates) + seeds)), list[Row]()
    for private in (False, True):
        for name in chosen:
            for form in names:
                work = Work(out, settings[name], name, form, private, quick, progress)
                tried = work.tune(rates)
                rows += tried + [work.cell(find_better(tried)["lr"], seed, "test") for seed in range(seeds)]
    options = [f"--sets {','.join(sets)}"] if sets else []
    options += [f"--adapters {','.join(adapters)}"] if adapters else []
    results = cells.write_results(out, "adapters", options, seeds, quick, table(rows), rows)
    _draw(out / "adapters.png", results["table"])
    return results


@dataclass(frozen=True)
class Work:
    """The cells of one parameterisation on one set, with or without DP."""

    out: Path
    setting: encoders.Setting
    name: str
    form: str
    private: bool
    quick: bool
    progress: Progress

    def tune(self, rates: Sequence[float]) -> list[Row]:
        """The rows of the rates that were tried, lowest first."""
        middle = len(rates) // 2
        rows = {place: self.cell(rates[place], TUNED_ON, "held") for place in (middle - 1, middle)}
        while True:
            best = rates.index(find_better(list(rows.values()))["lr"])
            following = best - 1 if best == min(rows) else best + 1
            if following in rows or not 0 <= following < len(rates):
                self.progress.skip(len(rates) - len(rows))
                return [rows[place] for place in sorted(rows)]
            rows[following] = self.cell(rates[following], TUNED_ON, "held")

    def cell(self, rate: float, seed: int, judged: str) -> Row:
        """The row of one run, which is run where it is not there."""
        key = {
            "set": self.name,
            "method": self.form,
            "private": self.private,
            "lr": rate,
            "seed": seed,
            "judged": judged,
            "quick": self.quick,
        }
        place = f"{self.name}-{self.form}{'-dp' if self.private else ''}-lr{rate:g}-seed{seed}-{judged}"
        path = self.out / "cells" / f"{place}{'-quick' if self.quick else ''}.json"
        row = cells.read(path, key)
        if row is not None:
            self.progress.skip()
            return row
        changes = {
            **encoders.schedule_of(self.name, self.private, self.quick),
            **FORMS[self.form].config(self.name),
            "client.lr": rate,
            "run.seed": seed,
        }
        row = {**key, **encoders.play_run(self.setting, changes, judged, self.out / "run")}
        cells.write(path, row)
        dp = f" epsilon {encoders.EPSILON:g}" if self.private else ""
        self.progress(f"{self.name} {self.form}{dp} lr {rate:g} seed {seed}: {row['accuracy']:.1f} % ({judged})")
        return row


def find_better(rows: list[Row]) -> Row:
    """The row of the highest accuracy, of equal ones that of the lowest loss."""
    return max(rows, key=lambda row: (row["accuracy"], -row["loss"]))


def table(rows: list[Row]) -> list[Row]:
    """A line for each set, privacy and parameterisation: rate, accuracy, bytes, and the difference from LoRA."""
    found = []
    for name, private, form in dict.fromkeys((row["set"], row["private"], row["method"]) for row in rows):
        here = select(rows, set=name, private=private, judged="test")
        mine = select(here, method=form)
        values = [row["accuracy"] for row in mine]
        tried = [row["lr"] for row in select(rows, set=name, private=private, method=form, judged="held")]
        line: Row = {
            "set": name,
            "private": private,
            "method": form,
            "lr": mine[0]["lr"],
            "edge": mine[0]["lr"] in (min(tried), max(tried)),
            "accuracy": mean(values),
            "deviation": cells.spread(values),
            "loss": mean(row["loss"] for row in mine),
            "bytes_up": mine[0]["bytes_up"],
            "diverged": sum(row["diverged"] for row in mine),
            "difference": None,
            "error": None,
            "verdict": "",
        }
        if form != LORA:
            line["difference"], line["error"], _ = paired(here, form, LORA, "accuracy")
            line["verdict"] = above(line["difference"], line["error"])
        found.append(line)
    return found


def show(results: Row) -> None:
    """Print a table for each set, without and with DP."""
    from rich.table import Table

    from fedpeft.cli.console import out

    for name, private in dict.fromkeys((line["set"], line["private"]) for line in results["table"]):
        under = f"epsilon {encoders.EPSILON:g}" if private else "no DP"
        shown = Table(title=f"{name}, {under}, {results['seeds']} seeds: test accuracy in %")
        for head in ("", "rate", "kB a client and round", "accuracy", "minus LoRA", "beats LoRA"):
            shown.add_column(head, justify="left" if not head else "right")
        for line in select(results["table"], set=name, private=private):
            shown.add_row(*_texts_of(line))
        out.print(shown)
    out.print(
        "± of an accuracy is a standard deviation over seeds, of a difference a standard error; * ends the grid",
        style="dim",
    )


def _texts_of(line: Row) -> Iterator[str]:
    yield line["method"]
    yield f"{line['lr']:g}{'*' if line['edge'] else ''}"
    yield f"{line['bytes_up'] / 1000:.1f}"
    yield f"{line['accuracy']:.1f} ± {line['deviation']:.1f}"
    yield "" if line["difference"] is None else f"{line['difference']:+.1f} ± {line['error']:.1f}"
    yield line["verdict"]


def _draw(path: Path, lines: list[Row]) -> None:
    """Accuracy against bytes, a panel for each set and privacy."""
    from matplotlib.figure import Figure

    from fedpeft import files
    from fedpeft.record import drawing

    panels = list(dict.fromkeys((line["set"], line["private"]) for line in lines))
    with drawing.style():
        drawn = Figure(figsize=(3.6 * len(panels), 3.6))
        for axes, (name, private) in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for line in select(lines, set=name, private=private):
                axes.errorbar(
                    line["bytes_up"] / 1000,
                    line["accuracy"],
                    line["deviation"],
                    marker="o",
                    capsize=3,
                    linestyle="",
                    label=line["method"],
                )
            axes.set_title(f"{name}{f', epsilon {encoders.EPSILON:g}' if private else ''}")
            axes.set_xlabel("kB a client and round")
        drawn.axes[0].set_ylabel("test accuracy in %")
        drawn.legend(*drawn.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        files.write_bytes(path, drawing.png(drawn))
