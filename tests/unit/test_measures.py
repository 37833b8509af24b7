"""Measures are torchmetrics' and scikit-learn's numbers, whatever the batches; over clients they are a short table."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn

from fedpeft import config as configs
from fedpeft.clients import scoring
from fedpeft.clients.policy import METRICS, Policy
from fedpeft.errors import InputError
from fedpeft.objectives.base import IGNORE, load_objective
from fedpeft.objectives.measures import Measure, Tally
from fedpeft.record import lead, measured, report
from fedpeft.simulations.run import simulate
from support import hostile
from support import small_models as small
from support.hostile import Site
from support.methods import TINY


def random_case(seed, records=120, classes=5, missing=()):
    """Scores that know something of the labels, and the labels; `missing` classes have no record."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.tensor([label for label in range(classes) if label not in missing])
    labels = allowed[torch.randint(len(allowed), (records,), generator=generator)]
    scores = torch.randn(records, classes, generator=generator)
    scores[torch.arange(records), labels] += 1.0
    return scores, labels


def measured_of(scores, labels, batch=37, task="image-classification"):
    tally = Tally(load_objective(task))
    for part, wanted in zip(scores.split(batch), labels.split(batch), strict=True):
        tally.add(part, wanted)
    return tally.metrics(), tally


@pytest.mark.parametrize("missing", [(), (1,), (0, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_measures_of_classes_are_those_of_scikit_learn(seed, missing):
    scores, labels = random_case(seed, missing=missing)
    found, tally = measured_of(scores, labels)
    shares, answers = scores.softmax(1).numpy(), scores.argmax(1).numpy()
    truth, present = labels.numpy(), [label for label in range(5) if label not in missing]
    one_hot = np.eye(5, dtype=int)[truth]
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(truth, answers))
    assert found["f1"] == pytest.approx(sklearn.f1_score(truth, answers, average="macro"))
    wanted = np.mean([sklearn.roc_auc_score(one_hot[:, label], shares[:, label]) for label in present])
    assert found["auroc"] == pytest.approx(wanted)
    wanted = np.mean([sklearn.average_precision_score(one_hot[:, label], shares[:, label]) for label in present])
    assert found["average_precision"] == pytest.approx(wanted)
    of_classes = tally.by_class([*"abcde"])
    assert of_classes["confusion"] == sklearn.confusion_matrix(truth, answers, labels=range(5)).tolist()
    each = sklearn.f1_score(truth, answers, average=None, labels=range(5), zero_division=0)
    assert of_classes["f1"] == pytest.approx(each.tolist())
    assert found["ece"] == pytest.approx(calibration_error(shares, truth), abs=1e-6)


def calibration_error(shares, truth):
    """The slow way: in each of 15 bins, how far the mean confidence is from the share of right answers."""
    confidence, right = shares.max(1), shares.argmax(1) == truth
    total = 0.0
    for low in np.linspace(0, 1, 16)[:-1]:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            total += abs(confidence[inside].mean() - right[inside].mean()) * inside.mean()
    return total


def test_scores_that_are_no_numbers_have_no_curves():
    scores, labels = random_case(0)
    found, _ = measured_of(scores * math.nan, labels)
    assert not {"auroc", "average_precision", "ece"} & set(found)


def test_measures_do_not_depend_on_the_batches():
    scores, labels = random_case(5)
    whole, _ = measured_of(scores, labels, batch=120)
    assert measured_of(scores, labels, batch=7)[0] == pytest.approx(whole)


def test_one_class_alone_has_no_curve_and_no_number():
    found, _ = measured_of(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 0]))
    assert "auroc" not in found and "average_precision" not in found and found["f1"] == 1.0


def test_measures_of_a_language_model_follow_from_sums_alone():
    generator = torch.Generator().manual_seed(1)
    scores, targets = torch.randn(6, 9, 11, generator=generator), torch.randint(11, (6, 9), generator=generator)
    targets[0, 4:] = IGNORE
    scores[2] = 9 * torch.eye(11)[targets[2]]  # one text that greedy generation says
    scores[0, :4] = 9 * torch.eye(11)[targets[0, :4]]  # another, up to where nothing is to be predicted
    found, tally = measured_of(scores, targets, batch=4, task="causal-lm")
    from torchmetrics.text import Perplexity

    wanted = Perplexity(ignore_index=IGNORE)(scores, targets)
    assert found["perplexity"] == pytest.approx(float(wanted), rel=1e-5)
    assert found["exact_match"] == pytest.approx(2 / 6)
    assert not tally.collected and tally.by_class([]) == {}


def test_over_clients_stand_the_worst_and_the_tail_in_the_direction_of_worse():
    each = {f"c{number}": number / 10 for number in range(11)}
    higher = measured.over_clients(each, 0.5, higher=True)
    assert (higher["worst_client"], higher["worst"], higher["quantile_10"]) == ("c0", 0.0, pytest.approx(0.1))
    lower = measured.over_clients(each, 0.5, higher=False)
    assert (lower["worst_client"], lower["worst"], lower["quantile_10"]) == ("c10", 1.0, pytest.approx(0.9))
    assert higher["mean"] == 0.5 and higher["spread"] == pytest.approx(math.sqrt(0.1))


def test_the_mean_over_clients_is_by_records_of_those_that_have_the_measure():
    clients = {
        "a": {"accuracy": 1.0, "auroc": 0.25, "num-examples": 10.0},
        "b": {"accuracy": 0.0, "num-examples": 30.0},
    }
    events = [
        {"event": "start", "measures": {name: Measure(name).tree() for name in ("accuracy", "auroc")}},
        {"event": "clients_evaluated", "round": 1, "clients": clients},
    ]
    rows = measured.table(events, "client_", 1)
    assert [rows[name]["clients"]["mean"] for name in ("accuracy", "auroc")] == [0.25, 0.25]
    assert [rows[name]["clients"]["clients"] for name in ("accuracy", "auroc")] == [2, 1]


# In a run -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with records held out at its clients, and a headline of its own."""
    folder = tmp_path_factory.mktemp("measures") / "run"
    simulate({}, {**TINY, "data.holdout": 0.4, "run.metric": "f1"}, folder)
    return folder


def test_a_run_says_its_measures_and_those_of_its_clients(run):
    summary = json.loads((run / "summary.json").read_text())
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rounds = [event for event in events if event["event"] == "round"]
    rows = summary["measures"]
    assert set(rows) == {"accuracy", "loss", "f1", "auroc", "average_precision", "ece"}
    for name, row in rows.items():
        assert row["final"] == rounds[-1][name] and row["frozen"] is not None
        assert row["best"] == (max if row["higher"] else min)(event[name] for event in rounds)
    clients = [event for event in events if event["event"] == "clients_evaluated"][-1]["clients"]
    values = [row["f1"] for row in clients.values()]
    assert rows["f1"]["clients"]["worst"] == min(values)
    assert rows["f1"]["clients"]["mean"] == rounds[-1]["client_f1"] == pytest.approx(sum(values) / len(values))
    matrix = np.array(summary["by_class"]["confusion"])
    assert matrix.trace() / matrix.sum() == pytest.approx(rounds[-1]["accuracy"])
    assert matrix.sum() == summary["test_records"] and "by_class" not in rounds[0]
    assert np.mean(summary["by_class"]["f1"]) <= rows["f1"]["final"] + 1e-9  # classes that nobody has count 0 here


def test_the_headline_and_the_report_say_them(run):
    summary = json.loads((run / "summary.json").read_text())
    row = summary["measures"]["f1"]
    first = lead.sentences(summary, {})[0]
    assert first.startswith(f"F1, mean over classes: {measured.show_measure(row, row['final'])} on the server test set")
    assert summary["headline"].startswith(first)
    report.write(run)
    page = (run / "report.html").read_text()
    for text in ("worst client", "10 % quantile", "spread", "expected calibration error, 15 bins (less is better)"):
        assert text in page
    assert f"({row['clients']['worst_client']})" in page and "answered 3" in page


def test_a_metric_that_the_objective_does_not_have_is_refused():
    with pytest.raises(InputError, match=r"run\.metric \(of causal-lm\): 'f1' is not known.*perplexity"):
        configs.load({}, {"model.task": "causal-lm", "model.name": "tiny-llama", "run.metric": "f1"})
    with pytest.raises(InputError, match=r"Did you mean 'auroc'\?"):
        configs.load({}, {"run.metric": "auroc1"})
    with pytest.raises(InputError, match=r"run\.metric=f1: with continual\.body=sequential"):
        configs.load({}, {"run.metric": "f1", "continual.body": "sequential", "continual.tasks": 2})
    with pytest.raises(InputError, match=r"run\.metric \(of regression\): 'accuracy' is not.*loss, rmse, mae, r2"):
        configs.load("regression", {"run.metric": "accuracy"})


# What leaves a client -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("flower_run")
@pytest.mark.parametrize(
    ("unit", "listed", "sent"),
    [
        ("none", None, {"f1", "auroc", "average_precision", "ece"}),
        ("none", [], set()),
        ("none", ["auroc", "rmse"], {"auroc"}),
        ("sample", None, set()),
        ("sample", ["f1"], set()),  # no accounting covers it, whatever a policy says
    ],
)
def test_measures_leave_by_name_and_no_private_client(unit, listed, sent, tmp_path, monkeypatch):
    model = small.adapted(small.save("vit", tmp_path / "vit"), "vit")
    privacy = {"release_metrics": True, **({} if unit == "sample" else {"noise_multiplier": None, "records": None})}
    site = Site(
        "vit", model, tmp_path / "site", "fedit", hostile.data("vit", None), hostile.data("vit", None), privacy=privacy
    )
    site.config.privacy.unit = unit
    site.local.guard.private = unit == "sample"
    if listed is not None:
        monkeypatch.setattr(site.local.guard, "policy", lambda client: Policy(metrics=[*METRICS, *listed]))
        monkeypatch.setattr(site.local.guard, "admit", lambda *_: None)
    found = site.local.evaluate("a", *site.request("evaluate", 1))
    assert set(found) == {"accuracy", "loss", "num-examples"} | sent
    assert set(scoring.names(site.config)) == {"accuracy", "loss", "num-examples"}


def test_measures_of_numbers_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(50, 2, generator=generator)
    answers = truth + torch.randn(50, 2, generator=generator)
    found, _ = measured_of(answers, truth, batch=17, task="regression")
    assert found["rmse"] == pytest.approx(sklearn.mean_squared_error(truth, answers) ** 0.5)
    assert found["mae"] == pytest.approx(sklearn.mean_absolute_error(truth, answers))
    assert found["r2"] == pytest.approx(sklearn.r2_score(truth, answers))
    assert found["loss"] == pytest.approx(found["rmse"] ** 2) and "accuracy" not in found
    assert "r2" not in measured_of(answers, torch.ones(50, 2), task="regression")[0]


def test_measures_of_several_labels_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 2, (60, 3), generator=generator).float()
    truth[:, 2] = 0  # a label that no record has
    scores = torch.randn(60, 3, generator=generator) + truth
    found, _ = measured_of(scores, truth, batch=17, task="multi-label")
    wanted, answers, shares = truth.numpy(), (scores > 0).numpy(), scores.sigmoid().numpy()
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(wanted, answers))
    assert found["f1_micro"] == pytest.approx(sklearn.f1_score(wanted, answers, average="micro"))
    assert found["f1"] == pytest.approx(sklearn.f1_score(wanted, answers, average="macro", zero_division=0))
    assert found["auroc"] == pytest.approx(sklearn.roc_auc_score(wanted[:, :2], shares[:, :2]))
    assert found["average_precision"] == pytest.approx(sklearn.average_precision_score(wanted[:, :2], shares[:, :2]))
