"""Adapters in a model: written and read back, at smaller ranks, with residuals; every state as a plain LoRA."""

from __future__ import annotations

import pytest
import torch

from fedpeft import seeds
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


# In the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_written_is_read_back_and_computed(folders, name):
    model = small.adapted(folders[name], name)
    state = small.randomised(model)
    model.write(state)
    assert model.state().sha256() == state.sha256() == model.read(state).sha256()
    got, bare = (
        part.logits
        for part in (
            small.merged_by_hand(name, state)(**small.inputs(name)),
            small.make(name).eval()(**small.inputs(name)),
        )
    )
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
    return AdapterState(
        {
            key: value[:rank] if state.role(key) == "A" else value[:, :rank] if state.role(key) == "B" else value
            for key, value in state.tensors.items()
        },
        state.sites,
    )


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
        steps = optimizer(trained.values(), lr=0.002, weight_decay=0.01)
        batch = {
            key: value.double() if value.is_floating_point() else value for key, value in small.inputs(name).items()
        }
        for _ in range(5):
            steps.zero_grad()
            model.logits(batch).square().sum().backward()
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
    layers = {site: model.base.layer(site) for site in model.form.lora_sites()}
    originals = {site: layer.weight.detach().clone() for site, layer in layers.items()}
    plain = small.randomised(model)
    first, second = small.with_residual(plain, seed=5), small.with_residual(plain, seed=6, rank=2)
    for state in (first, second):  # the second replaces the first, it does not add to it
        model.write(state)
        for site, layer in layers.items():
            change = state[f"{site}/residual_B"].double() @ state[f"{site}/residual_A"].double()
            assert change.abs().max() > 0.1
            expected = originals[site].double() + (change.T if name == "gpt2" else change)
            torch.testing.assert_close(layer.weight.double(), expected, atol=1e-6, rtol=1e-6)
        expected = small.merged_by_hand(name, state)(**small.inputs(name)).logits
        torch.testing.assert_close(model.logits(small.inputs(name)), expected, atol=1e-4, rtol=1e-3)
    model.write(plain)
    assert all(torch.equal(layer.weight, originals[site]) for site, layer in layers.items())
    model.write(plain)
    assert all(torch.equal(layer.weight, originals[site]) for site, layer in layers.items())


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
    expected = small.merged_by_hand("bert", state)(**small.inputs("bert")).logits
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
    expected = small.merged_by_hand(name, state)(**small.inputs(name)).logits
    torch.testing.assert_close(model.logits(small.inputs(name)), expected, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(expected, bare, atol=1e-2)
    assert set(model.train_roles(("R",))) == {f"{site}/R" for site in start.lora_sites()}


@pytest.mark.parametrize("init", ["weights", "random"])
def test_lora_sb_factors_are_orthonormal_and_public(folders, init):
    made = [
        small.adapted(folders["bert"], "bert", seed=seed, r=3, options={"init": init}, method="lora_sb").state()
        for seed in (0, 0, 1)
    ]
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


# Plain factors --------------------------------------------------------------------------------------------------------


def toy(**roles):
    tensors = {f"q/{role}": value for role, value in roles.items()}
    return AdapterState(
        {**tensors, "head/weight": torch.ones(2, 2)},
        {"q": AdaptedLayer("lora", (5, 4), 0.5), "head": AdaptedLayer("head", (2, 2))},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_flat_is_the_same_change(dtype, core, residual):
    draw = seeds.torch_generator(0, "flat")
    roles = {"A": (2, 4), "B": (5, 2)} | ({"R": (2, 2)} if core else {})
    roles |= {"residual_A": (3, 4), "residual_B": (5, 3)} if residual else {}
    state = toy(**{role: torch.randn(shape, generator=draw, dtype=dtype) for role, shape in roles.items()})
    before = state.sha256()
    plain = flatten_adapter(state)
    assert set(plain.tensors) == {"q/A", "q/B", "head/weight"}
    assert plain.sites["q"] == AdaptedLayer("lora", (5, 4), 0.5) and plain.rank("q") == (5 if residual else 2)
    assert plain["q/A"].dtype == plain["q/B"].dtype == dtype
    torch.testing.assert_close(
        small.dense(plain, "q"), small.dense(state, "q"), atol=1e-6 if dtype == torch.float32 else 1e-14, rtol=1e-5
    )
    assert state.sha256() == before
    assert torch.equal(plain["head/weight"], state["head/weight"])
    assert flatten_adapter(plain).sha256() == plain.sha256()
