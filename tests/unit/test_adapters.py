"""Adapters in a model and on disk: written and read back, at smaller ranks, with residuals, as folders of stock peft."""

from __future__ import annotations

import json
from dataclasses import replace

import peft
import pytest
import small_models as small
import torch
import transformers
from safetensors.torch import load_file, save_file

from fedpeft import seeds
from fedpeft.adapters import folder
from fedpeft.adapters.flat import flat
from fedpeft.errors import InputError
from fedpeft.state import AdapterState, Site

# gpt2 stores its weights [in, out]; roberta's head has two layers.
ARCHITECTURES = ["bert", "gpt2", "vit", "roberta"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: small.save(name, root / name) for name in ARCHITECTURES}


def dense(state, site):
    """What the state adds to the site's weight [out, in], in float64."""
    change = state[f"{site}/B"].double()
    if f"{site}/R" in state:
        change = change @ state[f"{site}/R"].double()
    change = state.sites[site].scaling * change @ state[f"{site}/A"].double()
    if f"{site}/residual_B" in state:
        change = change + state[f"{site}/residual_B"].double() @ state[f"{site}/residual_A"].double()
    return change


def merged_by_hand(name, state):
    """The bare transformers model with every change added to its weights, and the head put in."""
    model = small.make(name).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in state.tensors.items():
            if state.role(key) == "head":
                parameters[key.replace("/", ".")].copy_(value)
        for site in state.lora_sites():
            weight = parameters[f"{site}.weight"]
            change = dense(state, site).float()
            weight += change.T if type(model.get_submodule(site)).__name__ == "Conv1D" else change
    return model


def with_residual(state, seed=5, rank=3):
    generator = torch.Generator().manual_seed(seed)
    new = {}
    for site in state.lora_sites():
        out, width = state.sites[site].shape
        new[f"{site}/residual_B"] = torch.randn(out, rank, generator=generator) * 0.3
        new[f"{site}/residual_A"] = torch.randn(rank, width, generator=generator) * 0.3
    return state.replace(new)


# In the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_written_is_read_back_and_computed(folders, name):
    model = small.adapted(folders[name], name)
    state = small.randomised(model)
    model.write(state)
    assert model.state().sha256() == state.sha256() == model.read(state).sha256()
    got, bare = (part.logits for part in (merged_by_hand(name, state)(**small.inputs(name)), small.make(name).eval()(**small.inputs(name))))
    torch.testing.assert_close(model.logits(small.inputs(name)), got, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(got, bare, atol=1e-3)


def test_read_gives_copies(folders):
    model = small.adapted(folders["bert"], "bert")
    state, part = model.state(), model.read(model.state())
    before = state.sha256()
    for value in (*state.tensors.values(), *part.tensors.values()):
        value.add_(1)
    assert model.state().sha256() == before


def test_a_tensor_without_a_place_is_an_error(folders):
    model = small.adapted(folders["bert"], "bert")
    with pytest.raises(KeyError, match="nowhere"):
        model.write(AdapterState({"nowhere/A": torch.zeros(1, 1)}, {}))


def cut(state, rank):
    """The leading rows of A and columns of B."""
    return AdapterState({key: value[:rank] if state.role(key) == "A" else value[:, :rank] if state.role(key) == "B" else value
                         for key, value in state.tensors.items()}, state.sites)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_smaller_rank_trains_as_a_model_of_that_rank(folders, name, optimizer):
    """Rank 2 in a model of rank 5, against a model of rank 2 with the same scaling; float64, five steps."""
    wide = small.adapted(folders[name], name, r=5, alpha=10.0)
    narrow = small.adapted(folders[name], name, r=2, alpha=4.0)
    start = cut(small.randomised(wide), 2)
    assert {start.rank(site) for site in start.lora_sites()} == {2}
    ends = []
    for model in (wide, narrow):
        model.write(small.randomised(model, seed=9))  # what an earlier client left behind
        model.write(start)
        model.base.backbone.double()
        trained = model.train_roles(("A", "B", "head"))
        steps = optimizer(trained.values(), lr=0.05, weight_decay=0.01)
        batch = {key: value.double() if value.is_floating_point() else value for key, value in small.inputs(name).items()}
        for _ in range(5):
            steps.zero_grad()
            model.logits(batch).square().mean().backward()
            steps.step()
        ends.append(model.read(start))
    assert ends[0].distance(start) > 0.01
    for key, value in ends[1].tensors.items():
        torch.testing.assert_close(ends[0][key], value, atol=1e-12, rtol=1e-9, msg=key)
    for site in start.lora_sites():
        assert torch.count_nonzero(wide.parameters[f"{site}/A"][2:]) == 0
        assert torch.count_nonzero(wide.parameters[f"{site}/B"][:, 2:]) == 0


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_residual_goes_into_the_base_and_out_again(folders, name):
    model = small.adapted(folders[name], name)
    originals = {site: layer.weight.detach().clone() for site, layer in model.frozen.items()}
    plain = small.randomised(model)
    first, second = with_residual(plain, seed=5), with_residual(plain, seed=6, rank=2)
    for state in (first, second):  # the second replaces the first, it does not add to it
        model.write(state)
        for site, layer in model.frozen.items():
            change = state[f"{site}/residual_B"].double() @ state[f"{site}/residual_A"].double()
            assert change.abs().max() > 0.1
            expected = originals[site].double() + (change.T if name == "gpt2" else change)
            torch.testing.assert_close(layer.weight.double(), expected, atol=1e-6, rtol=1e-6)
        expected = merged_by_hand(name, state)(**small.inputs(name)).logits
        torch.testing.assert_close(model.logits(small.inputs(name)), expected, atol=1e-4, rtol=1e-3)
    model.write(plain)
    assert all(torch.equal(layer.weight, originals[site]) for site, layer in model.frozen.items())
    model.write(plain)
    assert all(torch.equal(layer.weight, originals[site]) for site, layer in model.frozen.items())


def test_fresh_adapters_are_a_function_of_the_seed(folders):
    states = [small.adapted(folders["bert"], "bert", seed=seed).state() for seed in (0, 0, 1)]
    assert states[0].sha256() == states[1].sha256() != states[2].sha256()
    for site in states[0].lora_sites():
        assert torch.count_nonzero(states[0][f"{site}/B"]) == 0
        bound = small.WIDTH**-0.5  # Kaiming-uniform with a = sqrt 5
        assert 0.5 * bound < states[0][f"{site}/A"].abs().max() <= bound
        assert not torch.equal(states[0][f"{site}/A"], states[2][f"{site}/A"])


def test_rslora_scales_by_the_root_of_the_rank(folders):
    model = small.adapted(folders["bert"], "bert", r=4, alpha=8.0, rslora=True)
    assert {model.sites[site].scaling for site in model.form.lora_sites()} == {4.0}
    state = small.randomised(model)
    model.write(state)
    expected = merged_by_hand("bert", state)(**small.inputs("bert")).logits
    torch.testing.assert_close(model.logits(small.inputs("bert")), expected, atol=1e-5, rtol=1e-4)


# LoRA-SB --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("init", ["weights", "random"])
def test_lora_sb_computes_s_B_R_A(folders, name, init):
    model = small.adapted(folders[name], name, r=3, alpha=6.0, options={"init": init}, method="lora_sb")
    start = model.state()
    bare = small.make(name).eval()(**small.inputs(name)).logits
    torch.testing.assert_close(model.logits(small.inputs(name)), bare, atol=1e-5, rtol=1e-4)
    generator = torch.Generator().manual_seed(0)
    state = start.replace({f"{site}/R": torch.randn(3, 3, generator=generator) for site in start.lora_sites()})
    model.write(state)
    expected = merged_by_hand(name, state)(**small.inputs(name)).logits
    torch.testing.assert_close(model.logits(small.inputs(name)), expected, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(expected, bare, atol=1e-2)
    assert set(model.train_roles(("R",))) == {f"{site}/R" for site in start.lora_sites()}


@pytest.mark.parametrize("init", ["weights", "random"])
def test_lora_sb_factors_are_orthonormal_and_public(folders, init):
    made = [small.adapted(folders["bert"], "bert", seed=seed, r=3, options={"init": init}, method="lora_sb").state() for seed in (0, 0, 1)]
    assert made[0].sha256() == made[1].sha256()
    site = made[0].lora_sites()[0]
    for state in made:
        B, A = state[f"{site}/B"], state[f"{site}/A"]
        torch.testing.assert_close(B.T @ B, torch.eye(3), atol=1e-6, rtol=0)
        torch.testing.assert_close(A @ A.T, torch.eye(3), atol=1e-6, rtol=0)
    assert torch.equal(made[0][f"{site}/A"], made[2][f"{site}/A"]) == (init == "weights")
    if init == "weights":
        weight = small.make("bert").get_submodule(site).weight.detach()
        U, _, Vt = torch.linalg.svd(weight)
        torch.testing.assert_close((U[:, :3].T @ made[0][f"{site}/B"]).abs(), torch.eye(3), atol=1e-4, rtol=0)
        torch.testing.assert_close((Vt[:3] @ made[0][f"{site}/A"].T).abs(), torch.eye(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("init", ["weights", "random"])
def test_lora_sb_refuses_a_rank_above_the_weight(folders, init):
    with pytest.raises(InputError, match=r"adapter\.r=17: .* is 16 x 16"):
        small.adapted(folders["bert"], "bert", r=17, options={"init": init}, method="lora_sb")


# Folders --------------------------------------------------------------------------------------------------------------


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


AUTO = {small.TEXT: "AutoModelForSequenceClassification", small.LM: "AutoModelForCausalLM", small.IMAGE: "AutoModelForImageClassification"}


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
        expected = merged_by_hand(name, state)(**small.inputs(name)).logits
        got = stock(folders[name], name, path)(**small.inputs(name)).logits
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)
        bare = small.make(name).eval()(**small.inputs(name)).logits
        assert not torch.allclose(got, bare, atol=1e-2)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_flat_states_of_every_kind_load_in_stock_peft(folders, name, tmp_path):
    plain = with_residual(small.randomised(small.adapted(folders[name], name)))
    core = small.randomised(small.adapted(folders[name], name, method="lora_sb"), scale=0.5)
    for index, state in enumerate((plain, core, with_residual(core))):
        path = tmp_path / str(index)
        folder.save(flat(state), path, base=str(folders[name]), task=small.KINDS[name][0])
        expected = merged_by_hand(name, state)(**small.inputs(name)).logits
        torch.testing.assert_close(stock(folders[name], name, path)(**small.inputs(name)).logits, expected, atol=1e-4, rtol=1e-3)


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
@pytest.mark.parametrize("options", [
    {}, {"use_rslora": True}, {"rank_pattern": {"layer.1.attention.self.query": 2}, "alpha_pattern": {"query": 20}},
    {"rank_pattern": {"1.*query": 3}, "alpha_pattern": {r".*\.0\..*value": 1, "1.attn.c_attn": 30}, "use_rslora": True},
    {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
], ids=["plain", "rslora", "patterns", "regex patterns", "head"])
def test_folders_made_by_peft_are_read_with_their_scaling(name, options, tmp_path):
    if name == "gpt2" and "modules_to_save" in options:
        options = {"task_type": "CAUSAL_LM"}
    expected = made_by_peft(name, tmp_path / "made", **options)
    state = folder.load(tmp_path / "made")
    got = merged_by_hand(name, state)(**small.inputs(name)).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)
    if options.get("use_rslora") and len(options) == 1:
        assert {site.scaling for site in state.sites.values()} == {3.0}


@pytest.mark.parametrize("options", [
    {"use_dora": True}, {"bias": "lora_only"}, {"bias": "all"}, {"lora_bias": True}, {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora"},
], ids=str)
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


@pytest.mark.parametrize(("change", "message"), [
    ({"lora_alpha": None}, "lora_alpha is None"), ({"peft_type": None}, "peft_type is None"), ([], "holds list"),
])
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
    state = AdapterState({"classifier/weight": torch.ones(2, 2)}, {"classifier": Site("head", (2, 2))})
    with pytest.raises(InputError, match="no LoRA factor"):
        folder.save(state, tmp_path / "out", base="x")


# Plain factors --------------------------------------------------------------------------------------------------------


def toy(**roles):
    tensors = {f"q/{role}": value for role, value in roles.items()}
    return AdapterState({**tensors, "head/weight": torch.ones(2, 2)}, {"q": Site("lora", (5, 4), 0.5), "head": Site("head", (2, 2))})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_flat_is_the_same_change(dtype, core, residual):
    draw = seeds.torch_generator(0, "flat")
    roles = {"A": (2, 4), "B": (5, 2)} | ({"R": (2, 2)} if core else {})
    roles |= {"residual_A": (3, 4), "residual_B": (5, 3)} if residual else {}
    state = toy(**{role: torch.randn(shape, generator=draw, dtype=dtype) for role, shape in roles.items()})
    before = state.sha256()
    plain = flat(state)
    assert set(plain.tensors) == {"q/A", "q/B", "head/weight"}
    assert plain.sites["q"] == Site("lora", (5, 4), 0.5) and plain.rank("q") == (5 if residual else 2)
    assert plain["q/A"].dtype == plain["q/B"].dtype == dtype
    torch.testing.assert_close(dense(plain, "q"), dense(state, "q"), atol=1e-6 if dtype == torch.float32 else 1e-14, rtol=1e-5)
    assert state.sha256() == before
    assert torch.equal(plain["head/weight"], state["head/weight"])
    assert flat(plain).sha256() == plain.sha256()
