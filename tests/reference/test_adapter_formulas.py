"""What is particular to an adapter of ours: its change of a weight against dense products in float64."""

from __future__ import annotations

import pytest
import torch

from fedpeft import registry
from fedpeft.adapters import folder
from fedpeft.adapters.adapted import build
from fedpeft.adapters.factored import tensors_at
from fedpeft.adapters.flat import flatten_adapter
from fedpeft.adapters.svfit import count_leading
from fedpeft.config import AdapterConfig, ModelConfig
from fedpeft.errors import InputError
from fedpeft.merging.base import merge
from fedpeft.models.loading import load
from fedpeft.run.export import read_mergeable
from support import small_models as small
from support.own_adapters import adapted, moved

CLOSE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return small.save("bert", tmp_path_factory.mktemp("models") / "bert")


def layers_of(path, name, options, scale=0.2):
    """W, the change of W, s and the tensors of each adapted layer, in float64, after all that trains has moved."""
    model = adapted(path, name, options)
    state = moved(model, name, scale=scale)
    plain = load(small.ModelConfig(name=str(path), task=small.TEXT), small.LABELS, 0)
    for site in state.lora_sites():
        W, s = plain.values(site).double(), state.sites[site].scaling
        B, A = registry.load("adapters", name).fold(
            {role: value.double() for role, value in tensors_at(state, site).items()}, tuple(W.shape)
        )
        yield W, s * B @ A, s, {role: value.double() for role, value in tensors_at(state, site).items()}


def test_svfit_moves_singular_values_and_leaves_their_vectors(path):
    for W, change, s, own in layers_of(path, "svfit", {}, scale=0.01):
        r = len(own["d"])
        S, after = torch.linalg.svdvals(W), torch.linalg.svdvals(W + change)
        expected = torch.cat([S[:r] + s * own["d"], S[r:]]).sort(descending=True).values
        torch.testing.assert_close(after, expected, **CLOSE)


def test_clip_svd_moves_all_singular_values_whatever_the_rank_is(path):
    for W, change, s, own in layers_of(path, "svfit", {"energy": 1.0}):
        assert len(own["d"]) == min(W.shape)
        U, S, V = torch.linalg.svd(W)
        torch.testing.assert_close((U.T @ (W + change) @ V.T).diagonal(), S + s * own["d"], **CLOSE)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_the_rank_of_svfit_is_the_smallest_with_the_energy(energy):
    S = torch.linalg.svdvals(torch.randn(30, 20, generator=torch.Generator().manual_seed(0)))
    r = count_leading(S, energy)
    whole = S.square().sum()
    assert S[:r].square().sum() >= (energy - 1e-6) * whole and (S[: r - 1].square().sum() < energy * whole)


def test_loldu_moves_the_diagonal_of_the_triangular_factors(path):
    for W, change, s, own in layers_of(path, "loldu", {}):
        r = len(own["d"])
        P, L, U = torch.linalg.lu(W)
        D = U.diagonal()
        moved_diagonal = torch.cat([D[:r] + s * own["d"], D[r:]])
        torch.testing.assert_close(W + change, P @ L @ torch.diag(moved_diagonal) @ (U / D[:, None]), **CLOSE)
        assert bool((torch.linalg.svdvals(change)[r:] < 1e-6).all())


def test_a_pivot_of_zero_leaves_a_finite_row():
    W = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [1.0, 0.0, 1.0]])  # of rank 2
    found = registry.load("adapters", "loldu")().start(W, 3, 1.0, torch.Generator())
    assert all(bool(torch.isfinite(value).all()) and float(value.abs().max()) < 10 for value in found.values())


def test_salt_scales_and_shifts_the_leading_values_and_changes_the_others_subspace(path):
    for W, change, s, own in layers_of(path, "salt", {}):
        q = len(own["a"])
        U, S, V = torch.linalg.svd(W)
        inside = U.T @ change @ V.T
        wanted = torch.zeros_like(inside)
        wanted[:q, :q] = torch.diag(s * (own["a"] * S[:q] + own["b"]))
        torch.testing.assert_close(inside[:q], wanted[:q], **CLOSE)
        torch.testing.assert_close(inside[:, :q], wanted[:, :q], **CLOSE)
        # The signs of both bases are free, so the rest is compared by what no sign changes.
        got, product = torch.linalg.svdvals(inside[q:, q:]), torch.linalg.svdvals(s * own["X"] @ own["Y"])
        torch.testing.assert_close(got, product, **CLOSE)
        assert float(product[0]) > 0.1


def test_loca_has_n_coefficients_of_a_cosine_transform(path):
    for W, change, s, own in layers_of(path, "loca", {}):
        spectrum = transform(W.shape[0]) @ change @ transform(W.shape[1]).T
        kept = spectrum.abs() > 1e-6
        assert int(kept.sum()) == len(own["a"])
        torch.testing.assert_close(spectrum[kept].sort().values, (s * own["a"]).sort().values, **CLOSE)


def transform(size):
    """The orthonormal DCT-II, entry by entry."""
    rows, columns = torch.meshgrid(*[torch.arange(size, dtype=torch.float64)] * 2, indexing="ij")
    waves = torch.cos(torch.pi * rows * (2 * columns + 1) / (2 * size)) * (2 / size) ** 0.5
    waves[0] /= 2**0.5
    return waves


def test_loca_of_more_coefficients_than_the_layer_has_rank(path):
    """As many columns of the folder as the transform has, not as there are coefficients."""
    model = small.adapted(path, "bert", method="loca", r=100, alpha=100.0)
    state = moved(model, "loca")
    flat = flatten_adapter(state)
    for site in flat.lora_sites():
        assert flat[f"{site}/A"].shape[0] <= 16 and state[f"{site}/a"].shape == (100,)


def test_slots_of_one_run_seed_are_orthogonal_and_those_of_one_number_are_the_same(path):
    slots = [adapted(path, "orthogonal_adaptation", {"slot": slot}).state() for slot in range(4)]
    again = adapted(path, "orthogonal_adaptation", {"slot": 2}).state()
    for site in again.lora_sites():
        basis = torch.cat([tensors_at(state, site)["A"] for state in slots]).double()
        torch.testing.assert_close(basis @ basis.T, torch.eye(16, dtype=torch.float64), atol=1e-6, rtol=0)
        assert torch.equal(tensors_at(again, site)["A"], tensors_at(slots[2], site)["A"])


def test_the_layer_has_no_fifth_slot(path):
    with pytest.raises(InputError, match=r"adapter\.r=4: .* has at most rank 3 there"):
        adapted(path, "orthogonal_adaptation", {"slot": 4})


def test_runs_in_two_slots_add_up_and_two_in_one_are_refused(path):
    one, two, same = (
        flatten_adapter(moved(adapted(path, "orthogonal_adaptation", {"slot": slot}), "orthogonal_adaptation", seed))
        for slot, seed in ((0, 1), (3, 2), (0, 3))
    )
    result = merge("orthogonal_adaptation", [one, two])
    for site in one.lora_sites():
        change = small.dense(result, site)
        A, B = (one[f"{site}/{role}"].double() for role in "AB")
        # Where the first reads, the sum says what the first says.
        torch.testing.assert_close(change @ A.T, one.sites[site].scaling * B @ (A @ A.T), **CLOSE)
    with pytest.raises(InputError, match="overlaps an earlier one's"):
        merge("orthogonal_adaptation", [one, same])


# Those that are no product of factors ---------------------------------------------------------------------------------


def placed(path, name, options, **section):
    """The model with all that trains moved, a bare one, and the tensors of each adapted layer, all in float64."""
    model = adapted(path, name, options, **section)
    state = moved(model, name)
    model.write(state)
    plain = load(small.ModelConfig(name=str(path), task=small.TEXT), small.LABELS, 0)
    own = {site: {role: value.double() for role, value in tensors_at(state, site).items()} for site in model.form.sites}
    return model.base.backbone.double(), plain.backbone.double(), {key: value for key, value in own.items() if value}


def test_hydra_is_a_layer_of_the_weight_and_the_bias_that_it_says(path):
    model, plain, own = placed(path, "hydra", {})
    found = {site: tensors for site, tensors in own.items() if "A_p" in tensors}
    assert len(found) == 4
    for site, at in found.items():
        layer = plain.get_submodule(site)
        behind = torch.eye(16, dtype=torch.float64) + 2 * at["B_s"] @ at["A_s"]
        W, b = behind @ layer.weight + 2 * at["B_p"] @ at["A_p"], behind @ layer.bias
        x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(model.get_submodule(site)(x), x @ W.T + b)
        assert float((W - layer.weight - 2 * at["B_p"] @ at["A_p"]).abs().max()) > 0.1  # both pairs count


def test_difffit_trains_norms_biases_and_a_factor_behind_each_block(path):
    model, plain, own = placed(path, "difffit", {}, target_modules=None)
    places = {name for name, part in plain.named_modules() if getattr(part, "bias", None) is not None}
    assert {site for site in own if "d" in own[site] or "g" in own[site]} == places - {"classifier"}
    ends = {name for name in places if name.endswith("output.dense")}
    assert len(ends) == 4 and {site for site in own if own[site].get("g", torch.zeros(2)).numel() == 1} == ends
    with torch.no_grad():
        for site in places - {"classifier"}:
            layer, at = plain.get_submodule(site), own[site]
            if "g" in at:  # of a norm for each output, of a block one for all
                layer.weight *= 1 + (at["g"] if layer.weight.ndim == 1 else at["g"][0])
                layer.bias *= 1 + at["g"]
            layer.bias += at["d"]
        plain.classifier.load_state_dict(model.classifier.state_dict())
    inputs = small.inputs("bert")
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits)


def test_difffit_takes_norms_alone_and_refuses_what_it_has_no_place_at(path):
    _, _, own = placed(path, "difffit", {}, target_modules=["LayerNorm"])
    norms = {site: set(tensors) for site, tensors in own.items() if site != "classifier"}
    assert len(norms) == 5 and all(roles == {"g", "d"} for roles in norms.values())
    with pytest.raises(InputError, match=r"target_modules: no norm, .* ends in 'nowhere'. There are: LayerNorm, dense"):
        adapted(path, "difffit", {}, target_modules=["nowhere"])


def test_a_norm_that_adds_one_to_its_weight_trains_and_is_not_merged(tmp_path):
    """Gemma's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(small.tokenizer())}
        small.transformers.GemmaForCausalLM(small.transformers.GemmaConfig(**sizes)).save_pretrained(tmp_path / "base")
    small.tokenizer().save_pretrained(tmp_path / "base")
    config = ModelConfig(name=str(tmp_path / "base"), task=small.LM)
    model, inputs = build(config, AdapterConfig(name="difffit"), small.LABELS, 0), small.inputs("llama")
    before = model.logits(inputs)
    model.write(moved(model, "difffit"))
    assert float((model.logits(inputs) - before).detach().abs().max()) > 1e-2
    folder.save(model.state(), tmp_path / "out", base=config.name, task=small.LM, settings=model.folder)
    with pytest.raises(InputError, match="GemmaRMSNorm is more than its weight times a norm"):
        read_mergeable(tmp_path / "out")(load(config, small.LABELS, 0))


@pytest.mark.parametrize(("kind", "options"), [("int8", {}), ("nf4", {"group": 64})])
def test_peqa_moves_the_scales_of_a_quantised_base_and_nothing_else(kind, options):
    section = AdapterConfig(name="peqa", target_modules=["query", "output.dense"], options=options)
    config = ModelConfig(name="tiny-bert", task=small.TEXT, quantization=kind)
    model, other = build(config, section, small.LABELS, 0), load(config, small.LABELS, 0)
    state = moved(model, "peqa").without(["head"])
    model.write(model.state().replace(state.tensors))
    for site in state.lora_sites():
        weight, a = other.layer(site).weight, state[f"{site}/a"]
        assert a.shape == (weight.SCB.shape[0], 1) if kind == "int8" else a.numel() == len(weight.quant_state.absmax)
        one = torch.eye(other.shape(site)[1])
        before, after = other.layer(site)(one), model.base.backbone.get_submodule(site)(one).detach()
        if kind == "int8":
            weight.SCB *= 1 + a[:, 0]
        else:
            weight.quant_state.absmax *= 1 + a.flatten()
        scaled = other.layer(site)(one)
        torch.testing.assert_close(after, scaled, atol=1e-7, rtol=1e-5)
        assert float((before - scaled).norm()) > 0.1 * float(before.norm())


def test_peqa_says_that_a_base_in_float_is_not_quantised(path, caplog):
    adapted(path, "peqa", {"group": 5})
    assert "peqa: model.quantization=null, so that the weights stay as they are" in caplog.text


def test_a_group_of_inputs_has_a_scale_of_its_own(path):
    model, plain, own = placed(path, "peqa", {"group": 5})
    for site in (site for site, tensors in own.items() if "a" in tensors):
        W, a = plain.get_submodule(site).weight, own[site]["a"]
        assert a.shape == (16, 4)
        scaled = torch.stack([W[:, i] * (1 + a[:, i // 5]) for i in range(16)], dim=1)
        x = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(model.get_submodule(site)(x), x @ scaled.T + plain.get_submodule(site).bias)
