"""The plots of a run, from its events alone.

Each function of `PLOTS` gives a figure, or null where the run has nothing to show in it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from fedpeft.record.client_plots import (
    clients_accuracy,
    clients_at_the_end,
    clients_by_label,
    clients_rounds,
    clients_sizes,
    clients_skew,
    epsilon_by_client,
    plot_participation,
    test_time,
)
from fedpeft.record.drawing import (
    COLORS,
    DASHES,
    GREY,
    accuracy_axis,
    axes_of,
    draw_line,
    frozen_line,
    has_accuracy,
    round_axis,
    sum_traffic,
    with_labels,
)
from fedpeft.record.findings import SERVER
from fedpeft.record.words import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fedpeft.record.metrics import Event
    from fedpeft.record.run_folder import Run

REFERENCES = {  # key of the baselines event -> what it is
    "frozen_logistic": "logistic regression on frozen features",
    "pixels_or_words_logistic": "logistic regression on raw inputs",
    "local": "each client alone (mean)",
    "central": "one model of all records",
    "largest_class": "always the largest class",
}


def accuracy(run: Run) -> Figure | None:
    """Accuracy over rounds, from the frozen model's, with the reference lines that were computed."""
    if not has_accuracy(run) or not run.of("round"):
        return None
    if run.summary.get("sequence"):
        return _plot_sequence(run)
    figure, axes = axes_of(f"Accuracy on the {run.summary['evaluated_on']}", 1.2)
    last = (run.summary["final"] or {}).get("accuracy")
    _plot_scores(axes, run, "accuracy", f"{run.summary['strategy']} (last {percent(last)})", COLORS[0])
    _plot_references(axes, run)
    frozen_line(axes, run)
    accuracy_axis(axes)
    round_axis(axes)
    return with_labels(figure)


def _plot_sequence(run: Run) -> Figure:
    """The head that answers after each task, over the classes seen so far; the trained classifier beside it, a line for
    each task, as the points of two tasks are of unlike classes.
    """
    sequence = run.summary["sequence"]
    figure, axes = axes_of("Accuracy on the test records of all classes seen so far", 1.3)
    ends, curve = sequence["rounds_of_tasks"], sequence["accuracy_by_task"]
    if ends:
        axes.plot(
            ends,
            curve,
            "o-",
            color=COLORS[0],
            markersize=7,
            label=f"head {sequence['head']} (last {percent(curve[-1])})",
        )
    frozen = (sequence.get("frozen_head_by_task") or [])[: len(ends)]
    if frozen:
        axes.plot(
            ends[: len(frozen)],
            frozen,
            "s--",
            color=GREY,
            linewidth=1.2,
            label=f"frozen model, same head (last {percent(frozen[-1])})",
        )
    _plot_scores(axes, run, "accuracy", "classifier as trained", COLORS[5])
    for task, end in enumerate(ends):  # a boundary after each task
        axes.axvline(end + 0.5, color=GREY, linewidth=0.8, linestyle=":")
        axes.annotate(
            f"task {task + 1}",
            (end + 0.4, 1.0),
            xycoords=("data", "axes fraction"),
            ha="right",
            va="bottom",
            fontsize=8,
            color=GREY,
        )
    _plot_references(axes, run)
    accuracy_axis(axes)
    round_axis(axes)
    axes.set_title(axes.get_title(loc="left"), loc="left", pad=16)
    figure.legend(loc="outside lower left", ncols=1)  # two curves may end in one point
    return figure


def _plot_scores(
    axes: Axes, run: Run, key: str, label: str, color: str, x: dict[int, float] | None = None, first: int = 0
) -> None:
    """Scores from round `first` on over rounds, or over `x`; in a sequence a line for each task: two tasks' points are
    of unlike classes.
    """
    scores = [score for score in run.scores if score["round"] >= first and (x is None or score["round"] in x)]
    sequence = run.summary.get("sequence")
    parts = [scores] if not sequence else _by_task(scores, sequence["rounds_of_tasks"])
    for index, part in enumerate(parts):
        draw_line(axes, part, key, "_" if index else label, color, x=x)


def _by_task(scores: list[Event], ends: list[int]) -> list[list[Event]]:
    """The scores of each task; those after the last that ended come last."""
    edges = [0, *ends, max([score["round"] for score in scores], default=0)]
    parts = [[score for score in scores if low < score["round"] <= high] for low, high in pairwise(edges)]
    return [part for part in parts if part]


def _plot_references(axes: Axes, run: Run) -> None:
    elsewhere = "" if run.summary["evaluated_on"] == SERVER else f", {SERVER}"
    # The first two colours are those of the run's own lines.
    for color, (name, label) in zip(COLORS[2:], REFERENCES.items(), strict=False):
        value = run.summary["baselines"].get(name)
        if isinstance(value, int | float):
            axes.axhline(value, color=color, linestyle=":", label=f"{label} ({percent(value)}{elsewhere})")


def loss(run: Run) -> Figure | None:
    """Mean training loss of each round's clients, and the loss of the evaluated models."""
    figure, axes = axes_of("Loss, from round 1")  # before any training it dwarfs all others
    draw_line(axes, run.of("round"), "train_loss", "clients' training records, while training", COLORS[1])
    _plot_scores(axes, run, "loss", run.summary["evaluated_on"], COLORS[0], first=1)
    axes.set_ylabel("mean loss")
    round_axis(axes)
    return with_labels(figure) if axes.lines else None


def communication(run: Run) -> Figure | None:
    """The accuracy that the uploaded megabytes bought; how many there were is a number of the summary."""
    rounds = run.of("round")
    if not rounds or not has_accuracy(run) or run.summary.get("sequence"):
        return None
    figure, axes = axes_of("Accuracy against uploads")
    draw_line(axes, run.scores, "accuracy", run.summary["strategy"], COLORS[0], x=sum_traffic(rounds, "bytes_up"))
    frozen_line(axes, run)
    accuracy_axis(axes)
    axes.set_xlabel("MB, clients to server")
    return with_labels(figure)


def privacy(run: Run) -> Figure | None:
    """Accuracy against the largest epsilon spent so far."""
    section = run.summary.get("privacy") or {}
    spent = {event["round"]: event["epsilon_max"] for event in run.of("round") if event.get("epsilon_max") is not None}
    if not spent:
        return None
    protected = "client" if section.get("unit") == "client" else "record"
    figure, axes = axes_of(f"Accuracy against epsilon of one {protected}")
    _plot_scores(axes, run, "accuracy", run.summary["strategy"], COLORS[0], x=spent)
    if not run.summary.get("sequence"):
        frozen_line(axes, run)
    accuracy_axis(axes)
    axes.set_xlabel(f"largest epsilon so far, at delta {section.get('delta', 0):g}")
    return with_labels(figure)


def compared(runs: list[Run]) -> Figure:
    """Accuracy of several runs over rounds; one dashed line for each distinct frozen model."""
    figure, by_round = axes_of("Accuracy over rounds", 1.2)
    frozen: set[float | None] = {None}
    for index, run in enumerate(runs):
        color, dashes = COLORS[index % len(COLORS)], DASHES[index // len(COLORS) % len(DASHES)]
        last = percent((run.summary["final"] or {}).get("accuracy"))
        name = f" {run.label}" if run.label.startswith("_") else run.label  # matplotlib keeps _names out of legends
        draw_line(by_round, run.scores, "accuracy", f"{name} ({last})", color, dashes=dashes)
        baseline = (run.summary["baseline"] or {}).get("accuracy")
        if baseline not in frozen:
            frozen.add(baseline)
            frozen_line(by_round, run)
    accuracy_axis(by_round)
    round_axis(by_round)
    figure.legend(*by_round.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


PLOTS: dict[str, Callable[[Run], Figure | None]] = {
    plot.__name__.removeprefix("plot_"): plot
    for plot in (
        accuracy,
        test_time,
        loss,
        privacy,
        epsilon_by_client,
        communication,
        clients_accuracy,
        clients_at_the_end,
        clients_rounds,
        clients_sizes,
        clients_skew,
        clients_by_label,
        plot_participation,
    )
}
