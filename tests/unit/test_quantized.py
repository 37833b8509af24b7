"""Which bases are kept in few bits, what is said of those that already are, and who may not run over one."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.config import ModelConfig
from fedpeft.errors import InputError
from fedpeft.models import loading
from fedpeft.models.quantized import import_kernels, is_quantized, loading_settings, stated_kind
from fedpeft.strategies.build import build
from support import small_models as small
from support.classified import STAY_CENTRAL
from support.methods import settings
from support.refused_configs import refused

MOVING = ("coso", "factor_coso", "inflora", "merging")  # into the base, at the end of a task
NF4 = {"model.quantization": "nf4"}
STATED = {
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True, "llm_int8_has_fp16_weight": False},  # of before there was a method
    "fp4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "8 bits over half precision": {"load_in_8bit": True, "llm_int8_has_fp16_weight": True},
}


def state(folder, kind):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": STATED[kind]}))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A folder with a small Llama that was saved in NF4."""
    plain, folder = (tmp_path_factory.mktemp(name) for name in ("plain", "quantized"))
    small.save("llama", plain)
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, **loading_settings("nf4"))
    model.save_pretrained(folder)
    small.tokenizer().save_pretrained(folder)
    return plain, folder


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_a_base_already_is_is_taken(tmp_path, kind):
    state(tmp_path, kind)
    task = {"model.name": str(tmp_path), "model.task": "causal-lm"}
    assert configs.load({}, task).model.quantization == kind
    assert configs.load({}, {**task, "model.quantization": kind}).model.quantization == kind
    other = {"nf4": "int8", "int8": "nf4"}[kind]
    refused({}, {**task, "model.quantization": other}, f"quantization={other}", f"quantised already, to {kind}", "Set")
    refused({}, {**task, "strategy": "flora"}, f"model.quantization={kind}", "flora")  # as if the config had said it


@pytest.mark.parametrize("kind", sorted(set(STATED) - {"nf4", "int8"}))
def test_another_kind_is_refused_with_its_name(tmp_path, kind):
    state(tmp_path, kind)
    for wanted in (None, "nf4"):
        refused({}, {"model.name": str(tmp_path), "model.quantization": wanted}, f"as {kind} ", "nf4 and int8", "Take")


@pytest.mark.parametrize(
    "text", [None, "", "[]", "{", "{}", '{"quantization_config": null}', '{"quantization_config": 3}']
)
def test_a_folder_that_says_nothing_of_it_is_not_quantised(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert stated_kind(str(tmp_path)) is None


@pytest.mark.parametrize("name", ["no/such-model", "nowhere", "a b c", "/no/such/folder", "x" * 300, ""])
def test_a_name_that_is_not_here_is_for_loading_to_refuse(name):
    assert stated_kind(name) is None


def test_a_base_that_was_saved_quantised_is_loaded_and_said(quantized, caplog):
    plain, folder = quantized
    with caplog.at_level(logging.INFO, "fedpeft"):
        already = loading.load(ModelConfig(name=str(folder), task="causal-lm", quantization="nf4"), 1, 0)
    assert f"'{folder}' is quantised already" in caplog.text and "nf4" in caplog.text
    now = loading.load(ModelConfig(name=str(plain), task="causal-lm", quantization="nf4"), 1, 0)
    inputs = small.inputs("llama")
    assert torch.equal(already.forward(inputs), now.forward(inputs))
    assert loading.fingerprint(already, True) == loading.fingerprint(now, True)
    with pytest.raises(InputError, match=r"quantization=null: .* is quantised already, to nf4"):
        loading.load(ModelConfig(name=str(folder), task="causal-lm"), 1, 0)


@pytest.mark.parametrize("name", ["roberta", "distilbert", "vit", "gpt2"])
def test_heads_and_what_scores_words_stay_as_they_are(tmp_path, name):
    """Two layers of a head, of which transformers by itself keeps the last one."""
    small.save(name, tmp_path)
    config = ModelConfig(name=str(tmp_path), task=small.KINDS[name][0], quantization="int8")
    base = loading.load(config, small.LABELS, 0)
    parts = dict(base.backbone.named_modules())
    kept = [part for head in base.heads.values() for part in head.modules()] or [parts["lm_head"]]
    assert not any(map(is_quantized, kept)) and sum(map(is_quantized, parts.values())) >= 8
    plain = loading.load(ModelConfig(name=str(tmp_path), task=config.task), small.LABELS, 0)
    inputs = small.inputs(name)
    assert 0 < (base.forward(inputs) - plain.forward(inputs)).abs().max() < 0.3
    before = base.forward(inputs)
    base.make_dense()
    torch.testing.assert_close(base.forward(inputs), before, atol=1e-5, rtol=1e-5)
    base.backbone.save_pretrained(tmp_path / "dense")  # in the layout of its architecture, GPT-2's too
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    again = type(base.backbone).from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(again(**inputs).logits, before, atol=1e-5, rtol=1e-5)


def test_a_head_that_was_saved_quantised_is_refused(tmp_path):
    plain, folder = tmp_path / "plain", tmp_path / "quantized"
    small.save("roberta", plain)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(plain, **loading_settings("nf4", ["none"]))
    model.save_pretrained(folder)
    small.tokenizer().save_pretrained(folder)
    with pytest.raises(InputError, match="its head 'classifier' quantised"):
        loading.load(ModelConfig(name=str(folder), task=small.TEXT, quantization="nf4"), small.LABELS, 0)


def test_a_weight_in_few_bits_cannot_be_written(quantized):
    base = loading.load(ModelConfig(name=str(quantized[0]), task="causal-lm", quantization="int8"), 1, 0)
    with pytest.raises(InputError, match=r"q_proj is kept in few bits"):
        base.weight("model.layers.0.self_attn.q_proj")
    assert base.weight("lm_head").shape == base.values("lm_head").shape


def test_others_may_compile_while_the_kernels_are_imported_and_afterwards_torch_is_as_it_was(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: ("compiled", function, options))
    before, seen = torch.compile, []

    def take(name):
        seen.append((name, torch.compile("mine"), run_in_thread(lambda: torch.compile("theirs", dynamic=True))))
        raise ImportError("no such library")

    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    monkeypatch.setattr(importlib, "import_module", take)
    with pytest.raises(ImportError, match="no such library"):
        import_kernels()
    assert seen == [("bitsandbytes", "mine", ("compiled", "theirs", {"dynamic": True}))]
    assert torch.compile is before


def run_in_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


# Who may run over one -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", registry.names("strategies"))
def test_each_strategy_runs_over_it_or_is_refused_with_the_reason(name, kind):
    config = {**settings(name), "model.quantization": kind}
    if name in ("flora", "fedex"):
        refused({}, config, f"model.quantization={kind}", f"strategy {name} moves the base weights", "null")
    else:
        assert configs.load({}, config).model.quantization == kind


def test_who_moves_the_base_is_found_by_what_it_declares(monkeypatch):
    refused({}, {**NF4, "strategy": "fedex", "strategy.wrap": ["fedprox"]}, "strategy fedex moves")
    monkeypatch.setattr(registry.load("strategies", "fedit"), "changes_base", True)
    refused({}, {**NF4, "strategy": "fedit", "strategy.wrap": ["fedprox"]}, "strategy fedit moves")


@pytest.mark.parametrize("body", [name for name in registry.names("bodies") if name not in STAY_CENTRAL])
def test_each_federated_body_runs_over_it_or_is_refused_with_the_reason(body):
    config = {"continual.body": body, "strategy": "fedit"}
    if body in MOVING:
        assert build(configs.load("continual", config), classes=10).changes_base
        refused("continual", {**config, **NF4}, f"continual.body={body} moves the base weights", "nf4")
    else:
        assert configs.load("continual", {**config, **NF4}).model.quantization == "nf4"


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_starts_that_move_the_base_are_refused(start):
    adapter = {"adapter": {"name": "peft", "type": "LORA", "options": {"init_lora_weights": start}}}
    assert configs.load(adapter).adapter.name == "peft"
    refused(adapter, NF4, f"init_lora_weights={start} moves the base weights", "model.quantization=nf4")
    assert configs.load({"adapter": {"name": "peft", "type": "LORA"}}, NF4).model.quantization == "nf4"


@pytest.mark.parametrize("name", registry.names("adapters"))
def test_each_adapter_is_put_over_it(quantized, name):
    if getattr(registry.load("adapters", name), "moves", False) and name != "nlora":
        refused({"adapter": name}, NF4, f"adapter.name={name} moves the base weights", "model.quantization=nf4")
        return
    model = small.adapted(quantized[0], "llama", {"quantization": "nf4"}, method=name)
    model.write(small.randomised(model))
    inputs = small.inputs("llama")
    model.train_roles({model.form.role(key) for key in model.form.tensors} - {"frozen"})
    model.logits(inputs).sum().backward()
    moved = [key for key, value in model.parameters.items() if value.grad is not None and value.grad.any()]
    assert moved and any("A" in key.rpartition("/")[2] or name != "lora" for key in moved)


def test_its_import_says_nothing_of_kernels_that_are_not_used():
    pytest.importorskip("bitsandbytes")
    code = "from fedpeft.models.quantized import import_kernels; import_kernels()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "kernels" not in done.stdout + done.stderr
