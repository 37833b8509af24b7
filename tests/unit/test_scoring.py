"""Numbers that a private client may release: of one form whatever its records are, and none that one record spoils."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedpeft.clients import scoring
from fedpeft.clients.cohort.engine import Job, train_cohort
from fedpeft.clients.train import Private, train
from fedpeft.config import ClientConfig
from fedpeft.data.encode import Encoded
from fedpeft.errors import RunError
from fedpeft.privacy.ledger import Budget
from fedpeft.privacy.noise import Seeded
from fedpeft.privacy.plan import Plan
from fedpeft.tta.play import calibration_error
from support import hostile
from support import small_models as small
from support.hostile import Site

pytestmark = pytest.mark.usefixtures("flower_run")
EACH_STEP = ClientConfig(optimizer="sgd", lr=0.1, local_steps=2, local_epochs=None, batch_size=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.adapted(small.save("vit", tmp_path_factory.mktemp("models") / "vit"), "vit")


def scored(model, folder, held, unit="sample", **sections):
    privacy = {"release_metrics": True, **({} if unit == "sample" else {"noise_multiplier": None, "records": None})}
    site = Site("vit", model, folder, "fedit", hostile.data("vit", None), held, privacy=privacy, **sections)
    site.config.privacy.unit = unit
    site.local.guard.private = unit == "sample"
    return site.local.evaluate("a", *site.request("evaluate", 1))


NONE = hostile.data("vit", None).view(np.arange(0))
UNUSABLE = {
    "none": NONE,
    "one that is not finite": hostile.data("vit", "nan", 1),
    "one of a strange class": hostile.data("vit", "label", 1),
}


@pytest.mark.parametrize("held", UNUSABLE)
@pytest.mark.parametrize("sections", [{}, {"tta": {"method": "tent"}}])
def test_a_private_client_without_records_to_score_answers_in_the_form_of_one_with(held, sections, model, tmp_path):
    full = scored(model, tmp_path / "full", hostile.data("vit", None), **sections)
    empty = scored(model, tmp_path / "empty", UNUSABLE[held], **sections)
    assert list(full) == list(empty) and all(type(value) is float for value in (*full.values(), *empty.values()))
    assert full["num-examples"] == 12 and 0 <= full["accuracy"] <= 1 and math.isfinite(full["loss"])
    assert empty.pop("num-examples") == 0 and all(map(math.isnan, empty.values()))


def test_a_private_client_whose_method_fails_by_its_records_says_nothing_of_it(model, tmp_path, monkeypatch, caplog):
    def fails(*_):
        raise ValueError("the source classes are exactly balanced")

    monkeypatch.setattr(scoring.test_time, "score", fails)
    found = scored(model, tmp_path / "private", hostile.data("vit", None), tta={"method": "tent"})
    assert math.isnan(found["accuracy"]) and math.isnan(found["tta_accuracy"])
    assert "exactly balanced" in caplog.text  # in the site's own log
    with pytest.raises(ValueError, match="exactly balanced"):
        scored(model, tmp_path / "plain", hostile.data("vit", None), "none", tta={"method": "tent"})


def test_a_plain_client_says_that_it_has_no_records(model, tmp_path):
    with pytest.raises(RunError, match="a has no records here"):
        scored(model, tmp_path, NONE, "none")


def test_a_disk_that_is_full_is_not_a_score(model, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scoring, "evaluate", full)
    with pytest.raises(OSError, match="No space left"):
        scored(model, tmp_path, hostile.data("vit", None))


# Training loss -------------------------------------------------------------------------------------------------------


def loss_of(model, data, engine, rate=1.0):
    private = Private(Plan(rate, 4.0, 1.0, 1.0, 2, Budget(1.0, 1e-5, "rdp")), Seeded(3, "loss"))
    start = small.randomised(model)
    model.write(start)
    if engine == "alone":
        return train(model, data, ["A", "B", "head"], EACH_STEP, 0, private=private)[1]
    job = Job(start.tensors, data, 0, private=private)
    return train_cohort(model, [job], ["A", "B", "head"], EACH_STEP, 4096)[0].loss


@pytest.mark.parametrize("engine", ["alone", "cohort"])
def test_one_record_without_a_finite_loss_does_not_take_the_loss_of_the_others(engine, model):
    plain = hostile.data("vit", None)
    spoiled = Encoded({"pixel_values": plain.inputs["pixel_values"].clone()}, plain.labels)
    spoiled.inputs["pixel_values"][-1] = torch.nan
    others = loss_of(model, plain.view(np.arange(11)), engine)
    assert math.isfinite(others) and others != loss_of(model, plain, engine)
    first = loss_of(model, spoiled, engine)
    assert first == pytest.approx(others, abs=0.2) and math.isfinite(first)


@pytest.mark.parametrize("engine", ["alone", "cohort"])
def test_steps_that_draw_nobody_have_no_loss(engine, model):
    assert math.isnan(loss_of(model, hostile.data("vit", None), engine, rate=0.0))


def test_a_client_that_drew_nobody_trains_and_says_zero(model, tmp_path):
    site = Site("vit", model, tmp_path, "fedit", NONE, NONE, privacy={"release_metrics": True})
    update, metrics = site.local.train("a", *site.request("train", 1))
    assert metrics == {"num-examples": 0.0, "train_loss": 0.0} and len(site.entries()) == 1
    assert any(not torch.equal(value, site.local.initial[key]) for key, value in update.tensors.items())


def test_a_confidence_that_is_not_a_number_is_none():
    right = torch.tensor([1.0, 0.0])
    assert calibration_error(torch.tensor([0.9, torch.nan]), right) == pytest.approx(0.05)
    assert calibration_error(torch.tensor([0.9, 0.0]), right) == pytest.approx(0.05)
