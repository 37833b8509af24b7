"""Objectives that the package does not know: registered here, they train, are evaluated and resume like its own."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.adapters import folder
from fedpeft.cli import catalogue
from fedpeft.data.encode import Encoded
from fedpeft.data.images import encode_images
from fedpeft.errors import InputError
from fedpeft.objectives.base import IGNORE, Objective, divide_or_nan, load_objective
from fedpeft.objectives.causal_lm import CausalLM
from fedpeft.record import checkpoint
from fedpeft.run.world import load_world
from fedpeft.simulations import run as runs


class Hinge(Objective):
    """Images; a class wins by a margin of 1 or costs what it lacks."""

    records = "image"
    auto_class = "AutoModelForImageClassification"
    peft_task = "HINGE"

    def encode(self, records, processor, max_length, what, folder=None):
        return Encoded({"pixel_values": encode_images(records.inputs, processor)}, torch.from_numpy(records.labels))

    def losses(self, scores, targets):
        right = scores.gather(1, targets[:, None])
        lacks = (1 + scores - right).clamp(min=0).scatter(1, targets[:, None], 0.0)
        return lacks.sum(1)

    def measure(self, scores, targets, losses):
        return {**super().measure(scores, targets, losses), "safe": float((losses == 0).sum())}

    def metrics(self, sums, samples):
        return {**super().metrics(sums, samples), "safe_share": divide_or_nan(sums["safe"], samples)}


class LastToken(CausalLM):
    """Texts of which the last token alone is predicted."""

    def encode(self, records, processor, max_length, what, folder=None):
        data = super().encode(records, processor, max_length, what)
        places = torch.arange(data.labels.shape[1])
        last = (data.inputs["attention_mask"].sum(1) - 1)[:, None]
        kept = data.labels.where((places == last) & (last > 0), torch.tensor(IGNORE))
        return Encoded(data.inputs, kept, data.skipped, data.end)


OBJECTIVES = {
    "hinge": (Hinge, {}),
    "last-token": (LastToken, {"model.name": "tiny-llama", "model.max_length": 16, "adapter.train_head": False}),
}
TEXTS = [f"{word} {end}" for word in ("red", "green", "blue", "grey") for end in "abcdefghij"]


@pytest.fixture(params=OBJECTIVES)
def objective(request, monkeypatch, tmp_path):
    """Name and config of an objective that one line registers."""
    cls, config = OBJECTIVES[request.param]
    monkeypatch.setitem(sys.modules, "another_package", sys.modules[__name__])
    monkeypatch.setitem(registry.TABLES["objectives"], request.param, f"another_package:{cls.__name__}")
    registry.table.cache_clear()
    if cls.records == "text":
        (tmp_path / "texts.csv").write_text("\n".join(["text", *TEXTS]))
        config = {**config, "data.source": str(tmp_path / "texts.csv")}
    yield request.param, {"model.task": request.param, "run.rounds": 2, "data.limit": 40, **config}
    registry.table.cache_clear()


def factors(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_it_trains_is_evaluated_and_resumes(objective, tiny, interrupted, tmp_path):
    name, config = objective
    tiny("whole", config)
    [*_, last] = [
        event
        for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
        if (event := json.loads(line))["event"] == "round"
    ]
    tiny("plain", {**config, "model.task": {"hinge": "image-classification", "last-token": "causal-lm"}[name]})
    assert any(
        not torch.equal(value, factors(tmp_path / "plain")[key]) for key, value in factors(tmp_path / "whole").items()
    ), "its loss is not what was trained"

    interrupted("half", config, at=1)
    runs.resume(tmp_path / "half")
    for key, value in factors(tmp_path / "whole").items():
        assert torch.equal(value, factors(tmp_path / "half")[key])
    here = load_world(configs.load(tmp_path / "whole" / "resolved.yaml"), tmp_path / "whole")
    here.local.model.write(checkpoint.latest(tmp_path / "whole" / "checkpoints").adapter)
    losses, scores = by_hand(name, here)
    assert last["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    if name == "hinge":
        assert last["safe_share"] == pytest.approx(sum(loss == 0 for loss in losses) / len(losses))
        assert last["accuracy"] == pytest.approx(sum(scores) / len(scores))
    else:
        assert last["test_tokens"] == len(losses) == last["test_records"]


def by_hand(name, here):
    """Loss, and whether the answer is right, of each test record alone, in float64."""
    losses, right = [], []
    data = here.test_encoded
    for index in data.teaching():
        inputs, labels = data.batch([index])
        with torch.no_grad():
            logits = here.local.model.logits(inputs)[0].double()
        if name == "hinge":
            answer = int(labels[0])
            losses.append(
                sum(
                    max(0.0, 1 + float(logits[other] - logits[answer]))
                    for other in range(len(logits))
                    if other != answer
                )
            )
        else:
            text = inputs["input_ids"][0]
            answer, logits = int(text[-1]), logits[-2]
            losses.append(float(torch.logsumexp(logits, 0) - logits[answer]))
        right.append(int(logits.argmax()) == answer)
    return losses, right


def test_it_is_listed_refused_by_name_and_told_to_peft(objective, tiny, tmp_path):
    name, config = objective
    assert name in [row["name"] for row in catalogue.entries("objectives")["objectives"]]
    with pytest.raises(InputError, match=rf"^model\.task: '{name}x' is not known\. Did you mean '{name}'\?"):
        configs.load({}, {**config, "model.task": f"{name}x"})
    if not load_objective(name).classes:
        with pytest.raises(InputError, match=f"continual.body: .*model.task={name} has none"):
            configs.load({}, {**config, "continual.body": "sequential", "continual.tasks": 2})
    tiny("run", {**config, "run.rounds": 1})
    told = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["task_type"]
    assert told == {"hinge": "HINGE", "last-token": "CAUSAL_LM"}[name]
    assert folder.about(tmp_path / "run" / "adapter")["task"] == {"hinge": "hinge", "last-token": "causal-lm"}[name]


def test_it_is_unknown_where_nobody_registers_it():
    for name in OBJECTIVES:
        with pytest.raises(InputError, match=f"model.task: '{name}' is not known"):
            configs.load({}, {"model.task": name})
