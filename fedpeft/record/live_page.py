"""The page of runs at work: parts that are drawn here and put in place by `assets/watch.js` whenever one has changed.

Every name and reason on it comes from elsewhere. All of it passes through `html.escape`, which the tables do.
"""

from __future__ import annotations

import html
import math
import time
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Any

from fedpeft.foreign import shown
from fedpeft.record import side_by_side
from fedpeft.record.drawing import quantile_of
from fedpeft.record.line_chart import Line, svg_lines
from fedpeft.record.pages import PAGE_STYLE, html_folded, html_list, html_note, html_page, html_table
from fedpeft.record.run_folder import Run
from fedpeft.record.words import number, percent, show_seconds, size

MOST_ROWS = 100  # clients on a page at a time
MOST_NOTES = 3  # that stand open
NBSP = "\u00a0"
LONGEST_NAME, LONGEST_REASON = 100, 300  # bytes
State = dict[str, Any]
NONE: list[State] = []


@cache
def asset(name: str) -> str:
    """A file of `fedpeft/assets`."""
    return resources.files("fedpeft").joinpath("assets", name).read_text(encoding="utf-8")


def style() -> str:
    """The report's style, and what only this page needs."""
    return PAGE_STYLE + asset("watch.css")


def page(states: list[State], parts: dict[str, str], wanted: str) -> str:
    """The whole page; `wanted` is what the names of the clients shown contain."""
    count = {0: "no run yet", 1: states[0]["run"] if states else ""}
    title = count.get(len(states), f"{len(states)} runs")
    # Of one run what is to be known first comes first; several are put side by side before that.
    sites = [key for key in parts if key.startswith("coordinator-")]
    top = [*["run-0-state"] * (len(states) == 1), *sites, *["runs", "charts"] * bool(states)]
    body = [
        '<p id="link" role="status">This page shows what has been recorded.</p>',
        '<p><button id="pause" type="button" aria-pressed="false">Pause</button></p>',
        "<noscript><p>Without scripts the page stands still: load it again to see what is new.</p></noscript>",
        *(_wrap_section(key, parts[key]) for key in top),
        "<h2>Clients and rounds</h2>",
        '<form role="search"><label for="client">Clients whose name contains</label> '
        f'<input id="client" name="client" type="search" maxlength="{LONGEST_NAME}" value="{html.escape(wanted)}"> '
        "<button>Show</button></form>",
        *(_wrap_section(key, inner) for key, inner in parts.items() if key not in top),
        f"<script>{asset('watch.js')}</script>",
    ]
    return html_page(f"watch: {title}", body, style(), '<link rel="icon" href="data:,">')


def _wrap_section(key: str, inner: str) -> str:
    return f'<section data-part="{key}">{inner}</section>'


def parts(states: list[State], runs: list[Run | None], wanted: str, fleets: list[State] = NONE) -> dict[str, str]:
    """HTML by part. The keys are the same for all states of the same runs.

    Args:
        fleets: the coordinators among what is watched.
    """
    drawn = {f"coordinator-{place}": _show_sites(fleet, states) for place, fleet in enumerate(fleets)}
    if states:
        drawn |= {"runs": _show_runs(states, runs), "charts": _show_charts(states)}
    for place, state in enumerate(states):
        drawn[f"run-{place}-state"] = _show_head(state, len(states) == 1)
        drawn[f"run-{place}-tasks"] = _show_tasks(state)
        drawn[f"run-{place}-quarantine"] = _show_quarantine(state, wanted)
        drawn[f"run-{place}-clients"] = _show_clients(state, wanted)
        drawn[f"run-{place}-rounds"] = _show_rounds(state)
    return drawn


def _show_sites(fleet: State, states: list[State]) -> str:
    """Whether the coordinator runs; each site, those that are away first, and when it last answered in these runs."""
    lines = [f"<h2>Sites of {html.escape(fleet['path'])}</h2>"]
    if not fleet["running"]:
        lines.append(html_note(shown(fleet["problem"] or "The coordinator is not running.", LONGEST_REASON)))
    online = sum(row["status"] == "online" for row in fleet["sites"])
    lines.append(f"<p>{online} of {len(fleet['sites'])} sites are connected.</p>")
    if fleet["runs"] > len(states):
        lines.append(f"<p>The newest {len(states)} of {fleet['runs']} runs are shown.</p>")
    if not states:
        lines.append("<p>No run has been submitted yet.</p>")
    rows = []
    for row in sorted(fleet["sites"], key=lambda row: (row["status"] == "online", row["name"]))[:MOST_ROWS]:
        known = [state["clients"][row["name"]] for state in states if row["name"] in state["clients"]]
        seen = max((client["seen"] for client in known if client["seen"] is not None), default=None)
        away = {"online": "connected", "unknown": "not heard of"}.get(row["status"], row["status"])
        since = f" since {_show_clock(row['online_until'])}" if row["online_until"] else ""
        rows.append([shown(row["name"], LONGEST_NAME), away + since, _show_clock(seen)])
    if rows:
        lines.append(html_table(["site", "state", "last answered"], rows))
    if len(fleet["sites"]) > MOST_ROWS:
        lines.append(f"<p>{MOST_ROWS} of {number(len(fleet['sites']))} sites are shown, those that are away first.</p>")
    return "".join(lines)


# All runs -------------------------------------------------------------------------------------------------------------


def _show_runs(states: list[State], runs: list[Run | None]) -> str:
    """A column for each run: there are few, and a phone is narrow."""
    facts: dict[str, Callable[[State], str]] = {
        "state": _word_for,
        "strategy": lambda s: shown(s["strategy"] or "–", LONGEST_NAME),
        "round": lambda s: f"{s['round']} of {s['rounds']}" if s["rounds"] else "–",
        "accuracy": lambda s: percent(s["accuracy"]),
        "loss": lambda s: number(s["loss"]),
        "clients that took part": _taking_part,
        "quarantined at least once": lambda s: str(sum(row["quarantined"] > 0 for row in s["clients"].values())),
        "epsilon, the most of any client": lambda s: number(s["epsilon_max"]),
        "up, down": lambda s: ", ".join(size(s[key]) for key in ("bytes_up", "bytes_down")),
        "a round takes": lambda s: show_seconds(s["seconds_per_round"]),
        "begun": lambda s: _show_clock(s["begun"]),
        "last event": lambda s: _show_clock(s["last_event"]),
        "expected end": lambda s: _show_clock(s["expected_end"]),
    }
    rows = [[name, *(tell(state) for state in states)] for name, tell in facts.items()]
    heads = ["", *(state["run"] for state in states)] if len(states) > 1 else []
    known = [run for run in runs if run]
    lines = []
    if len(known) > 1:
        lines.append(f'<p class="lead">{html.escape(side_by_side.ranking(known))}</p>')
        if unlike := side_by_side.differences(known):
            lines.append(html_folded("In what these runs are not alike", html_list(unlike)))
    return "".join(["<h2>State</h2>", *lines, html_table(heads, rows)])


def _word_for(state: State) -> str:
    return shown(state["state"] + (f": {state['reason']}" if state["reason"] else ""), LONGEST_REASON)


def _taking_part(state: State) -> str:
    seen = sum(row["rounds"] > 0 for row in state["clients"].values())
    return f"{seen:,} of {state['expected_clients']:,}" if state["expected_clients"] else "–"


def _show_clock(at: float | None) -> str:
    """Local time, unbroken. Never "so long ago": what has not changed shall read the same."""
    return "–" if at is None else time.strftime("%d %b %Y %H:%M:%S", time.localtime(at)).replace(" ", NBSP)


def _show_charts(states: list[State]) -> str:
    titles = {
        "accuracy": "accuracy",
        "loss": "loss",
        "train_loss": "training loss",
        "epsilon_max": "epsilon, the most of any client",
    }
    if any(state["sequence"] for state in states):
        titles["accuracy"] = "accuracy of the classifier as trained, classes so far"
    metrics = [state["metric"] for state in states]
    # One chart has one unit, so all runs must name the same measure.
    if metrics[0] and metrics == metrics[:1] * len(metrics):
        titles = {"metric": metrics[0]["words"], **titles}
    figures = [
        svg_lines(
            f"chart-{key}",
            title,
            [
                Line(shown(state["run"], LONGEST_NAME), place, _points_of(state, key))
                for place, state in enumerate(states)
            ],
            key == "accuracy" or (key == "metric" and metrics[0]["share"]),
        )
        for key, title in titles.items()
    ]
    if not any(figures):
        none = (
            "No round has been measured: there are neither scores nor losses."
            if any(state["played"] for state in states)
            else "No round has been recorded yet."
        )
        return f"<h2>Curves</h2><p>{none}</p>"
    return f'<h2>Curves</h2><div class="charts">{"".join(figures)}</div>'


def _points_of(state: State, key: str) -> list[tuple[int, float, object]]:
    """In a sequence of tasks scores over unlike classes are not joined."""
    apart = "classes" if state["sequence"] and key in ("accuracy", "loss") else ""
    return [(row["round"], row[key], row.get(apart)) for row in state["played"] if row.get(key) is not None]


# One run --------------------------------------------------------------------------------------------------------------


def _show_head(state: State, alone: bool) -> str:
    """What is to be known first; with the run's name unless it is alone on the page, which has it already."""
    lines = [] if alone else [f"<h2>{html.escape(state['run'])}</h2>"]
    if state["state"] in ("interrupted", "failed", "stopped", "waiting", "not begun"):
        lines.append(html_note(f"This run is {_word_for(state)}. {state['advice']}".rstrip()))
    lines += [html_note(shown(text, LONGEST_REASON)) for text in state["problems"]]
    warnings = [shown(text, LONGEST_REASON) for text in state["warnings"][:MOST_ROWS]]
    if len(warnings) > MOST_NOTES:
        lines.append(html_folded(f"{len(state['warnings'])} clients stand out", html_list(warnings)))
    else:
        lines += [html_note(text) for text in warnings]
    for text in state["headline"][:1]:
        lines.append(f'<p class="lead">{html.escape(text)}</p>')
    lines += [f"<p>{html.escape(text)}</p>" for text in state["headline"][1:]]
    if state["failed_rounds"]:
        rows = [
            [str(row["round"]), shown(row["reason"], LONGEST_REASON)] for row in state["failed_rounds"][-MOST_ROWS:]
        ]
        level = "h2" if alone else "h3"
        lines += [f"<{level}>Rounds without a result</{level}>", html_table(["round", "reason"], rows)]
    return "".join(lines)


def _show_tasks(state: State) -> str:
    if not state["sequence"]:
        return ""
    done, planned = state["sequence"]["tasks_done"], state["sequence"]["tasks"]
    rows = [
        [
            f"task {event['task'] + 1}",
            str(event["round"]),
            *(
                percent(right / count) if count and task <= event["task"] else ""
                for task, (right, count) in enumerate(zip(event["right"], event["count"], strict=True))
            ),
        ]
        for event in state["tasks"]
    ]
    heads = ["after", "round", *(f"on task {task + 1}" for task in range(planned))]
    table = html_table(heads, rows) if rows else ""
    return f"<h3>Tasks: {done} of {planned}</h3>{table}"


def _show_clients(state: State, wanted: str) -> str:
    clients = {name: row for name, row in state["clients"].items() if wanted.lower() in name.lower()}
    played = sum("used" in row for row in state["played"])
    lines = [f"<h3>Clients: {_taking_part(state)} have taken part</h3>"]
    if not clients:
        return "".join([*lines, f"<p>{'No name contains this.' if wanted else 'None has been heard of yet.'}</p>"])
    # Those that no event has named were in no round.
    silent = 0 if wanted else max(0, (state["expected_clients"] or 0) - len(clients))
    counts = sorted([0] * silent + [row["rounds"] for row in clients.values()])
    lines.append(
        f"<p>Of {played} rounds the clients took part in {counts[0]} (fewest), "
        f"{number(quantile_of(counts, 0.5))} (median), {counts[-1]} (most).</p>"
    )
    scored = any(row.get("accuracy") is not None for row in clients.values())
    private = any(row.get("epsilon") is not None for row in clients.values())
    order = sorted(clients, key=lambda name: (-_rank_oddity(clients[name]), name))
    rows = [
        [
            shown(name, LONGEST_NAME),
            f"{row['rounds']} of {played}".replace(" ", NBSP),
            _remarks_on(row),
            "–" if row["last_round"] is None else str(row["last_round"]),
            _show_clock(row["seen"]),
            *([number(row.get("epsilon"))] if private else []),
            *([percent(row.get("accuracy"))] if scored else []),
        ]
        for name, row in ((name, clients[name]) for name in order[:MOST_ROWS])
    ]
    if len(order) > MOST_ROWS:
        lines.append(
            f"<p>{MOST_ROWS} of {number(len(order))} are shown, those that stand out first; name others above.</p>"
        )
    more = ["epsilon"] * private + ["accuracy on its own records"] * scored
    return "".join([*lines, html_table(["client", "took part", "remarks", "last in round", "last seen", *more], rows)])


def _rank_oddity(row: dict[str, Any]) -> float:
    """How much a client stands out: whose update was refused just now, then by how often something was amiss."""
    often = row["quarantined"] + row["far"] + row["late"] + (row["failed"] is not None)
    return math.inf if row["is_quarantined"] else float(often)


def _remarks_on(row: dict[str, Any]) -> str:
    """What stands out about a client, as half sentences."""
    said = []
    if row["quarantined"]:
        said.append("quarantined" if row["is_quarantined"] else "was quarantined")
    if row["far"]:
        said.append(f"far beyond the others in {row['far']} round{'s' * (row['far'] > 1)}")
    if row["treated"]:
        said.append(shown(row["treated"], LONGEST_NAME))
    if row["late"]:
        said.append(f"late {row['late']} time{'s' * (row['late'] > 1)}")
    if row["failed"]:
        said.append(shown(row["failed"], LONGEST_REASON))
    return ", ".join(said)


def _show_quarantine(state: State, wanted: str) -> str:
    """A row for each client: in how many rounds, when last, and why then."""
    bad = {name: row for name, row in state["clients"].items() if row["quarantined"] and wanted.lower() in name.lower()}
    if not bad:
        return ""
    order = sorted(bad, key=lambda name: (-bad[name]["quarantined"], name))
    rows = [
        [
            shown(name, LONGEST_NAME),
            str(row["quarantined"]),
            str(row["quarantined_last"]),
            shown(row["reason"], LONGEST_REASON),
        ]
        for name, row in ((name, bad[name]) for name in order[:MOST_ROWS])
    ]
    cut = f" The first {MOST_ROWS} are shown." if len(order) > MOST_ROWS else ""
    return (
        f"<h3>Quarantined</h3><p>Updates of {len(bad)} client{'s' * (len(bad) > 1)} were refused.{cut}</p>"
        f"{html_table(['client', 'rounds', 'last round', 'reason then'], rows)}"
    )


def _show_rounds(state: State) -> str:
    played = state["played"][-MOST_ROWS:]
    if not played:
        return ""
    rows = [
        [
            str(row["round"]),
            percent(row["accuracy"]),
            number(row["loss"]),
            number(row.get("train_loss")),
            number(row.get("used")),
            number(row.get("refused")),
            *(size(row.get(key)) for key in ("bytes_up", "bytes_down")),
            show_seconds(row.get("seconds")),
            number(row.get("epsilon_max")),
        ]
        for row in reversed(played)
    ]
    heads = ["round", "accuracy", "loss", "training loss", "updates used", "quarantined"]
    heads += ["up", "down", "time", "epsilon"]
    return html_folded(f"The last {len(rows)} rounds, newest first", html_table(heads, rows))
