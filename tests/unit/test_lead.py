"""The sentence that a reader meets first: what a score is compared with, how sure it is, what adapting gained."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fedpeft.record import lead, plots, run_folder
from support.run_folders import (
    SITES,
    SPLIT,
    a_round,
    first_line,
    page_of,
    plain,
    start,
    summary_of,
    terminal,
    written,
)

pytestmark = pytest.mark.usefixtures("unpainted")

# What a score is compared with ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("baselines", "best", "words"),
    [
        (
            {"frozen_logistic": 0.85, "pixels_or_words_logistic": 0.97},
            "pixels_or_words_logistic",
            "a logistic regression on raw inputs of the pooled data, 97.0 %: -3.1 points",
        ),
        (
            {"frozen_logistic": 0.85, "pixels_or_words_logistic": None, "pixels_or_words_logistic_reason": "no words"},
            "frozen_logistic",
            "a logistic regression on frozen features of the pooled data, 85.0 %: +8.9 points",
        ),
        (
            {"largest_class": 0.44, "largest_class_name": "numpy"},
            "largest_class",
            "always saying 'numpy', 44.0 %: +49.9 points",
        ),
        ({}, "frozen", "the frozen model, 20.0 %: +73.9 points"),
    ],
)
def test_the_lead_compares_with_the_best_that_does_not_federate(baselines, best, words, tmp_path):
    run = written(tmp_path / "run", plain([0.9, 0.939], baselines))
    summary = summary_of(run)
    assert summary["comparison"]["baseline"] == best
    for text in (summary["headline"], page_of(run)):
        assert f"Best without federation: {words}." in text and "no better than" not in text


@pytest.mark.parametrize(("accuracy", "said"), [(0.44, True), (0.46, True), (0.3, True), (0.47, False)])
def test_no_better_than_one_answer_is_said_where_it_is_true(accuracy, said, tmp_path, monkeypatch):
    """n = 400: a standard error of 2.5 points at 46 %."""
    run = written(tmp_path / "run", plain([accuracy], {"largest_class": 0.44, "largest_class_name": "<numpy>"}))
    assert summary_of(run)["comparison"]["no_better_than_constant"] == said
    for text in (summary_of(run)["headline"], page_of(run), terminal(run, monkeypatch)):
        assert ("That is no better than always saying '<numpy>' (44.0 %)." in text) == said


def test_models_on_other_records_are_not_subtracted(tmp_path):
    each = {name: {"accuracy": 0.5, "loss": 1.0, "num-examples": 20.0} for name in SITES}
    events = [
        start(SITES, personalised=True),
        *plain([])[1:2],
        {"event": "baselines", "frozen_logistic": 0.9, "largest_class": 0.3, "clients_largest_class": 0.55},
        {"event": "clients_evaluated", "round": 1, "clients": each},
        a_round(1, SITES, client_accuracy=0.5, client_loss=1.0),
    ]
    summary = summary_of(written(tmp_path / "run", events))
    assert summary["test_records"] == 60 and summary["standard_error"] == pytest.approx(math.sqrt(0.25 / 60))
    assert summary["comparison"]["baseline"] == "clients_largest_class"
    assert "no better than always saying the most frequent answer of each client (55.0 %)" in summary["headline"]
    assert "90.0 %" not in summary["headline"]


# How sure -------------------------------------------------------------------------------------------------------------


def test_records_error_and_the_mean_of_the_last_five_stand_beside_the_last(tmp_path, monkeypatch):
    run = written(tmp_path / "run", plain([0.1, 0.5, 0.6, 0.7, 0.8, 0.9], records=100))
    summary = summary_of(run)
    assert summary["test_records"] == 100 and summary["standard_error"] == pytest.approx(0.03)
    assert summary["last_rounds"] == {"rounds": [2, 3, 4, 5, 6], "accuracy": pytest.approx(0.7)}
    for text in (summary["headline"], first_line(page_of(run)), terminal(run, monkeypatch)):
        assert "90.0 % ± 3.0 (n = 100" in text and "mean of the last 5 evaluated rounds 70.0 %" in text
    assert "90.0% ± 3.0" in terminal(run, monkeypatch)


def test_a_language_model_leads_with_perplexity_and_its_tokens(tmp_path):
    events = plain([])
    events.append(a_round(1, SITES, accuracy=0.25, loss=2.5, test_records=40, test_tokens=12345, token_loss=2.0))
    causal = {"model.name": "tiny-llama", "model.task": "causal-lm", "data.source": "docstrings"}
    run = written(tmp_path / "run", events, causal)
    summary = summary_of(run)
    assert summary["perplexity"] == pytest.approx(math.exp(2.0)) and summary["test_tokens"] == 12345
    assert summary["standard_error"] is None  # next tokens depend on each other
    assert first_line(page_of(run)).startswith("Perplexity 7.389 over 12,345 tokens of 40 texts on the server test set")


def test_a_metric_that_the_last_round_does_not_define_is_said_to_be_none(tmp_path):
    """F1 was there in round 1 and not in round 2, nor at any client."""
    about = {
        "accuracy": {"words": "accuracy", "higher": True, "share": True},
        "f1": {"words": "F1, mean over classes", "higher": True, "share": True},
    }
    events = [start(SITES, metric="f1", measures=about), *plain([])[1:]]
    events.append(a_round(1, SITES, accuracy=0.5, loss=1.0, f1=0.4))
    events.append(a_round(2, SITES, accuracy=0.6, loss=1.0, f1=None))
    summary = summary_of(written(tmp_path / "run", events))
    assert summary["headline"].startswith("F1, mean over classes: not defined after the last round. Accuracy 60.0 %")


# Test-time adaptation -------------------------------------------------------------------------------------------------


def adapted() -> dict[str, Any]:
    rows = {SITES[0]: (0.9, 0.5, 0.6), SITES[1]: (0.8, 0.6, 0.6), SITES[2]: (0.7, 0.7, 0.5)}
    clients = {
        name: {
            "stream": "blur",
            "records": 20,
            "rows": 20,
            "accuracy": clean,
            "source_accuracy": before,
            "tta_accuracy": after,
        }
        for name, (clean, before, after) in rows.items()
    }
    found = {
        "method": "t3a",
        "severity": 3,
        "round": 2,
        "accuracy": 0.8,
        "source_accuracy": 0.6,
        "tta_accuracy": 0.5667,
        "clients": clients,
    }
    return {**found, **lead.gains(found)}


def test_a_test_time_run_leads_with_what_was_gained_and_for_whom(tmp_path, monkeypatch):
    run = written(tmp_path / "run", plain([0.5, 0.8]), extra={"tta": adapted()}, split=SPLIT)
    tta = summary_of(run)["tta"]
    assert (tta["better"], tta["same"], tta["worse"], tta["rows"]) == (1, 1, 1, 60)
    assert tta["gain"] == pytest.approx(-0.0333)
    wanted = (
        "On the clients' streams: as trained 60.0 %, with t3a 56.7 %: -3.3 points; 1 of 3 clients better, 1 the "
        "same, 1 worse (60 rows)."
    )
    page, shown = page_of(run), terminal(run, monkeypatch)
    assert first_line(page) == wanted and summary_of(run)["headline"].startswith(wanted) and shown.startswith(wanted)
    row = ["St. Mary", "blur", "20", "90.0 %", "50.0 %", "60.0 %", "+10.0 points"]
    assert "".join(f"<td>{cell}</td>" for cell in row) in page
    assert "-20.0" in next(line for line in shown.splitlines() if "<b>south</b>" in line)
    axes = plots.test_time(run_folder.load(run, "run")).axes[0]
    dots = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert dots == {"clean": [0.7, 0.8, 0.9], "as trained": [0.7, 0.6, 0.5], "with t3a": [0.5, 0.6, 0.6]}
    assert [label.get_text() for label in axes.get_yticklabels()] == [SITES[2], SITES[1], SITES[0]]
