"""Runs of objectives that are no class of a whole record, from a file to what stock libraries make of it."""

from __future__ import annotations

import json

import numpy as np
import peft
import pytest
import torch
import transformers

from fedpeft import config as configs
from fedpeft.errors import InputError
from fedpeft.objectives.base import load_objective
from fedpeft.run.export import export
from fedpeft.run.world import load_world
from support import objectives
from support import small_models as small


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: small.save(kind, root / kind) for kind in {case.kind for case in objectives.CASES.values()}}


@pytest.fixture
def job(folders, tmp_path):
    def make(name):
        case = objectives.CASES[name]
        return {
            "model.name": str(folders[case.kind]),
            "model.task": name,
            "model.max_length": 24,
            "adapter.train_head": True,
            "data.source": str(objectives.write(name, tmp_path / "records.jsonl")),
            "data.partition": "iid",
            "run.rounds": 2,
            **case.config,
        }

    return make


def last(run):
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "round"][-1]


def stock(name, base, path):
    """What a user of transformers and peft alone gets of an adapter."""
    objective, case = load_objective(name), objectives.CASES[name]
    options = {"num_labels": case.outputs, "ignore_mismatched_sizes": True} if case.outputs else {}
    model = getattr(transformers, objective.auto_class).from_pretrained(base, **options)
    return peft.PeftModel.from_pretrained(model, path).eval()


@pytest.mark.parametrize("name", objectives.CASES)
def test_a_run_and_what_stock_libraries_make_of_it(name, job, tiny, tmp_path):
    config = job(name)
    tiny("run", config)
    run = tmp_path / "run"
    world = load_world(configs.load(run / "resolved.yaml"), run)
    model = stock(name, config["model.name"], run / "adapter")
    losses = []
    for index in range(len(world.test_encoded)):
        inputs, labels = world.test_encoded.batch(np.array([index]))
        with torch.no_grad():
            scores = objectives.CASES[name].stock(model, inputs)
        losses.append(objectives.CASES[name].loss(scores, labels[0]))
    assert last(run)["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    started = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    frozen = next(event for event in started if event["event"] == "evaluate" and event["round"] == 0)
    assert last(run)["loss"] < frozen["loss"], "nothing was learned"

    export(run, tmp_path / "merged", merge=True)
    merged = getattr(transformers, load_objective(name).auto_class).from_pretrained(tmp_path / "merged").eval()
    inputs, _ = world.test_encoded.batch(np.arange(3))
    with torch.no_grad():
        both = [objectives.CASES[name].stock(each, inputs) for each in (merged, model)]
        torch.testing.assert_close(*both, atol=1e-4, rtol=1e-3)
    if objectives.CASES[name].outputs:
        assert merged.config.id2label == dict(enumerate(world.train.label_names))
        assert merged.config.problem_type == load_objective(name).problem_type
    counts = json.loads((run / "split.json").read_text())["histogram"]["counts"]
    assert all(len(row) == len(world.train.label_names) for row in counts)


@pytest.mark.parametrize("name", objectives.CASES)
def test_a_private_run_sends_no_measure_and_changes_the_model(name, job, tiny, tmp_path):
    private = {
        "privacy.unit": "sample",
        "privacy.epsilon": 8.0,
        "privacy.randomness": "seeded",
        "strategy.weighting": "uniform",
        "run.rounds": 1,
    }
    summary = tiny("run", {**job(name), **private})
    assert summary["epsilon_max"] > 0 and summary["final"]["loss"] != summary["baseline"]["loss"]
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"client_loss"' not in text and '"train_loss"' not in text


@pytest.mark.parametrize("name", objectives.CASES)
def test_what_needs_one_class_a_record_is_refused(name):
    base = {"model.task": name}
    with pytest.raises(InputError, match=f"continual.body: .*model.task={name} has none"):
        configs.load({}, {**base, "continual.body": "sequential", "continual.tasks": 2})
    with pytest.raises(InputError, match=f"tta.method=tent: .*model.task={name} has none"):
        configs.load({}, {**base, "tta.method": "tent", "data.holdout": 0.3})


@pytest.mark.parametrize("name", objectives.CASES)
def test_a_model_without_such_a_head_is_refused_by_name(name, job, tiny, tmp_path):
    transformers.Wav2Vec2Config().save_pretrained(tmp_path / "speech")
    with pytest.raises(InputError, match=rf"model\.name: cannot load '.*speech' for {name}"):
        tiny("run", {**job(name), "model.name": str(tmp_path / "speech")})
