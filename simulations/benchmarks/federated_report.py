"""The federated benchmark's report: claims with verdicts, tables and plots, from result rows alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from fedpeft.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

TUNED = "tuned"  # the column where every method has its own learning rate; the others are named "lr 1"
REQUIRED = {  # claims that must not break at eight seeds: (claim, setting, column, key)
    ("FedSVD > FFA", "no DP", "lr 1", "final"),
    ("FedSVD > FFA", "epsilon 6", "lr 1", "final"),
    ("FedSVD > FedIT", "epsilon 1", "lr 1", "final"),
    ("FedSVD = FFA orthonormal", "no DP", "lr 1", "final"),
    ("FedSVD = FFA orthonormal", "epsilon 6", "lr 1", "final"),
    ("FedSVD = FFA orthonormal", "epsilon 3", "lr 1", "final"),
    ("FedSVD = FFA orthonormal", "epsilon 1", "lr 1", "final"),
    ("LoRA-FAIR .01 > FedIT", "main", "lr 0.3", "average"),
}
Row = dict[str, Any]


def select(rows: list[Row], **fields: Any) -> list[Row]:
    """The rows that have all these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in fields.items())]


def distinct(rows: list[Row], key: str) -> list[Any]:
    """Values of `key` in order of appearance."""
    return list(dict.fromkeys(row[key] for row in rows))


# Claims ---------------------------------------------------------------------------------------------------------------


def paired(rows: list[Row], one: str, two: str, key: str = "final") -> tuple[float, float, int]:
    """Mean over seeds of method `one` minus method `two` in the rows of one cell, its standard error, number of seeds.

    Raises:
        InputError: the two do not have the same seeds once each, or have fewer than two.
    """
    seeds = {name: [row["seed"] for row in select(rows, method=name)] for name in (one, two)}
    once = len(set(seeds[one])) == len(seeds[one]) >= 2
    if not once or sorted(seeds[one]) != sorted(seeds[two]):
        raise InputError(
            f"{one} has the seeds {sorted(seeds[one])}, {two} has {sorted(seeds[two])}; a paired "
            "difference needs the same seeds, once each, two at least."
        )
    values = {name: {row["seed"]: row[key] for row in select(rows, method=name)} for name in (one, two)}
    differences = [values[one][seed] - values[two][seed] for seed in values[one]]
    count = len(differences)
    mean = sum(differences) / count
    return mean, math.sqrt(sum((value - mean) ** 2 for value in differences) / (count - 1) / count), count


def above(difference: float, error: float) -> str:
    """Verdict on "greater than zero": two standard errors decide."""
    if abs(difference) <= 2 * error:
        return "unclear"
    return "holds" if difference > 0 else "does not hold"


def equal(difference: float, error: float) -> str:
    """Verdict on "no difference": within three standard errors. As strong as the error is small, no stronger."""
    return "holds" if abs(difference) <= 3 * error else "does not hold"


def claims(rows: list[Row]) -> list[Row]:
    """The published claims and our controls, in every cell that `rows` has."""
    return dp_claims(rows) + skew_claims(rows) + rowspace_claims(rows)


DP_PAIRS = (
    ("FedSVD", "FFA", above),
    ("FedSVD", "FedIT", above),
    ("FFA", "FedIT", above),
    ("FedSVD", "FedSVD sqrt split", above),
    ("FedSVD", "FFA orthonormal", equal),
    ("FedSVD", "FFA x sqrt 3", equal),
)


def dp_claims(rows: list[Row]) -> list[Row]:
    """The claims between methods that `rows` has."""
    own = select(rows, experiment="dp")
    return [
        _claim(own, where["setting"], where["column"], one, two, "final", verdict)
        for where in _cells(own)
        for one, two, verdict in DP_PAIRS
        if {one, two} <= set(distinct(own, "method"))
    ]


def skew_claims(rows: list[Row]) -> list[Row]:
    """Every method against FedIT by final and round-averaged accuracy, in every cell that `rows` has."""
    own = select(rows, experiment="heterogeneity")
    return [
        _claim(own, where["setting"], where["column"], one, "FedIT", key, above)
        for where in _cells(own)
        for one in distinct(own, "method")
        if one != "FedIT"
        for key in ("average", "final")
    ]


def rowspace_claims(rows: list[Row]) -> list[Row]:
    """FedSVD has the path of products and the row space of its control, to rounding in float64."""
    own = select(rows, experiment="rowspace")
    found = []
    for name in distinct(own, "method"):
        if name != "FedIT":
            worst = max(max(row["path_difference"], row["span_deviation"]) for row in select(own, method=name))
            found.append(
                {
                    "experiment": "rowspace",
                    "claim": f"{name} = FFA orthonormal (no DP, SGD)",
                    "difference": worst,
                    "seeds": len(select(own, method=name)),
                    "required": True,
                    "verdict": "holds" if worst < 1e-9 else "does not hold",
                }
            )
    return found


def _cells(rows: list[Row]) -> list[Row]:
    """Settings and columns that rows have, in order of appearance."""
    pairs = dict.fromkeys((row["setting"], row["column"]) for row in rows)
    return [{"setting": setting, "column": column} for setting, column in pairs]


def _claim(rows: list[Row], setting: str, column: str, one: str, two: str, key: str, verdict: Any) -> Row:
    difference, error, count = paired(select(rows, setting=setting, column=column), one, two, key)
    text = f"{one} {'>' if verdict is above else '='} {two}"
    return {
        "experiment": rows[0]["experiment"],
        "claim": text,
        "setting": setting,
        "column": column,
        "key": key,
        "difference": difference,
        "standard_error": error,
        "seeds": count,
        "verdict": verdict(difference, error),
        "required": (text, setting, column, key) in REQUIRED,
    }


# Tables ---------------------------------------------------------------------------------------------------------------


def show(results: Row) -> None:
    """Print the tables and the command that makes them."""
    from fedpeft.cli.console import out

    for table in tables(results):
        out.print(table)
        out.print()
    out.print(f"REPRODUCE: {results['reproduce']}", soft_wrap=True)


def tables(results: Row) -> list[Table]:
    """A table for each experiment and accuracy that the results have, and one of regressions without federation."""
    from rich.table import Table

    made = []
    for experiment, key in (("dp", "final"), ("heterogeneity", "final"), ("heterogeneity", "average")):
        own = select(results["rows"], experiment=experiment)
        if not own:
            continue
        what = "final" if key == "final" else "round-averaged"
        table = Table(
            "method",
            title=f"{experiment}: {what} accuracy in %, mean and sd over {results['seeds']} seeds",
            title_justify="left",
        )
        for where in _cells(own):
            table.add_column(f"{where['setting']}\n{where['column']}", justify="right")
        for name in distinct(own, "method"):
            table.add_row(name, *(_cell(select(own, method=name, **where), key) for where in _cells(own)))
        made.append(table)
    table = Table(
        "no federation",
        title="test accuracy in %, mean and sd over seeds; regressions on pooled records",
        title_justify="left",
    )
    experiments = distinct(results["baselines"], "experiment")
    for experiment in experiments:
        table.add_column(experiment, justify="right")
    for name in distinct(results["baselines"], "method"):
        table.add_row(
            name,
            *(
                _spread(_points(select(results["baselines"], method=name, experiment=experiment), "accuracy"))
                for experiment in experiments
            ),
        )
    made.append(table)
    table = Table(
        "claim",
        "where",
        "difference",
        "verdict",
        title_justify="left",
        title="claims: difference paired by seed in points, with standard error (bold: required)",
    )
    for claim in results["claims"]:
        if claim["experiment"] == "rowspace":
            table.add_row(claim["claim"], "rowspace", f"{claim['difference']:.1e} relative", claim["verdict"])
        else:
            table.add_row(
                claim["claim"],
                f"{claim['setting']}, {claim['column']}, {claim['key']}",
                f"{100 * claim['difference']:+.2f} ± {100 * claim['standard_error']:.2f}",
                claim["verdict"],
                style="bold" if claim["required"] else None,
            )
    return [*made, table]


def _cell(rows: list[Row], key: str) -> str:
    values = _points(rows, key)
    failed = sum(row["failed_round"] is not None for row in rows)
    text = _spread(values)
    text += f" @{rows[0]['lr']:g}" if rows[0]["column"] == TUNED else ""
    return text + (f" ({failed} failed)" if failed else "")


def _spread(values: torch.Tensor) -> str:
    return f"{values.mean():.1f} ± {values.std():.1f}"


def _points(rows: list[Row], key: str) -> torch.Tensor:
    return torch.tensor([row[key] for row in rows], dtype=torch.float64) * 100


# Plots ----------------------------------------------------------------------------------------------------------------


def figures(rows: list[Row]) -> dict[str, bytes]:
    """PNG images by name, of the experiments that `rows` has."""
    from fedpeft.record import drawing

    drawn = {}
    with drawing.style():
        for name, draw in (("dp", _dp_figure), ("heterogeneity", _skew_figure)):
            own = select(rows, experiment=name)
            if own:
                drawn[name] = drawing.png(draw(own))
    return drawn


def _dp_figure(rows: list[Row]) -> Figure:
    """Final accuracy by privacy setting, at the shared learning rate 1 and at tuned ones; bars are standard errors."""
    from matplotlib.figure import Figure

    from fedpeft.record.drawing import COLORS

    figure = Figure(figsize=(10, 4))
    settings, methods = distinct(rows, "setting"), distinct(rows, "method")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, column, title in ((left, "lr 1", "all methods at lr 1"), (right, TUNED, "each method at its tuned lr")):
        for index, name in enumerate(methods):
            cells = [select(rows, setting=setting, column=column, method=name) for setting in settings]
            values = torch.stack([_points(cell, "final") for cell in cells])
            at = [position + 0.08 * (index - (len(methods) - 1) / 2) for position in range(len(settings))]
            error = values.std(1) / math.sqrt(values.shape[1])
            axes.errorbar(at, values.mean(1), error, fmt="o", color=COLORS[index], label=name)
        axes.set_xticks(range(len(settings)), settings)
        axes.set_title(title)
    left.set_ylabel("test accuracy in %")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def _skew_figure(rows: list[Row]) -> Figure:
    """Accuracy by round in the first setting at its shared rate, and the paired difference from FedIT with error."""
    from matplotlib.figure import Figure

    from fedpeft.record.drawing import COLORS

    own = select(rows, **_cells(rows)[0])
    names = [name for name in distinct(own, "method") if "absolute" not in name]
    curves = {
        name: torch.tensor(
            [[accuracy for _, accuracy in row["curve"]] for row in select(own, method=name)], dtype=torch.float64
        )
        * 100
        for name in names
    }
    rounds = [number for number, _ in own[0]["curve"]]
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    for index, name in enumerate(names):
        left.plot(rounds, curves[name].mean(0), color=COLORS[index], label=name)
        if name in ("FFA", "FLoRA"):  # far below; they would flatten the others
            continue
        difference = curves[name] - curves["FedIT"]
        mean, error = difference.mean(0), difference.std(0) / math.sqrt(len(difference))
        right.plot(rounds, mean, color=COLORS[index])
        right.fill_between(rounds, mean - error, mean + error, color=COLORS[index], alpha=0.2, linewidth=0)
    left.set(title="label skew", xlabel="round", ylabel="test accuracy in %")
    right.set(title="paired difference from FedIT (FFA, FLoRA left out)", xlabel="round", ylabel="points")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
