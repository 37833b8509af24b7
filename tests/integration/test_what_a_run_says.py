"""Real, tiny runs say of themselves what other means compute: the numbers behind the headline."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fedpeft import config as configs
from fedpeft.continual.heads.ncm import NCM
from fedpeft.record import report
from fedpeft.run.world import load_world

WRITE = report.write


def events_of(run, kind):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == kind]


def test_the_frozen_model_with_the_same_head_is_that_of_the_pooled_records(go, tmp_path):
    """The head's sums of all clients together, fitted on a frozen model by hand; and the head that answers."""
    summary = go("run", "continual", {"continual.head": "ncm", "continual.head_options": {}, "run.baselines": True})
    run = tmp_path / "run"
    here = load_world(configs.load(run / "resolved.yaml"), run)
    here.local.model.write(here.start.adapter)
    x, _, y = (torch.cat(parts) for parts in zip(*here.local.model.features(here.train_encoded), strict=True))
    z, _, wanted = (torch.cat(parts) for parts in zip(*here.local.model.features(here.test_encoded), strict=True))
    classes = len(here.train.label_names)
    head = NCM(classes, here.local.model.base.width, 0)
    head.update(head.statistics(x, y), list(range(classes)))
    right = float((head.scores(z, None).argmax(-1) == wanted).double().mean())
    assert summary["sequence"]["frozen_head_accuracy"] == pytest.approx(right, abs=2 / len(wanted))
    assert 0.3 < right < 1.0  # more than one answer for all
    assert summary["final"]["accuracy"] == summary["continual"]["metrics"]["values"]["acc_micro"]
    assert summary["sequence"]["forgetting"] == pytest.approx(
        summary["continual"]["metrics"]["values"]["forgetting_chaudhry"]
    )
    assert summary["best"] is None and summary["test_records"] == len(wanted)
    sizes = [event["classes"] for event in events_of(run, "round")]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] == classes


def test_the_largest_class_is_that_of_the_test_set_and_stands_without_other_baselines(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write", WRITE)
    summary = tiny("run", {"data.holdout": 0.3})
    run = tmp_path / "run"
    here = load_world(configs.load(run / "resolved.yaml"), run)
    counts = np.bincount(here.test.labels)
    assert summary["baselines"]["largest_class"] == counts.max() / counts.sum()
    assert summary["baselines"]["largest_class_name"] == here.test.label_names[int(counts.argmax())]
    own = [np.bincount(held.labels.numpy()) for held in here.local.holdout.values()]
    assert summary["baselines"]["clients_largest_class"] == sum(map(max, own)) / sum(map(sum, own))
    assert summary["test_records"] == counts.sum()
    p = summary["final"]["accuracy"]
    assert summary["standard_error"] == pytest.approx((p * (1 - p) / counts.sum()) ** 0.5)
    assert f"(n = {counts.sum()}" in (run / "report.html").read_text()
    norms = events_of(run, "round")[0]["update_norms"]
    assert list(norms) == [f"client-00{index}" for index in range(4)] and min(norms.values()) > 0


def test_a_private_run_tells_no_label_counts_and_that_seeded_noise_is_not_private(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write", WRITE)
    summary = tiny(
        "run",
        {
            "privacy.unit": "client",
            "privacy.noise_multiplier": 1.0,
            "privacy.accountant": "rdp",
            "strategy.weighting": "uniform",
            "run.rounds": 1,
        },
    )
    assert summary["headline"].startswith(
        f"Epsilon {summary['epsilon_max']:.4g} at delta 1e-05 for one client (seeded: not private). Accuracy "
    )
    assert "clients by label" not in (tmp_path / "run" / "report.html").read_text()
    (event,) = events_of(tmp_path / "run", "round")
    assert "update_norms" not in event and "far_updates" not in event  # the guarantee does not cover them
