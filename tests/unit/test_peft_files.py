"""Adapter folders of other people: what is read computes what it computed, and what is not understood is refused."""

from __future__ import annotations

import json
from dataclasses import fields

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fedpeft.adapters import folder
from fedpeft.adapters.peft_files import UNDERSTOOD
from fedpeft.errors import InputError
from fedpeft.merging.base import make
from fedpeft.run.offline import aggregate_folders, merge_folders

IDS = torch.tensor([[3, 4, 7, 20, 30, 11]])
REFUSED = {  # fields of peft's config that change what the factors compute, each with a value that switches it on
    "bias": "lora_only",
    "use_dora": True,
    "lora_bias": True,
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "layer_replication": [[0, 2], [0, 2]],
    "alora_invocation_tokens": [5, 6],
    "trainable_token_indices": [3],
    "target_parameters": ["mlp.w"],
    "velora_config": {"a": 1},
    "monteclora_config": {"a": 1},
    "arrow_config": {"a": 1},
    "kasa_config": {"a": 1},
    "megatron_config": {"a": 1},
    "ensure_weight_tying": True,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Two tiny models of one shape."""
    root = tmp_path_factory.mktemp("bases")
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=48,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=24,
            tie_word_embeddings=False,
        )
        LlamaForCausalLM(config).save_pretrained(root / str(seed))
    return root / "0", root / "1"


def made(path, base, seed=0, **options):
    """A folder of stock peft with random trained values."""
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += 0.3 * torch.randn(value.shape, generator=generator)
    model.save_pretrained(path)
    return path


def logits(path, base):
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def aggregated(paths, out, strategy="fedit", base=None):
    return aggregate_folders(strategy, paths, out, base=base)


def rewrite(path, tensors=None, **config):
    """Change a folder as another tool might have written it."""
    file = path / "adapter_model.safetensors"
    if tensors:
        save_file(tensors(load_file(file)), file)
    now = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**now, **config}))


def test_every_field_of_peft_is_understood_or_refused():
    assert {field.name for field in fields(peft.LoraConfig)} <= UNDERSTOOD | set(REFUSED)


@pytest.mark.parametrize("name", [*sorted(set(REFUSED) - {"bias"}), "a_field_of_next_year"])
def test_a_field_that_changes_the_function_is_refused_by_name(name, bases, tmp_path):
    path = made(tmp_path / "a", bases[0])
    rewrite(path, **{name: REFUSED.get(name, 3)})
    with pytest.raises(InputError, match=f"{path}: {name} is set"):
        aggregated([path, path], tmp_path / "out")
    for off in (None, False, [], {}):
        rewrite(path, **{name: off})
        folder.load(path)


OPTIONS = st.fixed_dictionaries(
    {
        "r": st.integers(1, 5),
        "lora_alpha": st.integers(1, 20),
        "use_rslora": st.booleans(),
        "target_modules": st.sampled_from(
            [["q_proj"], ["q_proj", "up_proj"], r".*layers\.1.*(k|o)_proj", "all-linear"]
        ),
        "layers_to_transform": st.sampled_from([None, [1]]),
        "rank_pattern": st.sampled_from([{}, {"layers.1.self_attn.q_proj": 7}, {"q_proj": 1}]),
        "alpha_pattern": st.sampled_from([{}, {r".*1\..*_proj": 9}, {"o_proj": 2}]),
        "modules_to_save": st.sampled_from(
            [None, ["lm_head"], ["norm"], ["embed_tokens", "lm_head"], ["input_layernorm"]]
        ),
        "init_lora_weights": st.sampled_from([True, "gaussian", "orthogonal"]),
    }
)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(options=OPTIONS)
def test_the_mean_of_an_adapter_with_itself_is_the_same_function(options, bases, tmp_path_factory):
    if isinstance(options["target_modules"], str):
        options = {**options, "layers_to_transform": None}  # peft refuses both
    if options["init_lora_weights"] == "orthogonal":
        options = {**options, "r": 4, "rank_pattern": {}}  # drawn for even ranks only
    root = tmp_path_factory.mktemp("same")
    path = made(root / "a", bases[0], **options)
    aggregated([path, path], root / "out")
    want, got = logits(path, bases[0]), logits(root / "out", bases[0])
    with torch.no_grad():
        untrained = AutoModelForCausalLM.from_pretrained(bases[0])(IDS).logits
    assert (got - want).abs().max() < 0.01 * (want - untrained).abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": [3, 4]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"alora_invocation_tokens": [5, 6]},
        {"layer_replication": [[0, 2], [0, 2]]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_what_peft_writes_and_cannot_be_averaged_is_refused(options, bases, tmp_path):
    path = made(tmp_path / "a", bases[0], **options)
    with pytest.raises(InputError, match=str(path)):
        aggregated([path, path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lora_on_the_output_layer_is_read_without_the_base_layers_weights(bases, tmp_path):
    path = made(tmp_path / "a", bases[0], target_modules=["q_proj", "lm_head"])
    with pytest.raises(InputError, match="save_embedding_layers=False"):
        folder.load(path)
    rewrite(path, lambda tensors: {key: value for key, value in tensors.items() if "lora_" in key})
    aggregated([path, path], tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out", bases[0]), logits(path, bases[0]), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        (lambda key: key.replace(".weight", ".default.weight"), "'default'"),
        (lambda key: key.replace(".weight", ".hospital-7.weight"), "'hospital-7'"),
        (lambda key: key.removeprefix("base_model.model."), "no name that peft writes"),
        (lambda key: f"module.{key}", "no name that peft writes"),
        (lambda key: key.replace("lora_A.weight", "lora_down.weight"), "only LoRA factors"),
        (lambda key: key.replace("lora_A.weight", "scale.weight"), "neither a LoRA factor"),
    ],
)
def test_names_that_peft_does_not_write_are_said(rename, said, bases, tmp_path):
    path = made(tmp_path / "a", bases[0])
    rewrite(path, lambda tensors: {rename(key): value for key, value in tensors.items()})
    with pytest.raises(InputError, match=f"{path}: .*{said}"):
        folder.load(path)


def spoil(value):
    def change(tensors):
        key = sorted(tensors)[-1]
        tensors[key][-1, -1] = value
        return tensors

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["adapter", "saved module", "global"])
def test_values_that_are_not_finite_pass_neither_door(value, where, bases, tmp_path):
    options = {"modules_to_save": ["lm_head"]} if where == "saved module" else {}
    good, bad = made(tmp_path / "good", bases[0], **options), made(tmp_path / "bad", bases[0], seed=1, **options)
    rewrite(bad, spoil(value))
    with pytest.raises(InputError, match=f"{bad}: .*NaN or inf"):
        aggregate_folders(
            "fedit",
            [good, good if where == "global" else bad],
            tmp_path / "out",
            start=bad if where == "global" else None,
        )
    with pytest.raises(InputError, match=f"{bad}: .*NaN or inf"):
        merge_folders("task_arithmetic", [good, bad], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_whole_numbers_are_no_factors(bases, tmp_path):
    path = made(tmp_path / "a", bases[0])
    rewrite(path, lambda tensors: {key: (10 * value).to(torch.int8) for key, value in tensors.items()})
    with pytest.raises(InputError, match="int8"):
        folder.load(path)


def test_adapters_of_two_base_models_are_refused_by_both_commands(bases, tmp_path):
    one, other = made(tmp_path / "one", bases[0]), made(tmp_path / "other", bases[1])
    for call in (
        lambda: aggregated([one, other], tmp_path / "out"),
        lambda: aggregate_folders("fedit", [one], tmp_path / "out", start=other),
        lambda: merge_folders("task_arithmetic", [one, other], tmp_path / "out"),
    ):
        with pytest.raises(InputError, match=f"{other}: its base model is '{bases[1]}'.*--base"):
            call()
    rewrite(other, base_model_name_or_path=str(bases[0]), revision="v2")
    with pytest.raises(InputError, match="revision v2"):
        aggregated([one, other], tmp_path / "out")


def test_one_base_in_two_spellings_is_one_and_the_user_may_say_so(bases, tmp_path, monkeypatch):
    one, other = made(tmp_path / "one", bases[0]), made(tmp_path / "other", bases[0], seed=1)
    monkeypatch.chdir(bases[0].parent)
    rewrite(other, base_model_name_or_path="0")
    aggregated([one, other], tmp_path / "out")
    rewrite(other, base_model_name_or_path="/mnt/models/llama")
    aggregated([one, other], tmp_path / "named", base=str(bases[0]))
    assert folder.about(tmp_path / "named")["base"] == str(bases[0])
    merge_folders("task_arithmetic", [one, other], tmp_path / "merged", base=str(bases[0]))
    assert make("task_arithmetic", {}) and folder.about(tmp_path / "merged")["base"] == str(bases[0])


def test_other_tasks_are_refused_and_no_task_is_none(bases, tmp_path):
    one, other = made(tmp_path / "one", bases[0]), made(tmp_path / "other", bases[0], seed=1)
    rewrite(other, task_type="SEQ_CLS")
    with pytest.raises(InputError, match=f"{other}: made for sequence-classification; {one} for causal-lm"):
        aggregated([one, other], tmp_path / "out")
    rewrite(one, task_type=None)
    aggregated([one, other], tmp_path / "out")
    assert folder.about(tmp_path / "out")["task"] == "sequence-classification"
