"""The table of a run says more than its numbers."""

from __future__ import annotations

from typing import Any

import pytest

from fedpeft.cli import console

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
