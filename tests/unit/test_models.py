"""Base models of every architecture by name or path: what is frozen or adapted, which head, what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from fedpeft.config import ModelConfig
from fedpeft.errors import InputError
from fedpeft.models import loading
from fedpeft.models.embedded import byte_tokenizer
from fedpeft.models.loading import mean_pool
from fedpeft.registry import EMBEDDED
from support import small_models as small


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: small.save(name, root / name) for name in small.KINDS}


@pytest.fixture(scope="module")
def bert_trunk(tmp_path_factory):
    return small.save("bert", tmp_path_factory.mktemp("trunk") / "bert", whole=False)


def load(folder, task=small.TEXT, labels=small.LABELS, seed=0, **options):
    return loading.load(ModelConfig(name=str(folder), task=task, **options), labels, seed)


def endings(model):
    return {site.rpartition(".")[2] for site in model.form.lora_sites()}


# Every architecture ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", small.KINDS)
def test_targets_are_looked_up(folders, name):
    model = small.adapted(folders[name], name)
    assert endings(model) == small.KINDS[name][1]
    per_block = 1 if name == "gpt2" else 2
    assert len(model.form.lora_sites()) == 2 * per_block  # two blocks, no head
    rows = small.WIDTH * (3 if name == "gpt2" else 1)
    for site in model.form.lora_sites():
        assert model.sites[site].shape == (rows, small.WIDTH)
        assert model.sites[site].scaling == 2.0
        assert tuple(model.parameters[f"{site}/A"].shape) == (4, small.WIDTH)
        assert tuple(model.parameters[f"{site}/B"].shape) == (rows, 4)


@pytest.mark.parametrize("name", small.KINDS)
def test_a_fresh_adapter_leaves_the_checkpoint_as_it_is(folders, name):
    """B is zero: logits are those of the checkpoint that transformers alone would load."""
    expected = small.make(name).eval()(**small.inputs(name)).logits
    got = small.adapted(folders[name], name).logits(small.inputs(name))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", small.KINDS)
def test_only_adapter_and_head_can_train(folders, name):
    model = small.adapted(folders[name], name)
    lora = {f"{site}/{role}" for site in model.form.lora_sites() for role in ("A", "B")}
    assert set(model.parameters) == lora | small.HEADS[name]

    model.train_roles(("A", "B", "head"))
    modules = [model.base.backbone, *model.base.heads.values()]
    switched_on = {id(parameter) for module in modules for parameter in module.parameters() if parameter.requires_grad}
    assert switched_on == {id(parameter) for parameter in model.parameters.values()}

    trained = model.train_roles(("B",))
    assert set(trained) == {key for key in lora if key.endswith("/B")}
    switched_on = {id(parameter) for module in modules for parameter in module.parameters() if parameter.requires_grad}
    assert switched_on == {id(parameter) for parameter in trained.values()}


@pytest.mark.parametrize("name", small.KINDS)
def test_gradients_reach_every_trained_tensor_and_nothing_else(folders, name):
    model = small.adapted(folders[name], name)
    model.write(small.randomised(model))
    frozen = {key: value.clone() for key, value in model.base.backbone.state_dict().items() if "lora_" not in key}
    trained = model.train_roles(("A", "B", "head"))
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    model.logits(small.inputs(name)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in trained.values())
    optimizer.step()
    heads = {id(parameter) for parameter in trained.values()}
    for key, value in model.base.backbone.state_dict(keep_vars=True).items():
        if key in frozen and id(value) not in heads:
            assert torch.equal(value, frozen[key]), key


@pytest.mark.parametrize("name", small.KINDS)
def test_all_linear_never_touches_the_head(folders, name):
    model = small.adapted(folders[name], name, target_modules=["all-linear"])
    sites = set(model.form.lora_sites())
    linear = {
        key
        for key, module in small.make(name).named_modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    }
    heads = {"classifier", "classifier.dense", "classifier.out_proj", "pre_classifier", "lm_head"}
    assert sites == linear - heads
    assert len(sites) > len(small.adapted(folders[name], name).form.lora_sites())


def test_explicit_targets(folders):
    model = small.adapted(folders["bert"], "bert", target_modules=["key", "output.dense"])
    sites = model.form.lora_sites()
    assert len(sites) == 6 and {site.rpartition(".")[2] for site in sites} == {"key", "dense"}
    assert all(site.endswith((".key", ".output.dense")) for site in sites)
    one = small.adapted(folders["bert"], "bert", target_modules=["bert.encoder.layer.1.attention.self.query"])
    assert one.form.lora_sites() == ["bert.encoder.layer.1.attention.self.query"]


@pytest.mark.parametrize("target", ["q_proj", "uery", "classifier"])
def test_a_wrong_target_lists_what_there_is(folders, target):
    with pytest.raises(InputError, match=rf"(?s)adapter\.target_modules.*'{target}'.*dense, key, query, value"):
        small.adapted(folders["bert"], "bert", target_modules=[target])


def test_causal_models_have_no_head_to_train(folders):
    for name in ("llama", "gpt2"):
        assert small.adapted(folders[name], name).base.heads == {}


def test_without_train_head_the_head_stays(folders):
    model = small.adapted(folders["roberta"], "roberta", train_head=False)
    assert {model.form.role(key) for key in model.parameters} == {"A", "B"}
    model.train_roles(("A", "B", "head"))
    assert not any(parameter.requires_grad for parameter in model.base.heads["classifier"].parameters())


# Heads ----------------------------------------------------------------------------------------------------------------


def test_a_missing_head_is_a_function_of_the_seed(bert_trunk):
    torch.manual_seed(99)
    first = load(bert_trunk, seed=3)
    before = torch.get_rng_state()
    again = load(bert_trunk, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    other = load(bert_trunk, seed=4)
    weights = [base.heads["classifier"].weight for base in (first, again, other)]
    assert tuple(weights[0].shape) == (small.LABELS, small.WIDTH)
    assert torch.equal(weights[0], weights[1]) and not torch.allclose(weights[0], weights[2])
    trunks = [base.backbone.bert.encoder.layer[0].attention.self.query.weight for base in (first, other)]
    assert torch.equal(trunks[0], trunks[1])


def test_a_head_of_another_size_is_drawn_anew(folders):
    base = load(folders["bert"], labels=5)
    assert base.heads["classifier"].weight.shape[0] == 5
    kept = load(folders["bert"]).heads["classifier"].weight
    assert torch.equal(kept, small.make("bert").classifier.weight)


def test_a_sentence_encoder_gets_a_mean_pooled_head(bert_trunk, tmp_path):
    shutil.copytree(bert_trunk, tmp_path / "encoder")
    (tmp_path / "encoder" / "modules.json").write_text("[]")
    base = load(tmp_path / "encoder")
    assert type(base.backbone).__name__ == "BertModel" and set(base.heads) == {"classifier"}
    assert type(load(tmp_path / "encoder", pooling="model").backbone).__name__ == "BertForSequenceClassification"
    assert type(load(bert_trunk, pooling="mean").backbone).__name__ == "BertModel"
    assert type(load(bert_trunk).backbone).__name__ == "BertForSequenceClassification"


def test_mean_pooling_is_the_mean_of_the_real_tokens(bert_trunk):
    base = load(bert_trunk, pooling="mean")
    batch = small.inputs("bert")
    hidden = base.backbone(**batch).last_hidden_state
    rows = []
    for index in range(3):
        tokens = [hidden[index, place] for place in range(4) if batch["attention_mask"][index, place] == 1]
        mean = torch.stack(tokens).double().mean(0)
        rows.append(mean / mean.norm() * small.WIDTH**0.5)
    expected = torch.nn.functional.linear(
        torch.stack(rows),
        *(value.double() for value in (base.heads["classifier"].weight, base.heads["classifier"].bias)),
    )
    torch.testing.assert_close(base.forward(batch).double(), expected, atol=1e-5, rtol=1e-5)


def test_padding_changes_no_score(bert_trunk):
    base = load(bert_trunk, pooling="mean")
    batch = small.inputs("bert")
    together = base.forward(batch)
    for index in range(3):
        length = int(batch["attention_mask"][index].sum())
        alone = base.forward({key: value[index : index + 1, :length] for key, value in batch.items()})
        torch.testing.assert_close(alone[0], together[index], atol=1e-5, rtol=1e-5)


def test_mean_pool_by_hand():
    hidden = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [99.0, 99.0]]])
    pooled = mean_pool(hidden, torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(pooled, torch.tensor([[0.6, 0.8]]) * 2**0.5)
    assert torch.isfinite(mean_pool(hidden, torch.zeros(1, 3, dtype=torch.long))).all()


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_a_mean_pooled_head_is_a_function_of_the_seed(bert_trunk, pooling):
    weights = [load(bert_trunk, seed=seed, pooling=pooling).heads["classifier"].weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1]) and not torch.allclose(weights[0], weights[2])


# dtypes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", small.KINDS)
def test_a_bfloat16_base_keeps_a_float32_adapter(folders, name):
    model = small.adapted(folders[name], name, model={"dtype": "bfloat16"})
    own = {id(parameter) for parameter in model.parameters.values()}
    rest = {value.dtype for value in model.base.backbone.parameters() if id(value) not in own}
    assert rest == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters.values()} == {torch.float32}
    exact = small.adapted(folders[name], name)
    state = small.randomised(exact)
    exact.write(state)
    model.write(state)
    assert model.state().sha256() == state.sha256()
    torch.testing.assert_close(
        model.logits(small.inputs(name)).float(), exact.logits(small.inputs(name)), atol=0.05, rtol=0.05
    )
    trained = model.train_roles(("A", "B", "head"))
    model.logits(small.inputs(name)).float().square().sum().backward()
    assert all(value.grad is not None and torch.isfinite(value.grad).all() for value in trained.values())


def test_a_bfloat16_sentence_encoder_scores(bert_trunk):
    rough = load(bert_trunk, pooling="mean", dtype="bfloat16").forward(small.inputs("bert"))
    assert rough.dtype == torch.float32
    torch.testing.assert_close(
        rough, load(bert_trunk, pooling="mean").forward(small.inputs("bert")), atol=0.1, rtol=0.1
    )


# Embedded models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_models_do_not_depend_on_the_seed(name):
    bases = [loading.load(ModelConfig(name=name, task=EMBEDDED[name]), 10, seed) for seed in (0, 1)]
    states = [
        {key: value for key, value in base.backbone.state_dict().items() if not key.startswith("classifier")}
        for base in bases
    ]
    assert states[0] and all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_models_refuse_another_task(name):
    for task in set(EMBEDDED.values()) - {EMBEDDED[name]}:
        with pytest.raises(InputError, match=rf"model\.task: {name} is for {EMBEDDED[name]}, not {task}"):
            loading.load(ModelConfig(name=name, task=task), 10, 0)


def test_the_byte_tokenizer_gives_every_text_back():
    tokenizer = byte_tokenizer()
    text = "naïve Ωmega\t\n\x00 🙂  two  spaces"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) and len(tokenizer) == 258
    assert tokenizer.decode(ids) == text


# Refusals -------------------------------------------------------------------------------------------------------------


def test_no_such_model(tmp_path):
    for name in ("tiny-vitt", str(tmp_path / "nothing"), "no-such-owner/no-such-model"):
        with pytest.raises(InputError, match=r"(?s)model\.name: cannot load .*tiny-vit, tiny-bert, tiny-llama"):
            load(name)


@pytest.mark.parametrize(
    ("name", "task"), [("vit", small.TEXT), ("vit", small.LM), ("bert", small.IMAGE), ("gpt2", small.IMAGE)]
)
def test_a_model_for_another_task(folders, name, task):
    with pytest.raises(InputError, match=rf"model\.name: cannot load .*{name}' for {task}"):
        load(folders[name], task)


def test_an_encoder_is_no_causal_lm(folders):
    """transformers would build one whose attention sees the token that it has to predict."""
    with pytest.raises(InputError, match=r"model\.name: .*bert.*encoder"):
        load(folders["bert"], small.LM)


def test_a_trunk_without_output_layer_is_no_causal_lm(tmp_path):
    with pytest.raises(InputError, match=r"model\.name: .*lacks lm_head"):
        load(small.save("llama", tmp_path / "llama", whole=False), small.LM)


def test_a_folder_without_tokenizer_or_processor(folders, tmp_path):
    for name, task in (("llama", small.LM), ("vit", small.IMAGE)):
        shutil.copytree(folders[name], tmp_path / name)
        for path in (tmp_path / name).iterdir():
            if path.name not in ("config.json", "model.safetensors"):
                path.unlink()
        with pytest.raises(InputError, match=r"model\.name: cannot load"):
            load(tmp_path / name, task)


def test_a_damaged_checkpoint(folders, tmp_path):
    shutil.copytree(folders["bert"], tmp_path / "bert")
    weights = tmp_path / "bert" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model\.name: cannot load"):
        load(tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(InputError, match=r"model\.name: cannot load"):
        load(tmp_path / "bert")


@pytest.mark.parametrize(("name", "task"), [("bert", small.TEXT), ("gpt2", small.LM)])
def test_texts_longer_than_the_model_has_positions(folders, name, task):
    load(folders[name], task, max_length=small.POSITIONS)
    with pytest.raises(InputError, match=rf"model\.max_length=131: .*{name}' takes at most 130 tokens"):
        load(folders[name], task, max_length=131)


def test_a_tokenizer_that_cannot_pad(folders, tmp_path):
    shutil.copytree(folders["llama"], tmp_path / "llama")
    path = tmp_path / "llama" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "pad_token"}))
    base = load(tmp_path / "llama", small.LM)
    assert base.processor.pad_token == "<eos>"
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in ("pad_token", "eos_token")}))
    with pytest.raises(InputError, match="neither a padding nor an end token"):
        load(tmp_path / "llama", small.LM)
