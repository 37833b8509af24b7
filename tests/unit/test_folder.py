"""Adapter folders: what fedpeft writes, stock peft computes; what peft writes, fedpeft reads; what neither is."""

from __future__ import annotations

import json
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fedpeft.adapters import folder
from fedpeft.adapters.flat import flatten_adapter
from fedpeft.errors import InputError
from fedpeft.state import AdaptedLayer, AdapterState
from support import small_models as small

# gpt2 stores its weights [in, out]; roberta's head has two layers.
ARCHITECTURES = ["bert", "gpt2", "vit", "roberta"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: small.save(name, root / name) for name in ARCHITECTURES}


def uneven(model, seed=2):
    """A state whose sites have unequal ranks and scales."""
    generator = torch.Generator().manual_seed(seed)
    state = small.randomised(model)
    tensors, sites = dict(state.tensors), dict(state.sites)
    for index, site in enumerate(state.lora_sites()):
        rank, (out, width) = 1 + index, sites[site].shape
        tensors[f"{site}/A"] = torch.randn(rank, width, generator=generator) * 0.3
        tensors[f"{site}/B"] = torch.randn(out, rank, generator=generator) * 0.3
        sites[site] = replace(sites[site], scaling=0.5 + 0.75 * index)
    return AdapterState(tensors, sites)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folder_round_trip(folders, name, tmp_path):
    state = uneven(small.adapted(folders[name], name))
    folder.save(state, tmp_path / "out", base=str(folders[name]), task=small.KINDS[name][0])
    back = folder.load(tmp_path / "out")
    assert list(back.tensors) == list(state.tensors)
    assert all(torch.equal(back[key], value) for key, value in state.tensors.items())
    for site in state.lora_sites():
        assert back.sites[site].kind == "lora" and back.sites[site].shape == state.sites[site].shape
        assert back.sites[site].scaling == pytest.approx(state.sites[site].scaling, rel=1e-12)
    assert {key for key in back.tensors if back.role(key) == "head"} == small.HEADS[name]
    about = folder.about(tmp_path / "out")
    assert about["base"] == str(folders[name]) and about["pooled_head"] is False
    head = tmp_path / "out" / "head.safetensors"
    assert head.exists() == bool(small.HEADS[name])
    if head.exists():
        assert set(load_file(head)) == {key.replace("/", ".") for key in small.HEADS[name]}


AUTO = {
    small.TEXT: "AutoModelForSequenceClassification",
    small.LM: "AutoModelForCausalLM",
    small.IMAGE: "AutoModelForImageClassification",
}


def stock(base, name, path):
    """What a user of peft alone gets."""
    options = {} if small.KINDS[name][0] == small.LM else {"num_labels": small.LABELS}
    model = getattr(transformers, AUTO[small.KINDS[name][0]]).from_pretrained(base, **options)
    return peft.PeftModel.from_pretrained(model, path).eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stock_peft_computes_the_same(folders, name, tmp_path):
    model = small.adapted(folders[name], name)
    for index, state in enumerate((small.randomised(model), uneven(model))):
        path = tmp_path / str(index)
        folder.save(state, path, base=str(folders[name]), task=small.KINDS[name][0])
        expected = small.merged_by_hand(name, state)(**small.inputs(name)).logits
        got = stock(folders[name], name, path)(**small.inputs(name)).logits
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)
        bare = small.make(name).eval()(**small.inputs(name)).logits
        assert not torch.allclose(got, bare, atol=1e-2)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_flat_states_of_every_kind_load_in_stock_peft(folders, name, tmp_path):
    plain = small.with_residual(small.randomised(small.adapted(folders[name], name)))
    core = small.randomised(small.adapted(folders[name], name, method="lora_sb"), scale=0.5)
    for index, state in enumerate((plain, core, small.with_residual(core))):
        path = tmp_path / str(index)
        folder.save(flatten_adapter(state), path, base=str(folders[name]), task=small.KINDS[name][0])
        expected = small.merged_by_hand(name, state)(**small.inputs(name)).logits
        torch.testing.assert_close(
            stock(folders[name], name, path)(**small.inputs(name)).logits, expected, atol=1e-4, rtol=1e-3
        )


def test_a_mean_pooled_head_stays_out_of_the_peft_weights(folders, tmp_path):
    model = small.adapted(folders["bert"], "bert", model={"pooling": "mean"})
    state = small.randomised(model)
    model.write(state)
    folder.save(state, tmp_path / "out", base=str(folders["bert"]), task=small.TEXT, pooled_head=True)
    assert not any("classifier" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert folder.load(tmp_path / "out").sha256() == state.sha256()
    assert folder.about(tmp_path / "out")["pooled_head"] is True
    base = transformers.AutoModel.from_pretrained(folders["bert"])
    got = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()(**small.inputs("bert")).last_hidden_state
    torch.testing.assert_close(got, model.base.backbone(**small.inputs("bert")).last_hidden_state, atol=1e-5, rtol=1e-4)


def made_by_peft(name, path, **options):
    """A folder of peft's own with random factors, and its logits."""
    model = small.make(name).eval()
    names = sorted(small.KINDS[name][1])
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, **{"r": 4, "lora_alpha": 6, **options}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, value in wrapped.named_parameters():
            if "lora_" in key:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    wrapped.save_pretrained(path)
    return wrapped.eval()(**small.inputs(name)).logits


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layer.1.attention.self.query": 2}, "alpha_pattern": {"query": 20}},
        {
            "rank_pattern": {"1.*query": 3},
            "alpha_pattern": {r".*\.0\..*value": 1, "1.attn.c_attn": 30},
            "use_rslora": True,
        },
        {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
    ],
    ids=["plain", "rslora", "patterns", "regex patterns", "head"],
)
def test_folders_made_by_peft_are_read_with_their_scaling(name, options, tmp_path):
    if name == "gpt2" and "modules_to_save" in options:
        options = {"task_type": "CAUSAL_LM"}
    expected = made_by_peft(name, tmp_path / "made", **options)
    state = folder.load(tmp_path / "made")
    got = small.merged_by_hand(name, state)(**small.inputs(name)).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)
    if options.get("use_rslora") and len(options) == 1:
        assert {site.scaling for site in state.sites.values()} == {3.0}


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
    ],
    ids=str,
)
def test_what_is_not_plain_lora_is_refused(options, tmp_path):
    made_by_peft("bert", tmp_path / "made", **options)
    name, value = next(iter(options.items()))
    with pytest.raises(InputError, match=rf"made: {name}.*(is set|{value})"):
        folder.load(tmp_path / "made")


def test_another_peft_method_is_refused(tmp_path):
    model = peft.get_peft_model(small.make("bert"), peft.IA3Config(target_modules=["query"], feedforward_modules=[]))
    model.save_pretrained(tmp_path / "made")
    with pytest.raises(InputError, match=r"peft_type is 'IA3'; only LORA"):
        folder.load(tmp_path / "made")


def test_factors_of_embeddings_are_refused(tmp_path):
    model = peft.get_peft_model(small.make("bert"), peft.LoraConfig(target_modules=["word_embeddings", "query"]))
    model.save_pretrained(tmp_path / "made", save_embedding_layers=False)
    with pytest.raises(InputError, match="only LoRA factors of linear layers"):
        folder.load(tmp_path / "made")


@pytest.fixture
def good(folders, tmp_path):
    state = small.randomised(small.adapted(folders["bert"], "bert"))
    folder.save(state, tmp_path / "out", base=str(folders["bert"]), task=small.TEXT)
    return tmp_path / "out"


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_a_damaged_folder_is_refused(good, file, damage):
    data = (good / file).read_bytes()
    (good / file).unlink()
    if damage != "missing":
        (good / file).write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
    with pytest.raises(InputError, match=rf"out.*{file}"):
        folder.load(good)


def test_a_damaged_head_is_refused(good):
    (good / "head.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(InputError, match=r"head\.safetensors: not readable"):
        folder.load(good)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"peft_type": None}, "peft_type is None"),
        ([], "expected a JSON object"),
    ],
)
def test_a_config_that_is_no_lora_config_is_refused(good, change, message):
    config = json.loads((good / "adapter_config.json").read_text())
    (good / "adapter_config.json").write_text(json.dumps(change if isinstance(change, list) else {**config, **change}))
    with pytest.raises(InputError, match=message):
        folder.load(good)


def test_factors_that_do_not_fit_are_refused(good):
    path = good / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "lora_A" in key)
    save_file({other: value for other, value in tensors.items() if other != key}, path)
    with pytest.raises(InputError, match="query has only one LoRA factor"):
        folder.load(good)
    save_file({**tensors, key: tensors[key][:1].clone()}, path)
    with pytest.raises(InputError, match=r"query has factors of shapes \[16, 4\] and \[1, 16\]"):
        folder.load(good)


def test_a_head_alone_is_no_adapter(tmp_path):
    state = AdapterState({"classifier/weight": torch.ones(2, 2)}, {"classifier": AdaptedLayer("head", (2, 2))})
    with pytest.raises(InputError, match="no LoRA factor"):
        folder.save(state, tmp_path / "out", base="x")
