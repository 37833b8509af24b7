"""The table of a run says more than its numbers."""

from __future__ import annotations

from typing import Any

import pytest

from fedpeft.cli import console, deploy_tables

SUMMARY: dict[str, Any] = {
    "strategy": "fedsvd",
    "wrap": [],
    "clients": 4,
    "rounds": 3,
    "seed": 0,
    "evaluated_on": "server's test set",
    "baseline": {"accuracy": 0.1, "loss": 2.3},
    "best": {"accuracy": 0.6, "loss": 1.2},
    "final": {"accuracy": 0.5, "loss": 1.5},
    "bytes_up": 1_500_000,
    "bytes_down": 2_000_000,
    "seconds": 1.5,
    "trainable_parameters": 1234,
    "quarantined": [],
    "headline": "Half right.",
    "epsilon_max": None,
    "out": "runs/one",
}


def shown(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> str:
    monkeypatch.setattr(console.out, "width", 200)
    with console.out.capture() as captured:
        console.run_result({**SUMMARY, **changes})
    return captured.get()


@pytest.mark.parametrize("fitted", [None, {}])
def test_regressions_that_were_not_fitted_are_not_spoken_of(fitted, monkeypatch):
    text = shown(monkeypatch, baselines=fitted)
    assert "regression" not in text and "pooled" not in text
    assert "evaluated on server's test set\n" in text and "50.0%" in text
    assert "regression" not in shown(monkeypatch)


def test_regressions_stand_in_the_table_and_are_explained_below(monkeypatch):
    text = shown(monkeypatch, baselines={"frozen_logistic": 0.875, "pixels_or_words_logistic": 0.75})
    assert "evaluated on server's test set; the logistic regressions see all clients' data pooled\n" in text
    lines = text.splitlines()
    for name, accuracy in (("frozen features", "87.5%"), ("pixels or words", "75.0%")):
        assert accuracy in next(line for line in lines if f"{name} + logistic regression" in line)


ODD = ["run[lr=0.1]", "a[/b]", "[red]north[/red]", "memory_mb[i mod length]", "list[str] | None", "x:100:y", "[/INST]"]


@pytest.mark.parametrize("name", ODD)
def test_names_are_printed_as_they_stand_in_lines_and_in_tables(name, monkeypatch):
    """rich takes [a] for a style and :100: for a picture, and leaves out or refuses what it does not know."""
    monkeypatch.setattr(console.out, "width", 200)
    row = {"run": name, "strategy": "fedit"}
    summary = {**SUMMARY, "baselines": {"largest_class": 0.5, "largest_class_name": name}, "headline": f"{name}: so."}
    option = {"name": "a", "default": [], "allowed": name, "help": f"as {name}"}
    sequence = {"body": "ewc", "head": "linear", "tasks": [[name]], "right": [[1]], "count": [1], "metrics": None}
    with console.out.capture() as captured:
        console.comparison({"runs": [row], "report": name})
        console.run_result({**summary, "continual": sequence})
        console.entry({"name": "x", "table": "tta", "options": [option]})
        deploy_tables.sites({"running": True, "sites": [{"name": name, "status": "online"}]})
    assert captured.get().count(name) == 8
