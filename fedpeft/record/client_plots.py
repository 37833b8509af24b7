"""The plots of a run that show its clients one by one: their accuracies, records, updates and streams."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedpeft.record.drawing import (
    COLORS,
    GREY,
    GRID,
    INK,
    accuracy_axis,
    are_crowded,
    axes_of,
    name_ticks,
    natural_key,
    percent_format,
    quantile_of,
    round_axis,
    with_labels,
)
from fedpeft.record.words import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

    from fedpeft.record.run_folder import Run

MOST_NAMED = 40  # clients whose names and bars can be told apart
BLUE = (0.0, 0.447, 0.698)


def clients_accuracy(run: Run) -> Figure | None:
    """Spread of the clients' own accuracies over rounds; null where it was taken once."""
    spreads = _collect_spreads(run)
    if len(spreads) < 2:
        return None
    figure, axes = axes_of("Each client on its own held-out records")
    at = {share: [quantile_of(values, share) for values in spreads.values()] for share in (0, 0.25, 0.5, 0.75, 1)}
    axes.fill_between(list(spreads), at[0], at[1], color=COLORS[0], alpha=0.15, linewidth=0, label="lowest to highest")
    axes.fill_between(list(spreads), at[0.25], at[0.75], color=COLORS[0], alpha=0.35, linewidth=0, label="middle half")
    axes.plot(list(spreads), at[0.5], "o-", color=COLORS[0], label="median")
    accuracy_axis(axes)
    round_axis(axes)
    figure.legend(loc="outside lower left", ncols=3)
    return figure


def clients_at_the_end(run: Run) -> Figure | None:
    """All clients' accuracies after the last evaluation, from lowest to highest."""
    spreads = _collect_spreads(run)
    if not spreads:
        return None
    last = max(spreads)
    figure, axes = axes_of(f"All {len(spreads[last])} clients after round {last}, each on its own held-out records")
    # No label is drawn that begins with a _: the title says what the points are.
    axes.plot(range(1, len(spreads[last]) + 1), spreads[last], "o", color=COLORS[0], label="_clients")
    median = quantile_of(spreads[last], 0.5)
    axes.axhline(median, color=GREY, linestyle="--", linewidth=1.2, label=f"median ({percent(median)})")
    accuracy_axis(axes)
    round_axis(axes)
    axes.set_xlabel("clients, from lowest to highest")
    return with_labels(figure)


def _collect_spreads(run: Run) -> dict[int, list[float]]:
    """Round -> the clients' accuracies, sorted."""
    spreads: dict[int, list[float]] = {}
    for event in run.of("clients_evaluated"):
        found = [result.get("accuracy") for result in event["clients"].values()]
        spreads[event["round"]] = sorted(value for value in found if value is not None)
    return {number: values for number, values in spreads.items() if values}


def epsilon_by_client(run: Run) -> Figure | None:
    """What each client has spent, where that is not the same for all."""
    clients = (run.summary.get("privacy") or {}).get("clients") or {}
    spent = {name: clients[name]["epsilon"] for name in sorted(clients, key=natural_key)}
    if len({round(value, 6) for value in spent.values()}) < 2:
        return None
    figure, axes = axes_of("Epsilon spent by each client")
    _draw_bars(axes, spent)
    axes.set_ylabel("epsilon")
    return figure


def clients_sizes(run: Run) -> Figure | None:
    """How many records each client has."""
    if run.split is None or run.hides_counts:
        return None
    sizes = {name: len(indices) for name, indices in run.split["clients"].items()}
    figure, axes = axes_of(f"Records of the {len(sizes)} clients")
    _draw_bars(axes, sizes)
    axes.set_ylabel("records")
    return figure


def _draw_bars(axes: Axes, values: Mapping[str, float]) -> None:
    """A bar for each client under its name; of more than can be told apart, from the most to the least."""
    if len(values) <= MOST_NAMED:
        axes.bar(range(len(values)), list(values.values()), color=COLORS[0], width=0.8)
        name_ticks(axes.xaxis, list(values), upright=are_crowded(list(values)))
        axes.set_xlabel("client")
    else:  # one filled outline, as a bar is an object of its own
        edges = [index + 0.5 for index in range(len(values) + 1)]
        heights = sorted(values.values(), reverse=True)
        # Not `stairs`, which measures a patch edge by edge: seconds for 100,000 clients.
        axes.fill_between(edges, [*heights, heights[-1]], step="post", color=COLORS[0], linewidth=0)
        axes.set_xlabel("clients, from the most to the least")
    axes.grid(axis="x", visible=False)


def clients_by_label(run: Run) -> Figure | None:
    """How each client's records divide over the labels: shares, so that small clients show as clearly."""
    histogram = (run.split or {}).get("histogram") or {}
    labels = [str(label) for label in histogram.get("labels", [])]  # none where the data have no classes
    if run.split is None or run.hides_counts or not labels:
        return None
    rows = list(zip(run.split["clients"], histogram["counts"], strict=True))
    named = len(rows) <= MOST_NAMED
    if not named:  # of many clients the pattern is what can be seen: by their largest class, the most one-sided first
        rows.sort(key=lambda row: (row[1].index(max(row[1])), -max(row[1]) / max(1, sum(row[1]))))
    figure, axes = axes_of("Labels, as shares of a client's records", min(2.2, 0.8 + 0.07 * len(labels)))
    _label_shares(axes, [name for name, _ in rows], labels, [counts for _, counts in rows])
    if not named:
        axes.set_xticks([])
    axes.set_xlabel("client" if named else f"{len(rows)} clients, by their most frequent label")
    return figure


def clients_skew(run: Run) -> Figure | None:
    """Of many clients, how one-sided each one's records are; null of few, whose labels are seen one by one."""
    counts = ((run.split or {}).get("histogram") or {}).get("counts") or []
    if len(counts) <= MOST_NAMED or run.hides_counts or not counts[0]:
        return None
    shares = {str(index): max(row) / max(1, sum(row)) for index, row in enumerate(counts)}
    middle = quantile_of(sorted(shares.values()), 0.5)
    figure, axes = axes_of(f"A client's most frequent label, as a share of its records (median {percent(middle)})")
    _draw_bars(axes, shares)
    axes.yaxis.set_major_formatter(percent_format())
    axes.set_ylabel("share")
    return figure


def clients_rounds(run: Run) -> Figure | None:
    """Of many clients, how many took part in how many rounds; null of few."""
    rounds = run.of("round")
    names = set(run.split["clients"] if run.split else ()) | {name for event in rounds for name in event["clients"]}
    if not rounds or len(names) <= MOST_NAMED:
        return None
    took = Counter(name for event in rounds for name in event["clients"])
    often = Counter(took[name] for name in names)
    figure, axes = axes_of(f"Rounds, of {len(rounds)}, in which a client's update was used")
    axes.bar(list(often), list(often.values()), color=COLORS[0], width=0.8)
    axes.grid(axis="x", visible=False)
    round_axis(axes)
    axes.set(xlabel="rounds", ylabel="clients")
    return figure


def test_time(run: Run) -> Figure | None:
    """Each client's accuracy on its clean records, and on its stream as trained and adapted, sorted by the gain."""
    tta = run.summary.get("tta")
    if not tta:
        return None
    rows = sorted(tta["clients"].items(), key=lambda item: item[1]["tta_accuracy"] - item[1]["source_accuracy"])
    height = min(3.0, max(0.8, 0.12 * len(rows)))
    figure, axes = axes_of(f"Each client's records clean, its stream as trained, and with {tta['method']}", height)
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
    figure.legend(loc="outside lower left", ncols=3)
    return figure


def plot_participation(run: Run) -> Figure | None:
    """Whose updates were used, cut by a robust rule, far beyond the others', or quarantined in which round; null where
    nothing was amiss.
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
    if not used or not bad:
        return None
    names = sorted(known, key=natural_key)
    row = {name: index for index, name in enumerate(names)}
    last = max(at for at, _ in used + bad)
    grid = [[math.nan] * last for _ in names]
    for at, client in used:
        grid[row[client]][at - 1] = 0.6
    for at, client in marked["trimmed, clipped or not selected"]:
        grid[row[client]][at - 1] = 0.25
    figure, axes = axes_of("Clients' updates", min(2.4, 0.9 + 0.06 * len(names)))
    _draw_rounds(axes, grid, f"used ({len(used)})")
    for (label, pairs), (look, color) in zip(
        marked.items(), (("s", _make_shades()(0.25)), ("^", COLORS[4]), ("x", COLORS[1])), strict=True
    ):
        if pairs:
            shown = [] if look == "s" else pairs  # marks stay visible where a cell is thinner than a pixel
            places = [at for at, _ in shown], [row[client] for _, client in shown]
            # A line without points, if not clipped, counts as one at the corner of the figure: the axes would shrink.
            size: dict[str, Any] = {"markersize": 5, "markeredgewidth": 1.6, "clip_on": not shown}
            axes.plot(*places, look, color=color, label=f"{label} ({len(pairs)})", **size)
    name_ticks(axes.yaxis, names, most=25)
    axes.set_ylabel("client")
    round_axis(axes)
    figure.legend(loc="outside lower left", ncols=2)
    return figure


def _draw_rounds(axes: Axes, grid: list[list[float]], label: str) -> None:
    """A cell for each client and round, `grid` [clients, rounds] of shades from 0 to 1, NaN where nothing was used."""
    rows, last = len(grid), len(grid[0])
    axes.imshow(
        grid,
        aspect="auto",
        cmap=_make_shades(),
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(0.5, last + 0.5, rows - 0.5, -0.5),
    )
    # An image has no entry of its own in a legend.
    axes.plot([], [], "s", color=_make_shades()(0.6), markersize=7, label=label)
    axes.grid(False)
    if rows <= 40:
        axes.hlines([edge + 0.5 for edge in range(rows - 1)], 0.5, last + 0.5, color=GRID, linewidth=1)


def _make_shades() -> Colormap:
    """From nothing to our blue, so that no white lies on a dark page."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("shades", [(*BLUE, 0.0), (*BLUE, 1.0)])


def _label_shares(axes: Axes, names: list[str], labels: list[str], counts: list[list[int]]) -> None:
    """Heat map of `counts` [clients, labels], each client's scaled to sum to one; the counts where there is room."""
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    by_label = list(zip(*shares, strict=True))
    most = max(max(row) for row in shares) or 1.0
    mesh = axes.imshow(by_label, aspect="auto", cmap=_make_shades(), vmin=0, vmax=most, interpolation="nearest")
    if len(names) <= 15 and len(labels) <= 12:
        for column, row in enumerate(counts):
            for line, count in enumerate(row):
                color = "white" if shares[column][line] > 0.55 * most else INK
                axes.text(column, line, str(count), ha="center", va="center", fontsize=8, color=color)
    axes.grid(False)
    axes.set_ylabel("label")
    name_ticks(axes.xaxis, names, upright=are_crowded(names))
    name_ticks(axes.yaxis, labels, most=25)
    axes.figure.colorbar(mesh, ax=axes, format=percent_format(), pad=0.01)
