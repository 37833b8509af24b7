"""The plots of a run that show its clients one by one: their accuracies, records, updates and streams."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fedpeft.record.drawing import (
    COLORS,
    GREY,
    accuracy_axis,
    are_crowded,
    axes_of,
    draw_bars,
    name_ticks,
    natural_key,
    percent_format,
    quantile_of,
    round_axis,
    with_legends,
)
from fedpeft.record.words import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fedpeft.record.run_folder import Run


def clients_accuracy(run: Run) -> Figure | None:
    """Spread of the clients' own accuracies over rounds, and all of them after the last evaluation."""
    spreads: dict[int, list[float]] = {}
    for event in run.of("clients_evaluated"):
        found = [result.get("accuracy") for result in event["clients"].values()]
        spreads[event["round"]] = sorted(value for value in found if value is not None)
    spreads = {number: values for number, values in spreads.items() if values}
    if not spreads:
        return None
    last = max(spreads)
    titles = ["Each client on its own held-out records", f"All {len(spreads[last])} clients after round {last}"]
    figure, (over, final) = axes_of(titles)
    at = {share: [quantile_of(values, share) for values in spreads.values()] for share in (0, 0.25, 0.5, 0.75, 1)}
    over.fill_between(list(spreads), at[0], at[1], color=COLORS[0], alpha=0.15, linewidth=0, label="lowest to highest")
    over.fill_between(list(spreads), at[0.25], at[0.75], color=COLORS[0], alpha=0.35, linewidth=0, label="middle half")
    over.plot(list(spreads), at[0.5], "o-", color=COLORS[0], label="median")
    median = at[0.5][-1]
    final.plot(range(1, len(spreads[last]) + 1), spreads[last], "o", color=COLORS[0])
    final.axhline(median, color=GREY, linestyle="--", linewidth=1.2, label=f"median ({percent(median)})")
    for axes in (over, final):
        accuracy_axis(axes)
        round_axis(axes)
    final.set_xlabel("clients, from lowest to highest")
    return with_legends(figure)


def clients_by_label(run: Run) -> Figure | None:
    """Records of each client, and how they divide over the labels: shares, so that small clients show as clearly."""
    if run.split is None or run.hides_counts:
        return None
    names = list(run.split["clients"])
    histogram = run.split.get("histogram") or {}
    labels = [str(label) for label in histogram.get("labels", [])]  # none where the data have no classes
    titles = [f"Records of the {len(names)} clients"]
    if labels:
        titles.append("Labels, as shares of a client's records")
    figure, (top, *below) = axes_of(titles, heights=(0.7, min(2.0, 0.6 + 0.12 * len(labels)))[: len(titles)])
    draw_bars(top, [len(indices) for indices in run.split["clients"].values()])
    top.set_xlim(-0.5, len(names) - 0.5)
    top.set_ylabel("records")
    top.grid(axis="x", visible=False)
    name_ticks(top.xaxis, names, upright=are_crowded(names))
    if labels:
        top.tick_params(labelbottom=False)
        _label_shares(below[0], names, labels, histogram["counts"])
    (below or [top])[0].set_xlabel("client")
    return figure


def test_time(run: Run) -> Figure | None:
    """Each client's accuracy on its clean records, and on its stream as trained and adapted, sorted by the gain."""
    tta = run.summary.get("tta")
    if not tta:
        return None
    rows = sorted(tta["clients"].items(), key=lambda item: item[1]["tta_accuracy"] - item[1]["source_accuracy"])
    height = min(3.0, max(0.8, 0.12 * len(rows)))
    figure, (axes,) = axes_of(
        [f"Each client's records clean, its stream as trained, and with {tta['method']}"], heights=(height,)
    )
    places = range(len(rows))
    before = [row["source_accuracy"] for _, row in rows]
    after = [row["tta_accuracy"] for _, row in rows]
    colors = [COLORS[2] if high > low else COLORS[1] for low, high in zip(before, after, strict=True)]
    axes.hlines(list(places), before, after, colors=colors, linewidth=1.5)
    axes.plot([row["accuracy"] for _, row in rows], list(places), "|", color=GREY, markersize=9, label="clean")
    axes.plot(before, list(places), "o", color=COLORS[0], fillstyle="none", label="as trained")
    axes.plot(after, list(places), "o", color=COLORS[0], label=f"with {tta['method']}")
    name_ticks(axes.yaxis, [name for name, _ in rows], most=40)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("accuracy")
    axes.xaxis.set_major_formatter(percent_format())
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def plot_participation(run: Run) -> Figure | None:
    """Whose updates were used, cut by a robust rule, far beyond the others', or quarantined in which round; null when
    all clients' were used in every round and nothing else can be said of them.
    """
    rounds = run.of("round")
    used = [(event["round"], client) for event in rounds for client in event["clients"]]
    marked = {
        "trimmed, clipped or not selected": [
            (event["round"], client) for event in rounds for client in event.get("treated", {})
        ],
        "far beyond the others'": [
            (event["round"], client) for event in rounds for client in event.get("far_updates", {})
        ],
        "quarantined": [(event["round"], event["client"]) for event in run.of("quarantine")],
    }
    bad = [pair for pairs in marked.values() for pair in pairs]
    known = {client for _, client in used + bad} | set(run.split["clients"] if run.split else ())
    if not used or (len(used) == len(known) * len(rounds) and not bad):
        return None
    names = sorted(known, key=natural_key)
    row = {name: index for index, name in enumerate(names)}
    last = max(at for at, _ in used + bad)
    grid = [[math.nan] * last for _ in names]
    for at, client in used:
        grid[row[client]][at - 1] = 0.6
    for at, client in marked["trimmed, clipped or not selected"]:
        grid[row[client]][at - 1] = 0.25
    figure, (axes,) = axes_of(["Clients' updates"], heights=(min(2.4, 0.8 + 0.06 * len(names)),))
    _draw_rounds(axes, grid, f"used ({len(used)})")
    for (label, pairs), (look, color) in zip(
        marked.items(), (("s", "#d0e1f2"), ("^", COLORS[4]), ("x", COLORS[1])), strict=True
    ):
        if pairs:
            shown = [] if look == "s" else pairs  # marks stay visible where a cell is thinner than a pixel
            places = [at for at, _ in shown], [row[client] for _, client in shown]
            size: dict[str, Any] = {"markersize": 5, "markeredgewidth": 1.6, "clip_on": False}
            axes.plot(*places, look, color=color, label=f"{label} ({len(pairs)})", **size)
    name_ticks(axes.yaxis, names, most=25)
    axes.set_ylabel("client")
    round_axis(axes)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _draw_rounds(axes: Axes, grid: list[list[float]], label: str) -> None:
    """A cell for each client and round, `grid` [clients, rounds] of shades from 0 to 1, NaN where nothing was used."""
    rows, last = len(grid), len(grid[0])
    axes.imshow(
        grid,
        aspect="auto",
        cmap="Blues",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(0.5, last + 0.5, rows - 0.5, -0.5),
    )
    axes.plot([], [], "s", color="#4a98c9", markersize=7, label=label)
    axes.grid(False)
    if rows <= 40:
        axes.hlines([edge + 0.5 for edge in range(rows - 1)], 0.5, last + 0.5, color="white", linewidth=1)


def _label_shares(axes: Axes, names: list[str], labels: list[str], counts: list[list[int]]) -> None:
    """Heat map of `counts` [clients, labels], each client's scaled to sum to one; the counts where there is room."""
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    by_label = list(zip(*shares, strict=True))
    mesh = axes.imshow(by_label, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if len(names) <= 15 and len(labels) <= 12:
        for column, row in enumerate(counts):
            for line, count in enumerate(row):
                color = "white" if shares[column][line] > 0.55 else "#333333"
                axes.text(column, line, str(count), ha="center", va="center", fontsize=8, color=color)
    axes.grid(False)
    axes.set_ylabel("label")
    name_ticks(axes.xaxis, names, upright=are_crowded(names))
    name_ticks(axes.yaxis, labels, most=25)
    axes.figure.colorbar(mesh, ax=axes, format=percent_format(), pad=0.01)
