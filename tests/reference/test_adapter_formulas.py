"""What is particular to an adapter of ours: its change of a weight against dense products in float64."""

from __future__ import annotations

import pytest
import torch

from fedpeft import registry
from fedpeft.adapters.factored import tensors_at
from fedpeft.adapters.flat import flatten_adapter
from fedpeft.adapters.svfit import count_leading
from fedpeft.errors import InputError
from fedpeft.merging.base import merge
from fedpeft.models.loading import load
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
