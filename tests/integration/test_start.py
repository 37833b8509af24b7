"""A federation that begins from an adapter folder has that folder's model before round 1, and keeps what it freezes."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fedpeft import config as configs
from fedpeft.adapters import folder
from fedpeft.deploy import build
from fedpeft.errors import InputError
from fedpeft.models.loading import load
from fedpeft.record import report
from fedpeft.record.metrics import read
from fedpeft.run import results
from fedpeft.run.world import load_world
from fedpeft.simulations.run import resume, simulate
from support.deployed import LABELS, TRAIN
from support.methods import TINY

ROUNDS = 2
ORTHONORMAL = {"strategy": "ffa_lora", "strategy.init": "orthonormal"}


def products(state):
    return {site: state.sites[site].scaling * state[f"{site}/B"] @ state[f"{site}/A"] for site in state.lora_sites()}


def evaluation(run, number):
    return next(
        event
        for event in read(run / "metrics.jsonl")
        if event["event"] in ("evaluate", "round") and event["round"] == number
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A finished FedIT run of two rounds."""
    path = tmp_path_factory.mktemp("runs") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda run: [])
        simulate({}, {**TINY, "run.rounds": ROUNDS}, path)
    return path


def begun(start, run, **more):
    """The world of a run that begins from a folder; nothing is trained."""
    given = {key.replace("__", "."): value for key, value in more.items()}
    return load_world(configs.load({}, {**TINY, "adapter.start": str(start), **given}), run)


def test_a_base_that_is_held_in_another_dtype_is_the_same_model(first, tmp_path):
    assert begun(first / "adapter", tmp_path / "run", model__dtype="bfloat16").config.model.dtype == "bfloat16"


@pytest.mark.parametrize(
    "strategy",
    [
        {},
        {"strategy": "fedsvd"},
        {"strategy": "ffa_lora"},
        ORTHONORMAL,
        {"strategy": "flora"},
        {"strategy": "flexlora"},
    ],
)
def test_the_model_before_round_one_is_the_folders_whatever_the_strategy_makes_of_it(strategy, first, tmp_path):
    world = begun(first / "adapter", tmp_path / "second", **{"run.seed": 5, **strategy})
    before, wanted = world.strategy.before_round(world.start).adapter, folder.load(first / "adapter")
    for site, product in products(wanted).items():
        torch.testing.assert_close(products(before)[site], product, rtol=1e-4, atol=1e-6)
        assert product.norm() > 1e-3
    assert torch.equal(before["classifier/bias"], wanted["classifier/bias"])


def test_the_first_evaluation_is_the_last_one_of_the_run_before_on_the_same_records(first, tiny, tmp_path):
    tiny("second", {"adapter.start": str(first / "adapter"), "run.rounds": 1})
    there, here = evaluation(first, ROUNDS), evaluation(tmp_path / "second", 0)
    assert (here["accuracy"], here["loss"]) == (there["accuracy"], there["loss"])
    assert evaluation(tmp_path / "second", 1)["loss"] != there["loss"]


def test_a_frozen_factor_is_the_folders(first, tiny, tmp_path):
    tiny("ffa", {"adapter.start": str(first / "adapter"), "run.rounds": 1, "strategy": "ffa_lora"})
    tiny("svd", {"adapter.start": str(first / "adapter"), "run.rounds": 1, "strategy": "fedsvd"})
    begin, ffa, svd = (folder.load(path / "adapter") for path in (first, tmp_path / "ffa", tmp_path / "svd"))
    for site in begin.lora_sites():
        A = begin[f"{site}/A"]
        assert torch.equal(ffa[f"{site}/A"], A) and not torch.equal(ffa[f"{site}/B"], begin[f"{site}/B"])
        rows = svd[f"{site}/A"].double()
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)).double(), atol=1e-5, rtol=0)
        inside = rows @ torch.linalg.pinv(A.double()) @ A.double()
        torch.testing.assert_close(inside, rows, atol=1e-5, rtol=0)


def test_an_adapter_of_stock_peft_is_gone_on_from(tmp_path):
    base = load(configs.load({}).model, 10, 0).backbone
    settings = peft.LoraConfig(
        r=3, lora_alpha=12, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], init_lora_weights=False
    )
    model = peft.get_peft_model(base, settings)
    torch.nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight, std=0.3)
    source = load(configs.load({}).model, 10, 0).source
    model.peft_config["default"].base_model_name_or_path = source
    model.save_pretrained(tmp_path / "stock")
    here = begun(tmp_path / "stock", tmp_path / "run", adapter__r=3, adapter__alpha=12)
    inputs, labels = here.test_encoded.batch(range(len(here.test_encoded)))
    fresh = transformers.AutoModelForImageClassification.from_pretrained(source, num_labels=10)
    scores = peft.PeftModel.from_pretrained(fresh, tmp_path / "stock").eval()(**inputs).logits
    loss = float(torch.nn.functional.cross_entropy(scores, labels))
    assert results.score(here, here.start)["loss"] == pytest.approx(loss, rel=1e-4)


def changed(path, edit):
    """The folder with another adapter_config.json."""
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **edit}))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"adapter.r": 8}, "has rank 4, and adapter.r=8. Set adapter.r=4"),
        ({"adapter.alpha": 3.0}, "Set adapter.alpha=8."),
        ({"adapter.target_modules": ["q_proj"]}, "set adapter.target_modules"),
        ({"adapter.train_head": False}, "set adapter.train_head=true"),
        ({"adapter": "lora_sb", "strategy": "fed_sb"}, "adapter.name=lora_sb is of another form"),
        ({"adapter.client_ranks": [1, 2], "strategy": "flexlora"}, "adapter.client_ranks"),
        ({"continual": "sequential", "run.rounds": 5}, "continual.body=sequential"),
        ({"data.labels": ["9", "8", "7", "6", "5", "4", "3", "2", "1", "0"]}, "its head answers 0, 1, 2, 3, 4"),
    ],
)
def test_what_contradicts_the_folder_is_refused_by_name(more, words, first, tmp_path):
    with pytest.raises(InputError, match=r"adapter\.start") as caught:
        begun(first / "adapter", tmp_path / "second", **more)
    assert words in str(caught.value)


def test_a_folder_of_another_base_or_form_or_with_nan_is_refused(first, tmp_path):
    for place in ("other", "method", "nan", "headless"):
        shutil.copytree(first / "adapter", tmp_path / place)
    changed(tmp_path / "other", {"base_model_name_or_path": "google/vit-base"})
    changed(tmp_path / "method", {"use_dora": True})
    tensors = load_file(tmp_path / "nan" / folder.WEIGHTS)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] * float("nan")}, tmp_path / "nan" / folder.WEIGHTS)
    changed(tmp_path / "headless", {"modules_to_save": None})
    save_file({key: tensors[key] for key in tensors if ".lora_" in key}, tmp_path / "headless" / folder.WEIGHTS)
    (tmp_path / "headless" / folder.HEAD).unlink()
    wanted = {
        tmp_path / "other": "made for the base model 'google/vit-base'",
        tmp_path / "method": "use_dora is set",
        tmp_path / "nan": "has NaN or inf",
        tmp_path / "headless": "has no classifier/bias",
        tmp_path / "nothing": "there is no adapter_config.json",
        first: f"Its adapter is {first / 'adapter'}",
    }
    for path, words in wanted.items():
        with pytest.raises(InputError) as caught:
            begun(path, tmp_path / "second")
        assert words in str(caught.value)


def test_a_run_whose_start_has_changed_is_not_gone_on_with(first, tiny, tmp_path):
    shutil.copytree(first / "adapter", tmp_path / "start")
    tiny("second", {"adapter.start": str(tmp_path / "start"), "run.rounds": 1})
    tensors = load_file(tmp_path / "start" / folder.WEIGHTS)
    name = next(name for name in tensors if ".lora_" in name)
    save_file({**tensors, name: tensors[name] + 1}, tmp_path / "start" / folder.WEIGHTS)
    with pytest.raises(InputError, match=r"adapter\.start=.*its content is another than when .* began"):
        resume(tmp_path / "second")


def test_a_coordinator_begins_from_a_folder_and_sends_all_of_it(tmp_path):
    config = configs.load(TRAIN, {"run.engine": "sites"})
    fresh = build.bare(config, tmp_path / "plain", LABELS)
    state = fresh.local.model.state().map(lambda value: value + 0.1)
    folder.save(state, tmp_path / "start", base=fresh.local.model.base.source, task=config.model.task)
    more = {"run.engine": "sites", "adapter.start": str(tmp_path / "start"), "strategy.name": "fedsvd"}
    made = build.bare(configs.load(TRAIN, {**more, "strategy.transport": "dense"}), tmp_path / "server", LABELS)
    assert made.start.adapter.distance(state) < 1e-6 < made.start.adapter.distance(fresh.start.adapter)
    with pytest.raises(InputError, match=r"sites are not sent A.*strategy\.transport=dense"):
        build.bare(configs.load(TRAIN, {**more, "strategy.transport": "core"}), tmp_path / "other", LABELS)
