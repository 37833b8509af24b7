"""What a run folder shows: PNG plots and one self-contained HTML page; and several runs side by side.

Everything is computed from `metrics.jsonl`, with `resolved.yaml` and `split.json`, so that an interrupted run can be
reported as far as it came; once it has ended, `summary.json` adds the entries that only it has. MB are 10^6 bytes.
"""

from __future__ import annotations

import base64
import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft import metrics, plots
from fedpeft.errors import InputError

COLUMNS = {  # key of a table's row -> its head on the page
    "run": "run",
    "strategy": "strategy",
    "rounds": "rounds",
    "frozen_accuracy": "frozen model",
    "final_accuracy": "final accuracy",
    "best_accuracy": "best accuracy",
    "mb_up": "MB up",
    "mb_down": "MB down",
    "seconds": "seconds",
    "epsilon_max": "epsilon",
    "evaluated_on": "evaluated on",
}
PAGE_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } .wide { overflow-x: auto; } summary { cursor: pointer; }
img { display: block; max-width: 100%; background: #fff; border-radius: 6px; margin: 1rem 0; }
pre { background: var(--soft); padding: 1rem; border-radius: 6px; overflow-x: auto; }
.lead { font-size: 1.1rem; } .note { border-left: 3px solid #d55e00; padding-left: .8rem; }
"""


@dataclass(frozen=True)
class Run:
    """A run folder as read. `label` is its shortest name that no other run has, `split` null without split.json."""

    path: Path
    label: str
    events: list[metrics.Event]
    config: dict[str, Any]
    config_text: str
    summary: dict[str, Any]
    split: dict[str, Any] | None
    ended: bool

    def of(self, kind: str) -> list[metrics.Event]:
        return [event for event in self.events if event["event"] == kind]

    @property
    def scores(self) -> list[metrics.Event]:
        """`{round, accuracy, loss}` of what was evaluated on the same records: round 0 too, unless it was on others."""
        where, scores = metrics.evaluations(self.events)
        first = metrics.baseline(self.events)
        return [first, *scores] if first and first["evaluated_on"] == where else scores


def write(run: Path) -> list[Path]:
    """Draw the plots that the run has data for into `plots/`, and write `report.html`; the files written, page last.

    Raises:
        InputError: a file of the run is missing or broken; names it.
    """
    loaded = _load(run, run.resolve().name)
    folder = run / "plots"
    folder.mkdir(exist_ok=True)
    images: dict[str, bytes] = {}
    with plots.style():
        for name, draw in plots.PLOTS.items():
            figure = draw(loaded)
            if figure is None:
                (folder / f"{name}.png").unlink(missing_ok=True)  # left by a report of an earlier state of the run
                continue
            images[name] = plots.png(figure)
            (folder / f"{name}.png").write_bytes(images[name])
    page = run / "report.html"
    page.write_text(_run_page(loaded, images), encoding="utf-8")
    return [*(folder / f"{name}.png" for name in images), page]


def compare(runs: list[Path], out: Path) -> Path:
    """Write the page `out`: the runs in one table, their accuracies in one plot, the config keys they differ in.

    Raises:
        InputError: no run, the same run twice, or a file of a run is missing or broken; names it.
    """
    loaded = _load_all(runs)
    with plots.style():
        image = plots.png(plots.compared(loaded))
    rows = [_row(run) for run in loaded]
    cells = [[_cell(key, row[key]) for key in COLUMNS] for row in rows]
    body = ["<h2>Runs</h2>", html_table(list(COLUMNS.values()), cells)]
    where = sorted({row["evaluated_on"] for row in rows})
    if len(where) > 1:
        body.append(html_note(f"The accuracies are not all of the same records: {' and '.join(where)}."))
    body += [html_note(f"{run.label} has not ended.") for run in loaded if not run.ended]
    body += ["<h2>Accuracy</h2>", html_image("accuracy of all runs", image), "<h2>Config keys that differ</h2>"]
    different = _differences(loaded)
    body.append(html_table(["key", *(run.label for run in loaded)], different) if different else "<p>None.</p>")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html_page(f"{len(loaded)} runs", body), encoding="utf-8")
    return out


def table(runs: list[Path]) -> list[dict[str, Any]]:
    """One row a run with the keys of `COLUMNS`: numbers (accuracies in [0, 1]), null where there is none."""
    return [_row(run) for run in _load_all(runs)]


# Reading --------------------------------------------------------------------------------------------------------------


def _load_all(runs: list[Path]) -> list[Run]:
    if not runs:
        raise InputError("report: no run folder given.")
    return [_load(run, label) for run, label in zip(runs, _labels(runs), strict=True)]


def _labels(runs: list[Path]) -> list[str]:
    """Trailing parts of each path, as few as tell all of them apart."""
    parts = [run.resolve().parts for run in runs]
    for run, given in zip(runs, parts, strict=True):
        if parts.count(given) > 1:
            raise InputError(f"report: {run} is given more than once.")
    depth = 1
    while len({given[-depth:] for given in parts}) < len(parts):
        depth += 1
    return ["/".join(given[-depth:]) for given in parts]


def _load(path: Path, label: str) -> Run:
    if not path.is_dir():
        raise InputError(f"{path}: there is no such run folder.")
    config_text = _read(path / "resolved.yaml")
    config = _yaml(path / "resolved.yaml", config_text)
    events = metrics.read(path / "metrics.jsonl")
    ended = any(event["event"] == "end" for event in events)
    try:
        summary = metrics.summarise(events, config)
    except InputError as error:
        raise InputError(f"{path / 'metrics.jsonl'}: {error}") from error
    if ended:
        written = _json(path / "summary.json")
        summary |= {key: value for key, value in written.items() if key not in summary}
    split = _split(path / "split.json") if (path / "split.json").exists() else None
    return Run(path, label, events, config, config_text, summary, split, ended)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text.") from error


def _yaml(path: Path, text: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    try:
        tree: Any = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # OmegaConf and PyYAML errors share no base
        raise InputError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping of sections, found {type(tree).__name__}.")
    return tree


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not readable as JSON: {error}.") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(tree).__name__}.")
    return tree


def _split(path: Path) -> dict[str, Any]:
    """The split: `clients` maps names to indices, `histogram` (which may be missing) has `labels` and `counts`."""
    split = _json(path)
    clients, histogram = split.get("clients"), split.get("histogram")
    if not isinstance(clients, dict) or not clients:
        raise InputError(f"{path}: `clients` must map each client's name to its record indices.")
    if histogram:
        rows, width = histogram.get("counts", []), len(histogram.get("labels", []))
        if len(rows) != len(clients) or any(len(row) != width for row in rows):
            raise InputError(f"{path}: histogram.counts must have a row for each of the {len(clients)} clients and a "
                             f"column for each of the {width} labels.")
    return split


# Pages ----------------------------------------------------------------------------------------------------------------


def _row(run: Run) -> dict[str, Any]:
    summary = run.summary
    accuracy = {key: (summary[key] or {}).get("accuracy") for key in ("baseline", "final", "best")}
    return {
        "run": run.label,
        "strategy": summary["strategy"],
        "rounds": summary["rounds"],
        "frozen_accuracy": accuracy["baseline"],
        "final_accuracy": accuracy["final"],
        "best_accuracy": accuracy["best"],
        "mb_up": summary["bytes_up"] / plots.MB,
        "mb_down": summary["bytes_down"] / plots.MB,
        "seconds": summary["seconds"],
        "epsilon_max": summary["epsilon_max"],
        "evaluated_on": summary["evaluated_on"],
    }


def _cell(key: str, value: Any) -> str:
    return plots.percent(value) if key.endswith("accuracy") else plots.number(value)


def _run_page(run: Run, images: dict[str, bytes]) -> str:
    summary = run.summary
    body = [f'<p class="lead">{html.escape(_headline(run))}</p>']
    if not run.ended:
        body.append(html_note(f"This run has not ended; this is its state after round {summary['rounds']}."))
    facts = [[_words(key), _fact(key, value)] for key, value in summary.items()
             if not isinstance(value, list) and key not in ("privacy", "continual") and value not in (None, {})]
    facts.append(["quarantined updates", str(len(summary["quarantined"]))])
    body += ["<h2>Summary</h2>", html_table([], facts), "<h2>Plots</h2>"]
    body += [html_image(_words(name), image) for name, image in images.items()]
    if summary.get("privacy"):
        body += _privacy(summary["privacy"])
    if summary.get("continual"):
        body += _tasks(summary["continual"])
    if summary["quarantined"]:
        rows = [[str(entry[key]) for key in ("round", "client", "reason")] for entry in summary["quarantined"]]
        body += ["<h2>Quarantined updates</h2>", html_table(["round", "client", "reason"], rows)]
    body += ["<h2>Rounds</h2>", _rounds(run), "<h2>Config</h2>", f"<pre>{html.escape(run.config_text)}</pre>"]
    return html_page(f"{summary['strategy']}: {run.label}", body)


def _privacy(section: dict[str, Any]) -> list[str]:
    """What is claimed, what is outside of the claim, and the clients' ledgers."""
    body = ["<h2>Privacy</h2>", f"<p>{html.escape(section['claim']).replace(chr(10), '<br>')}</p>"]
    if section["outside"]:
        body += ["<p>Outside of the guarantee:</p>",
                 "<ul>", *(f"<li>{html.escape(line)}</li>" for line in section["outside"]), "</ul>"]
    keys = [key for key, value in section.items() if not isinstance(value, list | dict) and key != "claim"]
    body.append(html_table([], [[_words(key), plots.number(section[key])] for key in keys]))
    if section["clients"]:
        heads = list(next(iter(section["clients"].values())))
        rows = [[name, *(plots.number(row[key]) for key in heads)] for name, row in section["clients"].items()]
        body.append(html_table(["client", *map(_words, heads)], rows))
    return body


def _tasks(section: dict[str, Any]) -> list[str]:
    """Accuracy on every task after every task, and the metrics with the reasons for those that are undefined."""
    heads = ["after", *(f"{number}: {', '.join(names)}" for number, names in enumerate(section["tasks"]))]
    rows = [[f"task {number}", *(plots.percent(right / count) if count and task <= number else ""
                                 for task, (right, count) in enumerate(zip(row, section["count"], strict=True)))]
            for number, row in enumerate(section["right"])]
    body = [f"<h2>Tasks: body {html.escape(section['body'])}, head {html.escape(section['head'])}</h2>",
            html_table(heads, rows)]
    if section["metrics"]:
        values, reasons = section["metrics"]["values"], section["metrics"]["undefined"]
        body.append(html_table([], [[key, plots.percent(value) if value is not None else f"undefined: {reasons[key]}"]
                                    for key, value in values.items()]))
    return body


def _headline(run: Run) -> str:
    """The sentence that a reader takes away."""
    final, best, baseline = (run.summary[key] for key in ("final", "best", "baseline"))
    if final is None:
        return "Nothing has been evaluated yet."
    where = f"on the {run.summary['evaluated_on']} after round {final['round']}"
    if final["accuracy"] is None:
        return f"Loss {plots.number(final['loss'])} {where}."
    text = (f"Accuracy {plots.percent(final['accuracy'])} {where} "
            f"(best {plots.percent(best['accuracy'])} after round {best['round']})")
    if baseline is None or baseline["accuracy"] is None:
        return f"{text}."
    text = f"{text}; the frozen model has {plots.percent(baseline['accuracy'])}"
    if baseline["evaluated_on"] != run.summary["evaluated_on"]:
        return f"{text} on the {baseline['evaluated_on']}."
    return f"{text}: {100 * (final['accuracy'] - baseline['accuracy']):+.1f} points."


def _rounds(run: Run) -> str:
    scores = {score["round"]: score for score in run.scores}
    rows = []
    for event in run.of("round"):
        score = scores.get(event["round"], {})
        rows.append([
            str(event["round"]), str(len(event["clients"])), plots.number(event.get("train_loss")),
            plots.number(score.get("loss")), plots.percent(score.get("accuracy")),
            plots.number(event["bytes_up"] / plots.MB), plots.number(event["bytes_down"] / plots.MB),
            plots.number(event["seconds"]),
        ])
    heads = ["round", "updates used", "training loss", "loss", "accuracy", "MB up", "MB down", "seconds"]
    return f"<details><summary>{len(rows)} rounds</summary>{html_table(heads, rows)}</details>"


def _differences(runs: list[Run]) -> list[list[str]]:
    """Rows `key, value in each run` of the dotted config keys that are not the same in all runs."""
    flat = [_flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for tree in flat for key in tree)
    rows = [[key, *(tree.get(key, "–") for tree in flat)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) else {name: json.dumps(value)}
    return flat


def _fact(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_words(inner)} {_fact(inner, item)}" for inner, item in value.items())
    if key.startswith("bytes_"):
        return f"{plots.number(value)} ({plots.number(value / plots.MB)} MB)"
    return _cell(key, value)


def _words(key: str) -> str:
    return key.replace("_", " ")


def html_page(title: str, body: list[str]) -> str:
    title = html.escape(title)
    head = ['<meta charset="utf-8">', '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>", f"<style>{PAGE_STYLE}</style>"]
    top = ["<!doctype html>", '<html lang="en"><head>', *head, "</head><body>", f"<h1>{title}</h1>"]
    return "\n".join([*top, *body, "</body></html>"]) + "\n"


def html_table(heads: list[str], rows: list[list[str]]) -> str:
    """Heads and cells are plain text; they are escaped here."""
    lines = [_cells("th", heads)] if heads else []
    lines += [_cells("td", row) for row in rows]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _cells(tag: str, cells: list[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def html_note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def html_image(name: str, data: bytes) -> str:
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
