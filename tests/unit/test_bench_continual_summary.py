"""The continual benchmark's summary by hand: means, paired differences, and the sentence that they allow."""

from __future__ import annotations

from statistics import stdev

import pytest

from fedpeft.continual import matrix
from fedpeft.simulations.benchmarks import continual_report


def row(body, head, seed, last, bytes_kept=100, **more):
    right = [[9, 0], [last, 8]]
    found = matrix.summary(right, [10, 10])
    stored = {"raw": 0, "statistics": 0, "bases": 0, "adapters": bytes_kept, "numbers": 0}
    entry = {"parameters": 5, "stored_bytes": stored, "passes_per_prediction": 1.0, "train_cpu_s": 2.0}
    return {
        "stream": "s",
        "body": body,
        "head": head,
        "seed": seed,
        "refused": None,
        "right": right,
        "tests": [10, 10],
        "metrics": found["values"],
        "undefined": found["undefined"],
        "ledger": [entry, entry],
        "head_bytes": 50,
        "resumed": False,
        "manifest_sha256": "f" * 64,
        "body_options": {},
        "head_options": {},
        **more,
    }


def test_means_and_paired_differences_by_hand():
    rows = [
        row("frozen", "lda", 0, 8),
        row("frozen", "lda", 1, 6),
        row("frozen", "ranpac", 0, 5),
        row("frozen", "ranpac", 1, 5),
        row("x", "linear", 0, 9),
        row("x", "linear", 1, 9),
        {"body": "y", "head": "lda", "seed": 0, "refused": "no"},
    ]
    lda, ranpac, x, y = found = continual_report.summary(rows)
    assert lda["metrics"]["acc_micro"] == 0.75 and lda["sd"]["acc_micro"] == pytest.approx(stdev([0.8, 0.7]))
    assert lda["metrics"]["forgetting_chaudhry"] == pytest.approx(0.2) and lda["difference"] == 0
    assert x["difference"] == pytest.approx(0.1) and x["difference_error"] == pytest.approx(0.05)
    assert ranpac["difference"] == pytest.approx(-0.1) and continual_report.reference(found) == lda
    assert (x["bytes"], x["passes"], x["train_cpu_s"], x["parameters"]) == (150, 1.0, 4.0, 5)
    assert y["refused"] == "no" and y["seeds"] == 0
    assert continual_report.line(x, ["acc_micro"]) == ["x", "linear", "+10.0 ± 5.0", "0.1", "85.0 ± 0.0", "1", "4.0"]


def test_the_sentence_says_what_beats_the_frozen_model():
    fixed = [row("frozen", "lda", 0, 8), row("frozen", "lda", 1, 6)]
    unclear = continual_report.summary([*fixed, row("x", "linear", 0, 9)])
    assert "standard errors: nothing." in continual_report.sentence(unclear), "one seed decides nothing"
    equal = continual_report.summary([*fixed, row("x", "linear", 0, 9), row("x", "linear", 1, 5)])
    assert "standard errors: nothing." in continual_report.sentence(equal)
    clear = continual_report.summary([*fixed, row("x", "linear", 0, 10), row("x", "linear", 1, 9)])
    assert continual_report.sentence(clear).endswith("two standard errors: x with linear.")
    assert "Not run: frozen" in continual_report.sentence(continual_report.summary([row("x", "lda", 0, 1)]))
