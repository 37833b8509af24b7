"""The plots of a run, from its events alone.

Each function of `PLOTS` gives a figure, or null where the run has nothing to show in it. All are drawn on matplotlib's
Agg canvas without pyplot, inside `style()`, so that no display, global state or user's setting has a say in the files.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedpeft.metrics import SERVER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from fedpeft.metrics import Event
    from fedpeft.report import Run

MB = 1e6  # bytes
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#5b5b5b")  # colour-blind safe
DASHES = ("-", "--", "-.", ":")
GREY = "#777777"
STYLE = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "figure.dpi": 130,
    "font.size": 10,
    "grid.color": "#e4e4e4",
    "legend.fontsize": 9,
    "legend.framealpha": 0.85,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "text.parse_math": False,  # client and folder names may hold a dollar sign
}
REFERENCES = {  # key of the baselines event -> what it is
    "frozen_logistic": "logistic regression on frozen features",
    "pixels_or_words_logistic": "logistic regression on raw inputs",
}


@contextmanager
def style() -> Iterator[None]:
    """Our look, whatever the user's matplotlibrc says: the same run gives the same files."""
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]):
        yield


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def number(value: Any) -> str:
    """A number as a reader wants it: integers whole, others to four significant digits; other values as text."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


# The plots ------------------------------------------------------------------------------------------------------------


def accuracy(run: Run) -> Figure | None:
    """Accuracy over rounds, from the frozen model's, with the reference lines that were computed."""
    if not _has_accuracy(run):
        return None
    figure, (axes,) = _axes([f"Accuracy on the {run.summary['evaluated_on']}"], heights=(1.2,))
    last = (run.summary["final"] or {}).get("accuracy")
    elsewhere = "" if run.summary["evaluated_on"] == SERVER else f", {SERVER}"
    _line(axes, run.scores, "accuracy", f"{run.summary['strategy']} (last {percent(last)})", COLORS[0])
    for event in run.of("baselines"):
        for color, (name, label) in zip(COLORS[2:], REFERENCES.items(), strict=False):
            if event.get(name) is not None:
                label = f"{label} ({percent(event[name])}{elsewhere})"
                axes.axhline(event[name], color=color, linestyle=":", label=label)
    _frozen(axes, run)
    _accuracy_axis(axes)
    _round_axis(axes)
    figure.legend(loc="outside lower center", ncols=2)  # too wide to lie on the curve
    return figure


def loss(run: Run) -> Figure | None:
    """Mean training loss of each round's clients, and the loss of the evaluated models."""
    figure, (axes,) = _axes(["Loss"])
    _line(axes, run.of("round"), "train_loss", "clients' training records, while training", COLORS[1])
    _line(axes, run.scores, "loss", run.summary["evaluated_on"], COLORS[0])
    axes.set_ylabel("mean loss")
    _round_axis(axes)
    return _with_legends(figure) if axes.lines else None


def communication(run: Run) -> Figure | None:
    """Cumulative traffic over rounds, and the accuracy that the uploaded megabytes bought."""
    rounds = run.of("round")
    if not rounds:
        return None
    titles = ["Traffic, all clients together", *(["Accuracy against uploads"] if _has_accuracy(run) else [])]
    figure, (traffic, *bought) = _axes(titles)
    for key, label, color in (("bytes_up", "clients to server", 0), ("bytes_down", "server to clients", 1)):
        sums = _cumulative(rounds, key)
        label = f"{label} ({number(max(sums.values()))} MB)"
        traffic.plot(list(sums), list(sums.values()), color=COLORS[color], linestyle=DASHES[color], label=label)
    traffic.set_ylabel("cumulative MB")
    traffic.set_ylim(bottom=0)
    _round_axis(traffic)
    for axes in bought:
        _line(axes, run.scores, "accuracy", run.summary["strategy"], COLORS[0], x=_cumulative(rounds, "bytes_up"))
        _frozen(axes, run)
        _accuracy_axis(axes)
        axes.set_xlabel("cumulative MB, clients to server")
    return _with_legends(figure)


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
    figure, (over, final) = _axes(titles)
    at = {share: [_quantile(values, share) for values in spreads.values()] for share in (0, 0.25, 0.5, 0.75, 1)}
    over.fill_between(list(spreads), at[0], at[1], color=COLORS[0], alpha=0.15, linewidth=0, label="lowest to highest")
    over.fill_between(list(spreads), at[0.25], at[0.75], color=COLORS[0], alpha=0.35, linewidth=0, label="middle half")
    over.plot(list(spreads), at[0.5], "o-", color=COLORS[0], label="median")
    median = at[0.5][-1]
    final.plot(range(1, len(spreads[last]) + 1), spreads[last], "o", color=COLORS[0])
    final.axhline(median, color=GREY, linestyle="--", linewidth=1.2, label=f"median ({percent(median)})")
    for axes in (over, final):
        _accuracy_axis(axes)
        _round_axis(axes)
    final.set_xlabel("clients, from lowest to highest")
    return _with_legends(figure)


def clients_by_label(run: Run) -> Figure | None:
    """Records of each client, and how they divide over the labels: shares, so that small clients show as clearly."""
    if run.split is None:
        return None
    names = list(run.split["clients"])
    histogram = run.split.get("histogram") or {}
    labels = [str(label) for label in histogram.get("labels", [])]  # none where the data have no classes
    titles = [f"Records of the {len(names)} clients"]
    if labels:
        titles.append("Labels, as shares of a client's records")
    figure, (top, *below) = _axes(titles, heights=(0.7, min(2.0, 0.6 + 0.12 * len(labels)))[: len(titles)])
    _bars(top, [len(indices) for indices in run.split["clients"].values()])
    top.set_xlim(-0.5, len(names) - 0.5)
    top.set_ylabel("records")
    top.grid(axis="x", visible=False)
    _name_ticks(top.xaxis, names, upright=_crowded(names))
    if labels:
        top.tick_params(labelbottom=False)
        _label_shares(below[0], names, labels, histogram["counts"])
    (below or [top])[0].set_xlabel("client")
    return figure


def participation(run: Run) -> Figure | None:
    """Whose updates were used or quarantined in which round; null when all clients' were used in every round."""
    rounds = run.of("round")
    used = [(event["round"], client) for event in rounds for client in event["clients"]]
    bad = [(event["round"], event["client"]) for event in run.of("quarantine")]
    known = {client for _, client in used + bad} | set(run.split["clients"] if run.split else ())
    if not used or len(used) == len(known) * len(rounds):
        return None
    names = sorted(known, key=_natural)
    row = {name: index for index, name in enumerate(names)}
    last = max(number for number, _ in used + bad)
    grid = [[math.nan] * last for _ in names]
    for at, client in used:
        grid[row[client]][at - 1] = 0.6
    figure, (axes,) = _axes(["Clients' updates"], heights=(min(2.4, 0.8 + 0.06 * len(names)),))
    axes.imshow(grid, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest",
                extent=(0.5, last + 0.5, len(names) - 0.5, -0.5))
    axes.plot([], [], "s", color="#4a98c9", markersize=7, label=f"used ({len(used)})")
    if bad:  # marks stay visible where a cell is thinner than a pixel
        axes.plot([at for at, _ in bad], [row[client] for _, client in bad], "x", color=COLORS[1], markersize=5,
                  markeredgewidth=1.6, clip_on=False, label=f"quarantined ({len(bad)})")
    axes.grid(False)
    if len(names) <= 40:
        axes.hlines([line + 0.5 for line in range(len(names) - 1)], 0.5, last + 0.5, color="white", linewidth=1)
    _name_ticks(axes.yaxis, names, most=25)
    axes.set_ylabel("client")
    _round_axis(axes)
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def privacy(run: Run) -> Figure | None:
    """Accuracy against the largest epsilon spent so far, and what each client has spent."""
    section = run.summary.get("privacy") or {}
    spent = {event["round"]: event["epsilon_max"] for event in run.of("round") if event.get("epsilon_max") is not None}
    if not spent:
        return None
    clients = section.get("clients") or {}
    protected = "client" if section.get("unit") == "client" else "record"
    titles = [f"Accuracy against epsilon of one {protected}", *(["Epsilon spent by each client"] if clients else [])]
    figure, (bought, *each) = _axes(titles)
    scores = [score for score in run.scores if score["round"] in spent]
    _line(bought, scores, "accuracy", run.summary["strategy"], COLORS[0], x=spent)
    _frozen(bought, run)
    _accuracy_axis(bought)
    bought.set_xlabel(f"largest epsilon so far, at delta {section.get('delta', 0):g}")
    for axes in each:
        names = sorted(clients, key=_natural)
        _bars(axes, [clients[name]["epsilon"] for name in names])
        axes.set_ylim(bottom=0)
        axes.grid(axis="x", visible=False)
        _name_ticks(axes.xaxis, names, upright=_crowded(names))
    return _with_legends(figure)


def compared(runs: list[Run]) -> Figure:
    """Accuracy of several runs over rounds and against uploads; one dashed line for each distinct frozen model."""
    figure, (by_round, by_bytes) = _axes(["Accuracy over rounds", "Accuracy against uploads"], heights=(1.2,))
    frozen: set[float | None] = {None}
    for index, run in enumerate(runs):
        color, dashes = COLORS[index % len(COLORS)], DASHES[index // len(COLORS) % len(DASHES)]
        last = percent((run.summary["final"] or {}).get("accuracy"))
        name = f" {run.label}" if run.label.startswith("_") else run.label  # matplotlib keeps _names out of legends
        _line(by_round, run.scores, "accuracy", f"{name} ({last})", color, dashes=dashes)
        uploads = _cumulative(run.of("round"), "bytes_up")
        _line(by_bytes, run.scores, "accuracy", "", color, x=uploads, dashes=dashes)
        baseline = (run.summary["baseline"] or {}).get("accuracy")
        if baseline not in frozen:
            frozen.add(baseline)
            _frozen(by_round, run)
            _frozen(by_bytes, run)
    for axes in (by_round, by_bytes):
        _accuracy_axis(axes)
    _round_axis(by_round)
    by_bytes.set_xlabel("cumulative MB, clients to server")
    figure.legend(*by_round.get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(runs) + 1))
    return figure


PLOTS: dict[str, Callable[[Run], Figure | None]] = {
    plot.__name__: plot
    for plot in (accuracy, loss, privacy, communication, clients_accuracy, clients_by_label, participation)
}


# Their parts ----------------------------------------------------------------------------------------------------------


def _axes(titles: list[str], heights: Sequence[float] = (1,)) -> tuple[Figure, list[Axes]]:
    """One axes a title, below each other with a height (in units of 3.2 inches) each, else beside each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 3.2 * sum(heights)))
    if len(heights) > 1:
        grid = figure.subplots(len(titles), 1, squeeze=False, height_ratios=heights)
    else:
        grid = figure.subplots(1, len(titles), squeeze=False)
    for axes, title in zip(grid.flat, titles, strict=True):
        axes.set_title(title)
    return figure, list(grid.flat)


def _line(axes: Axes, events: list[Event], key: str, label: str, color: str, *, x: dict[int, float] | None = None,
          dashes: str = "-") -> None:
    """`key` of the events that have it, over rounds or over `x` of each round; a value that was not finite is a gap."""
    points = {event["round"]: event[key] for event in events if key in event}
    if any(value is not None for value in points.values()):
        axes.plot([x[at] for at in points] if x else list(points),
                  [math.nan if value is None else value for value in points.values()],
                  marker="o" if len(points) <= 40 else "", linestyle=dashes, color=color, label=label)


def _frozen(axes: Axes, run: Run) -> None:
    value = (run.summary["baseline"] or {}).get("accuracy")
    if value is not None:
        where = run.summary["baseline"]["evaluated_on"]
        elsewhere = "" if where == run.summary["evaluated_on"] else f", {where}"
        label = f"frozen model ({percent(value)}{elsewhere})"
        axes.axhline(value, color=GREY, linestyle="--", linewidth=1.2, label=label)


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
    _name_ticks(axes.xaxis, names, upright=_crowded(names))
    _name_ticks(axes.yaxis, labels, most=25)
    axes.figure.colorbar(mesh, ax=axes, format=_percent_format(), pad=0.01)


def _bars(axes: Axes, heights: Sequence[float]) -> None:
    """A bar for each client; for more than can be told apart one filled outline, as a bar is an object of its own."""
    if len(heights) <= 400:
        axes.bar(range(len(heights)), heights, color=COLORS[0], width=0.8)
    else:
        axes.stairs(heights, [index - 0.5 for index in range(len(heights) + 1)], fill=True, color=COLORS[0])


def _name_ticks(axis: Axis, names: list[str], *, most: int = 40, upright: bool = False) -> None:
    """Names at integer positions; every n-th where more than `most` would overlap."""
    shown = range(0, len(names), max(1, math.ceil(len(names) / most)))
    labels = [name if len(name) <= 18 else name[:17] + "…" for name in (names[index] for index in shown)]
    axis.set_ticks(list(shown), labels, rotation=90 if upright else 0, fontsize=8)


def _crowded(names: list[str]) -> bool:
    """Whether names beside each other would overlap."""
    return sum(min(len(name), 18) + 2 for name in names) > 90


def _accuracy_axis(axes: Axes) -> None:
    axes.set_ylabel("accuracy")
    axes.yaxis.set_major_formatter(_percent_format())


def _percent_format() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0)


def _round_axis(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _with_legends(figure: Figure) -> Figure:
    for axes in figure.axes:
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return figure


def _has_accuracy(run: Run) -> bool:
    return any(score["accuracy"] is not None for score in run.scores)


def _cumulative(rounds: list[Event], key: str) -> dict[int, float]:
    """Round -> MB up to its end; 0 is before round 1."""
    total, sums = 0.0, {0: 0.0}
    for event in rounds:
        total += event[key] / MB
        sums[event["round"]] = total
    return sums


def _quantile(values: list[float], share: float) -> float:
    """Of sorted values, by linear interpolation."""
    position = share * (len(values) - 1)
    low = math.floor(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts client-10 after client-9."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", name)]
