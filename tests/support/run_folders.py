"""Run folders of made-up events, and what their summary, page, plots and terminal show."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedpeft import config as configs
from fedpeft.cli import console
from fedpeft.record import metrics, plots, report, run_folder

Event = dict[str, Any]


def start(clients: list[str], **more: Any) -> Event:
    return {
        "event": "start",
        "strategy": "fedit",
        "engine": "cohort",
        "seed": 0,
        "clients": len(clients),
        "rounds": 3,
        "trainable_parameters": 100,
        "personalised": False,
        **more,
    }


def a_round(number: int, clients: list[str], **more: Any) -> Event:
    return {
        "event": "round",
        "round": number,
        "clients": clients,
        "quarantined": {},
        "bytes_down": 10,
        "bytes_up": 10,
        "train_loss": 1.0,
        "seconds": 0.1,
        **more,
    }


def written(
    path: Path,
    events: list[Event],
    overrides: dict[str, Any] | None = None,
    extra: Event | None = None,
    split: Event | None = None,
) -> Path:
    """A run folder of these events, ended, as `finish` leaves it."""
    path.mkdir(parents=True)
    config = configs.load({}, {"run.rounds": 10, **(overrides or {})})
    (path / "resolved.yaml").write_text(configs.to_yaml(config))
    recorder = metrics.Recorder(path / "metrics.jsonl")
    for event in [*events, {"event": "end", "round": 3}]:
        recorder.record(event)
    found = metrics.read(path / "metrics.jsonl")
    summary = metrics.summarise(found, configs.to_tree(config), {"wrap": [], **(extra or {})})
    (path / "summary.json").write_text(json.dumps(summary))
    if split is not None:
        (path / "split.json").write_text(json.dumps(split))
    return path


def summary_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def page_of(run: Path) -> str:
    """The page's text, with its marks, without its images."""
    return html.unescape(re.sub(r"base64,[^\"]+", "", report.write(run)[-1].read_text()))


def first_line(page: str) -> str:
    found = re.search(r'<p class="lead">(.*?)</p>', page)
    assert found is not None
    return found.group(1)


def terminal(run: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(console.out, "width", 220)
    with console.out.capture() as captured:
        console.run_result({**summary_of(run), "out": str(run)})
    return captured.get()


SITES = ["St. Mary", "North & Sons", "<b>south</b>"]
COUNTS = {"labels": ["no", "yes"], "counts": [[31, 17], [12, 29], [3, 8]]}
SPLIT = {
    "fingerprint": "f" * 64,
    "clients": {name: list(range(sum(row))) for name, row in zip(SITES, COUNTS["counts"], strict=True)},
    "histogram": COUNTS,
}


def plain(scores: list[float], baselines: Event | None = None, records: int = 400) -> list[Event]:
    zero = {"event": "evaluate", "round": 0, "accuracy": 0.2, "loss": 2.0, "test_records": records}
    return [
        start(SITES),
        zero,
        {"event": "baselines", **(baselines or {})},
        *(
            a_round(number, SITES, accuracy=score, loss=1.0, test_records=records)
            for number, score in enumerate(scores, start=1)
        ),
    ]


CONFIG = "strategy:\n  name: {strategy}\ndata:\n  clients: {clients}\nprivacy:\n  unit: none\nrun:\n  seed: {seed}\n"


def make_run(
    path: Path,
    *,
    strategy: str = "fedit",
    clients: int = 4,
    rounds: int = 5,
    seed: int = 0,
    gain: float = 0.1,
    names: list[str] | None = None,
    labels: Sequence[str] = ("0", "1", "2"),
    used: int | None = None,
    bad: dict[int, tuple[str, str]] | None = None,
    personalised: bool = False,
    end: bool = True,
    extra: Event | None = None,
    epsilon: float | None = None,
) -> Path:
    """A run folder whose accuracy is 0.2 + gain * round; `used` clients a round, `bad` {round: (client, reason)}."""
    path.mkdir(parents=True)
    names = names or [f"client-{index}" for index in range(clients)]
    (path / "resolved.yaml").write_text(CONFIG.format(strategy=strategy, clients=len(names), seed=seed))
    recorder = metrics.Recorder(path / "metrics.jsonl")
    facts = {"strategy": strategy, "seed": seed, "rounds": rounds, "personalised": personalised}
    recorder.record(start(names, **facts, trainable_parameters=7818))
    recorder.record({"event": "evaluate", "round": 0, "accuracy": 0.2, "loss": 2.5})
    for number in range(1, rounds + 1):
        quarantined = dict([bad[number]] if bad and number in bad else [])
        for client, reason in quarantined.items():
            recorder.record({"event": "quarantine", "round": number, "client": client, "reason": reason})
        scores = {"accuracy": 0.2 + gain * number, "loss": 2.5 - 0.3 * number}
        if personalised:
            recorder.record(clients_evaluated(number, names))
            scores = {f"client_{key}": value for key, value in scores.items()}
        spent = {"epsilon_max": epsilon * number} if epsilon else {}
        recorder.record(played(number, names[:used], quarantined, **scores, **spent))
    if end:
        recorder.record({"event": "end", "round": rounds})
        summary = metrics.summarise(metrics.read(path / "metrics.jsonl"), {}, extra)
        (path / "summary.json").write_text(json.dumps(summary))
    (path / "split.json").write_text(json.dumps(split_of(names, labels)))
    return path


def clients_evaluated(number: int, names: list[str]) -> Event:
    """Each client's accuracy is 0.2 + 0.1 * its place."""
    scores = {
        name: {"accuracy": 0.2 + 0.1 * index, "loss": 1.0, "num-examples": 5.0} for index, name in enumerate(names)
    }
    return {"event": "clients_evaluated", "round": number, "clients": scores}


def played(number: int, asked: list[str], quarantined: dict[str, str], **more: float) -> Event:
    """The event of a round in which those asked took part, but for the quarantined."""
    return a_round(
        number,
        [name for name in asked if name not in quarantined],
        quarantined=quarantined,
        bytes_down=400_000,
        bytes_up=250_000,
        train_loss=2.4 - 0.3 * number,
        seconds=0.5,
        **more,
    )


def split_of(names: list[str], labels: Sequence[str]) -> Event:
    """Client i has 2 i + j records of label j."""
    counts = [[2 * index + column for column in range(len(labels))] for index in range(len(names))]
    return {
        "clients": {name: list(range(sum(row))) for name, row in zip(names, counts, strict=True)},
        "histogram": {"labels": list(labels), "counts": counts},
    }


def drawn(run: Path) -> dict[str, Any]:
    """Name -> figure of all that a run has to show."""
    loaded = run_folder.load(run, "run")
    return {name: figure for name, draw in plots.PLOTS.items() if (figure := draw(loaded)) is not None}


def line(axes: Any, label: str) -> Any:
    """The first line whose label starts so."""
    return next(item for item in axes.lines if item.get_label().startswith(label))
