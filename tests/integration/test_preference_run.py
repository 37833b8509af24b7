"""Runs over preferences: equal to loops written out with stock libraries, resumed bit for bit, used afterwards."""

from __future__ import annotations

import json

import numpy as np
import peft
import pytest
import torch
import transformers

from fedpeft import config as configs
from fedpeft.clients.reference import with_reference
from fedpeft.deploy import build
from fedpeft.deploy.site import worker
from fedpeft.errors import InputError
from fedpeft.record.metrics import read
from fedpeft.run.export import export
from fedpeft.run.world import load_world
from support import by_hand, objectives
from support import small_models as small

CASE = objectives.CASES["preference"]
BETA = 0.1


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small.save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def job(base, tmp_path):
    return {
        "model.name": str(base),
        "model.task": "preference",
        "model.max_length": 24,
        "data.source": str(objectives.write("preference", tmp_path / "pairs.jsonl", 24)),
        "data.clients": 2,
        "run.rounds": 2,
    }


def stock(base, path=None):
    """The base model, with the adapter of a folder, by stock libraries."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return (model if path is None else peft.PeftModel.from_pretrained(model, path)).eval()


def loss(model, reference, data, index):
    """DPO of one pair, by a pass of each model over each conversation."""
    inputs, _ = data.batch(np.array([index]))
    says = CASE.stock(model, inputs)
    with torch.no_grad():
        said = CASE.stock(reference, inputs)
    margin = (says - said)[0] - (says - said)[1]
    return -torch.nn.functional.logsigmoid(BETA * margin), margin


def test_a_federated_run_is_the_loop_that_averages_by_hand(job, base, tiny, tmp_path):
    plain = {"client.optimizer": "sgd", "client.lr": 0.5, "client.batch_size": 100, "client.local_steps": 2}
    tiny("run", {**job, **plain})
    world = load_world(configs.load(tmp_path / "run" / "resolved.yaml"), tmp_path / "run")
    reference, place = stock(base), tmp_path / "hand"

    def mean_loss(model, share):
        return torch.stack([loss(model, reference, share, index)[0] for index in range(len(share))]).mean()

    shares = world.local.train_data
    ends = by_hand.average(world, lambda: stock(base), mean_loss, lambda number: shares, 2, 0.5, place)
    by_hand.compare(tmp_path / "run", place, ends)


@pytest.mark.parametrize("strategy", ["fedit", "flora", "fedex"])
def test_the_reference_stays_the_base_that_the_run_began_with_also_where_a_strategy_moves_it(
    strategy, job, base, tiny, tmp_path
):
    config = {**job, "strategy": strategy, "client.lr": 0.05}
    tiny("run", config)
    export(tmp_path / "run", tmp_path / "merged", merge=True)
    data = load_world(configs.load(tmp_path / "run" / "resolved.yaml"), tmp_path / "run").test_encoded
    model, reference = stock(tmp_path / "merged"), stock(base)
    with torch.no_grad():
        losses, margins = zip(*(loss(model, reference, data, index) for index in range(len(data))), strict=True)
    event = next(event for event in reversed(list(read(tmp_path / "run/metrics.jsonl"))) if event["event"] == "round")
    assert event["loss"] == pytest.approx(float(sum(losses)) / len(data), rel=1e-4)
    assert event["reward_margin"] == pytest.approx(BETA * float(sum(margins)) / len(data), rel=1e-3)
    assert event["accuracy"] == pytest.approx(sum(float(margin > 0) for margin in margins) / len(data))
    assert abs(event["loss"] - np.log(2)) > 1e-3


def test_a_run_that_was_interrupted_ends_with_the_same_bits(job, ends_alike):
    ends_alike(job)


def test_a_run_that_goes_on_from_an_adapter_is_compared_with_it_or_with_the_base(job, base, tiny, tmp_path):
    tiny("first", {**job, "client.lr": 0.05})
    start = tmp_path / "first" / "adapter"
    tuned, plain = stock(base, start), stock(base)
    for reference, model in (("start", tuned), ("base", plain)):
        config = {**job, "adapter.start": str(start), "model.task_options.reference": reference}
        world = load_world(configs.load({}, {**config, "data.partition": "iid"}), tmp_path / reference)
        for index in range(3):
            inputs, labels = world.test_encoded.batch(np.array([index]))
            with torch.no_grad():
                torch.testing.assert_close(labels[0].double(), CASE.stock(model, inputs), atol=1e-4, rtol=1e-4)
        begun = world.local.model.state()
        assert all(torch.equal(value, world.start.adapter[key]) for key, value in begun.tensors.items())
        assert any(begun[key].any() for key in begun.tensors if key.endswith("/B"))


def test_a_site_asks_its_own_base_of_its_own_records(job, base, tmp_path):
    config = configs.load({}, {**job, "data.partition": "iid", "data.holdout": 0.25})
    model = build.bare(config, tmp_path / "site", ["all"]).local.model
    for part in worker.load_data(config, "clinic", model.base.processor):
        data = with_reference(config, model, part)
        assert data.rows.tolist() == part.rows.tolist() and len(data) in (6, 18)
        for index in range(len(data)):
            inputs, labels = data.batch(np.array([index]))
            with torch.no_grad():
                torch.testing.assert_close(labels[0].double(), CASE.stock(stock(base), inputs), atol=1e-4, rtol=1e-4)


def test_a_record_that_the_model_does_not_know_takes_no_other_with_it(job, base, tmp_path):
    """At a private site it must not show, so it has no reference there, and as if it were none."""
    config = configs.load({}, {**job, "data.partition": "iid"})
    model = build.bare(config, tmp_path / "site", ["all"]).local.model
    data, _ = worker.load_data(config, "clinic", model.base.processor)
    whole = with_reference(config, model, data).labels
    ids = data.stored.ids
    ids.values = ids.values.copy()
    ids.values[ids.ends[data.rows[2]]] = 2**16 - 1
    found = with_reference(config, model, data).labels
    others = np.arange(len(data)) != 2
    assert found[2].isnan().all() and torch.isfinite(whole).all()
    torch.testing.assert_close(found[others], whole[others], atol=1e-4, rtol=1e-4)


def test_sites_that_do_not_have_the_start_do_not_compare_with_it(job, tiny, tmp_path):
    tiny("first", {**job, "run.rounds": 1})
    start = {
        "adapter.start": str(tmp_path / "first" / "adapter"),
        "strategy": "ffa_lora",
        "strategy.transport": "dense",
    }
    config = configs.load({}, {**job, **start, "data.partition": "iid"})
    with pytest.raises(InputError, match=r"sites do not have the folder, .*model\.task_options\.reference=base"):
        build.bare(config, tmp_path / "run", ["all"])
    build.bare(configs.load({}, {**job, **start, "model.task_options.reference": "base"}), tmp_path / "b", ["all"])


def test_the_shipped_config_learns_which_answer_is_preferred_and_its_model_answers(fedpeft, tmp_path):
    run = tmp_path / "run"
    few = ["run.rounds=1", "data.limit=80", "evaluation.generate.records=2", "evaluation.generate.max_new_tokens=4"]
    done = fedpeft("simulate", "preference", *few, "--out", run, "--json")
    assert done.code == 0, done.err
    summary = done.json
    assert summary["baseline"]["accuracy"] == 0.5 and summary["final"]["accuracy"] > 0.9
    assert summary["texts"]["form"] == "preference" and summary["answers"]["samples"][0]["wanted"].endswith(".")
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    (tmp_path / "asked.jsonl").write_text(json.dumps({"prompt": "Add the numbers.\n\n2 and 3"}) + "\n")
    told = fedpeft("predict", run, "--data", tmp_path / "asked.jsonl", "--out", tmp_path / "said.jsonl", "--json")
    assert told.code == 0, told.err
    assert json.loads((tmp_path / "said.jsonl").read_text()).keys() == {"record", "answer"}
