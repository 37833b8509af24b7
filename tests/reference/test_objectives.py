"""Objectives that are no class of a whole record: each sample's loss and gradient is its own, in every engine."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch

from fedpeft.clients import train
from fedpeft.clients.inputs import draw_records, find_usable, verify_gradients
from fedpeft.clients.train import evaluate, per_sample_loss
from fedpeft.run.audit.neighbours import neighbours, remove_labels
from support import objectives
from support import small_models as small
from support.cohort_jobs import ADAMW, ALL, FEW, WIDE, Job, check, private
from support.per_sample import as_double, compare, without_dropout

NAMES = list(objectives.CASES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    kinds = {case.kind for case in objectives.CASES.values()}
    return {kind: small.save(kind, tmp_path_factory.mktemp("models") / kind) for kind in kinds}


@pytest.fixture
def model(request, folders):
    """In float64, its factors and head drawn, without dropout."""
    made = as_double(objectives.adapted(request.param, folders[objectives.CASES[request.param].kind]))
    made.write(small.randomised(made, scale=0.3).map(lambda value: value.double()))
    without_dropout(made)
    return made


each = pytest.mark.parametrize("model", NAMES, indirect=True)


@each
def test_a_loss_is_the_definitions_and_a_record_is_alone(model):
    name = model.base.task
    data = objectives.records(name, 7)
    with torch.no_grad():
        together = per_sample_loss(model, *data.batch(np.arange(7)))
        for index in range(7):
            inputs, labels = data.batch(np.array([index]))
            scores = model.logits(inputs)
            assert float(together[index]) == pytest.approx(
                objectives.CASES[name].loss(scores[0], labels[0]), rel=1e-9
            ), index
    assert len({round(float(loss), 6) for loss in together}) == 7
    assert evaluate(model, data)["loss"] == pytest.approx(float(together.mean()), rel=1e-9)


@each
def test_gradients_of_samples_are_autograds(model):
    compare(model, model.train_roles(("A", "B", "head")), objectives.records(model.base.task, 5))


@each
def test_what_is_drawn_for_the_check_has_the_records_form_and_passes(model):
    data = objectives.records(model.base.task, 4)
    made = draw_records(model, data, 12)
    assert made.labels.dtype == data.labels.dtype and made.labels.ndim == data.labels.ndim
    assert len(find_usable(model, made)) == len(made)
    verify_gradients(model, data, ("A", "B", "head"), 12)


@each
@pytest.mark.parametrize("sigma", [None, 1.5], ids=["plain", "private"])
def test_a_cohort_trains_as_clients_one_by_one(model, sigma):
    jobs = [
        Job(
            dict(small.randomised(model, seed=10 + k, scale=0.3).tensors),
            objectives.records(model.base.task, size, k),
            seed=100 + k,
            **({} if sigma is None else {"private": private(sigma, 0.5, k)}),
        )
        for k, size in enumerate((8, 3, 5))
    ]
    check(model, jobs, ALL, ADAMW, (WIDE, FEW), 1e-9)


@each
def test_a_record_without_labels_teaches_nothing_and_neighbours_are_of_its_form(model):
    data = objectives.records(model.base.task, 6)
    silent = remove_labels(data)
    loss = per_sample_loss(model, *silent.batch(np.arange(6)))
    assert loss.tolist() == [0.0] * 6
    parameters = model.train_roles(("A", "B", "head"))
    found = torch.autograd.grad(loss.sum(), list(parameters.values()), allow_unused=True)
    assert all(value is None or not value.any() for value in found)
    labels = [record.labels for _, more in neighbours(model, data, 3) for record in more]
    assert all(value.dtype == data.labels.dtype and value.shape[0] in (1, 2, 4) for value in labels)


@each
def test_an_evaluation_counts_the_scores_of_tokens_where_tokens_have_some(model, monkeypatch):
    headed, each = model.base.objective.headed, model.base.backbone.config.vocab_size
    few = not headed or model.base.task == "token-classification"
    monkeypatch.setattr(train, "SCORES", 7 * (model.base.classes if headed else each))
    assert train.scored_tokens(model, 100) == (7 if few else 100) and train.scored_tokens(model, 3) == 3


@each
def test_a_record_that_the_model_cannot_take_is_left_out(model):
    data = objectives.records(model.base.task, 3)
    labels = data.labels.clone()
    labels[1, 0] = float("nan") if labels.is_floating_point() else 10**6
    part, looks = type(data)(data.inputs, labels), WeakKeyDictionary()
    assert find_usable(model, part).rows.tolist() == [0, 2]
    assert find_usable(model, part.view(np.array([1, 2])), looks).rows.tolist() == [2]
    asked = []
    inputs_of = part.stored.inputs_of
    part.stored.inputs_of = lambda rows: asked.extend(rows.tolist()) or inputs_of(rows)
    assert find_usable(model, part.view(np.array([2, 1, 0, 2])), looks).rows.tolist() == [2, 0, 2]
    assert find_usable(model, part, looks).rows.tolist() == [0, 2]
    assert asked == [0]  # each record is looked at once
