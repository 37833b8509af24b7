"""Every merger but OPCM against slow dense references, numpy float64, and what its paper promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.errors import InputError
from fedpeft.merging.base import make, merge
from fedpeft.merging.methods.lora_squeeze import squeeze
from fedpeft.merging.methods.orthogonal_adaptation import initial, rows
from fedpeft.state import AdaptedLayer, AdapterState, StateMismatch
from support.merging_parts import ALIKE, SHAPES, UNLIKE, adapter, change, close

HEADS = np.stack([one["out/weight"].numpy() for one in UNLIKE])

# Means and sums ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [("running_average", {}), ("lora_squeeze", {"rank": 9}), ("metrics_weighted", {"by": "step", "p": 0.0})],
)
def test_a_mean_is_that_of_the_products_with_unequal_ranks_and_scalings(name, options):
    result = merge(name, UNLIKE, options)
    for site in SHAPES:
        assert close(change(result, site), np.mean([change(one, site) for one in UNLIKE], axis=0))
        assert result.sites[site].scaling == 2.0
    assert close(result["out/weight"].numpy(), HEADS.mean(axis=0))
    assert (result.rank("u"), result.rank("v")) == (7, 5)  # ranks 2 + 3 + 1 + 2 = 8, at most the width


def test_task_arithmetic_is_the_scaled_sum_in_any_order():
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        result = merge("task_arithmetic", [UNLIKE[index] for index in order], {"lambda": 0.7})
        for site in SHAPES:
            assert close(change(result, site), 0.7 * sum(change(one, site) for one in UNLIKE))


def test_a_negated_task_leaves_nothing_behind():
    """Subtracting what was added gives the others alone, and their rank."""
    result = merge("task_arithmetic", [*ALIKE[:3], ALIKE[1]], {"lambda": 1.0}, [1, 1, 1, -1])
    for site in SHAPES:
        assert close(change(result, site), change(ALIKE[0], site) + change(ALIKE[2], site))
        assert result.rank(site) == 4
    nothing = merge("task_arithmetic", [ALIKE[0], ALIKE[0]], {}, [1, -1])
    assert all(close(change(nothing, site), 0 * change(nothing, site), 1e-14) for site in SHAPES)
    assert nothing.rank("u") == 1 and not nothing["u/A"].any()  # peft takes no rank of zero
    alone = merge("task_arithmetic", [ALIKE[0]], {"lambda": 1.0}, [-2])
    assert close(change(alone, "u"), -2 * change(ALIKE[0], "u"))


# Metrics-weighted averaging ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "numbers", "weights"),
    [
        ({"p": 2.0}, [0.5, 1.0, 2.0, 0.25], [4, 1, 0.25, 16]),
        ({"p": 0.0}, [0.5, 1.0, 2.0, 0.25], [1, 1, 1, 1]),
        ({"p": 1e5}, [0.5, 1.0, 2.0, 0.25], [0, 0, 0, 1]),  # 0.25^-1e5 is beyond float64
        ({"p": 1e5}, [1e-3, 1.0, 2.0, 0.25], [1, 0, 0, 0]),
        ({"by": "step", "p": 1.0}, None, [1, 2, 3, 4]),
        ({"by": "step", "p": 2.0}, [10, 5, 10, 20], [4, 1, 4, 16]),
        ({"by": "step", "p": 1e5}, None, [0, 0, 0, 1]),
    ],
)
def test_metrics_weighted_weighs_products_and_heads_by_the_power_law(options, numbers, weights):
    result, weights = merge("metrics_weighted", UNLIKE, options, numbers), np.array(weights) / sum(weights)
    for site in SHAPES:
        wanted = sum(weight * change(one, site) for weight, one in zip(weights, UNLIKE, strict=True))
        assert close(change(result, site), wanted)
    assert close(result["out/weight"].numpy(), np.tensordot(weights, HEADS, 1))


def test_metrics_weighted_needs_positive_losses():
    with pytest.raises(InputError, match="by=loss needs the loss"):
        merge("metrics_weighted", ALIKE)
    with pytest.raises(InputError, match="number=0: a loss must be positive"):
        merge("metrics_weighted", ALIKE, {}, [1, 1, 0, 1])


# LoRA-Squeeze --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_squeezing_loses_the_discarded_singular_values(rank):
    wide = adapter(5, rank=5, scaling=3.0)
    result = squeeze(wide, rank)
    for site in SHAPES:
        values = np.linalg.svd(change(wide, site), compute_uv=False)
        error = ((change(result, site) - change(wide, site)) ** 2).sum()
        assert error == pytest.approx((values[rank:5] ** 2).sum(), rel=1e-9, abs=1e-20)
        assert result.rank(site) == rank
        left, right = result[f"{site}/B"].T @ result[f"{site}/B"], result[f"{site}/A"] @ result[f"{site}/A"].T
        assert close(left.numpy(), right.numpy())  # both carry the square root of the singular values
    assert torch.equal(result["out/weight"], wide["out/weight"])


def test_many_merges_do_not_pile_up_truncations():
    """Only the result is truncated: the best approximation of the mean of all four."""
    result = merge("lora_squeeze", UNLIKE, {"rank": 2})
    for site in SHAPES:
        U, S, Vt = np.linalg.svd(np.mean([change(one, site) for one in UNLIKE], axis=0), full_matrices=False)
        assert close(change(result, site), (U[:, :2] * S[:2]) @ Vt[:2])
    state = make("lora_squeeze", {"rank": 2}).fold(UNLIKE)
    values = [
        np.linalg.svd(np.mean([change(one, site) for one in UNLIKE], axis=0), compute_uv=False) ** 2 for site in SHAPES
    ]
    share = sum(value[:2].sum() for value in values) / sum(value.sum() for value in values)
    assert make("lora_squeeze", {"rank": 2}).notes(state) == [f"rank 2 keeps {share:.2%} of the squared norm"]


# LoRA-LEGO -----------------------------------------------------------------------------------------------------------


def shuffled(one, seed):
    order = torch.randperm(one.rank("u"), generator=torch.Generator().manual_seed(seed))
    tensors = {
        f"{site}/{role}": one[f"{site}/{role}"][order] if role == "A" else one[f"{site}/{role}"][:, order]
        for site in SHAPES
        for role in "AB"
    }
    return one.replace(tensors)


@pytest.mark.parametrize("options", [{}, {"k": 3}, {"k": 5, "seed": 4}, {"k": 7, "scale_output": True}])
def test_lego_does_not_see_the_order_of_ranks_or_adapters(options):
    made = [adapter(seed, rank=4) for seed in range(3)]
    mixed = [shuffled(made[index], index) for index in (2, 0, 1)]
    one, other = merge("lora_lego", made, options), merge("lora_lego", mixed, options)
    for site in SHAPES:
        assert close(change(one, site), change(other, site)) and np.abs(change(one, site)).max() > 0.1
        assert one.rank(site) == options.get("k", 4)


def test_lego_with_all_units_is_the_sum():
    result = merge("lora_lego", UNLIKE, {"k": 8})
    for site in SHAPES:
        assert close(change(result, site), sum(change(one, site) for one in UNLIKE))
    scaled = merge("lora_lego", UNLIKE, {"k": 8, "scale_output": True})
    assert close(change(scaled, "u"), change(result, "u") * 0.5)  # mean rank 2, k 8
    with pytest.raises(InputError, match=r"k=9: [uv] has only 8 units"):
        merge("lora_lego", UNLIKE, {"k": 9})


def test_lego_finds_the_units_that_adapters_share():
    """Copies of one adapter with their ranks shuffled and a little noise: their clusters are its units."""
    random, base = torch.Generator().manual_seed(0), adapter(7, rank=4)
    copies = [shuffled(base, index) for index in range(4)]
    noisy = [
        one.map(lambda value: value + 1e-3 * torch.randn(value.shape, generator=random).double()) for one in copies
    ]
    for made, tolerance in ((copies, 1e-12), (noisy, 5e-3)):
        result = merge("lora_lego", made)
        assert all(close(change(result, site), change(base, site), tolerance) for site in SHAPES)


def test_lego_gives_a_centroid_the_mean_norm_of_its_members():
    """Units (3, 4; 0) and (0, 0; 5) of norm 5: their mean has norm 5 / sqrt 2, the centroid 5."""
    sites = {"u": AdaptedLayer("lora", (1, 2), 1.0)}
    units = [
        AdapterState({"u/A": torch.tensor([a]).double(), "u/B": torch.tensor([[b]]).double()}, sites)
        for a, b in (([3.0, 4.0], 0.0), ([0.0, 0.0], 5.0))
    ]
    result = merge("lora_lego", units, {"k": 1})
    unit = np.array([*result["u/A"][0].tolist(), result["u/B"].item()])
    np.testing.assert_allclose(unit, np.array([3, 4, 5]) / 2**0.5)


# Reversible model merging --------------------------------------------------------------------------------------------


def discarded(made, site, role, p):
    """Sum over positions of the squared singular values beyond p of the centred vectors."""
    total = 0.0
    for position in range(SHAPES[site][role == "A"]):
        X = np.stack([one[f"{site}/A"][:, position] if role == "A" else one[f"{site}/B"][position] for one in made], 1)
        values = np.linalg.svd(X - X.mean(axis=1, keepdims=True), compute_uv=False)
        total += (values[p:] ** 2).sum()
    return total


@pytest.mark.parametrize("p", [0, 1, 2])
def test_what_reversible_loses_is_the_discarded_energy(p):
    made = [adapter(seed, rank=3) for seed in range(5)]
    merger = make("reversible", {"p": p})
    state = merger.fold(made)
    back = [merger.recover(state, index) for index in range(5)]
    for site in SHAPES:
        for role in "AB":
            key = f"{site}/{role}"
            error = sum(float((one[key] - other[key]).square().sum()) for one, other in zip(back, made, strict=True))
            assert error == pytest.approx(discarded(made, site, role, p), rel=1e-9) and error > 0.1
        mean = np.mean([change(one, site) for one in back], axis=0)
        assert close(change(merger.result(state), site), mean)


@pytest.mark.parametrize(("p", "count", "rank"), [(4, 4, 6), (3, 4, 6), (3, 7, 3)])
def test_reversible_with_all_components_gives_every_adapter_back(p, count, rank):
    made = [adapter(seed, rank=rank) for seed in range(count)]
    merger = make("reversible", {"p": p})
    state = merger.fold(made)
    for index, one in enumerate(made):
        back = merger.recover(state, index)
        back.require_same_form(one, "recovered")
        assert all(close(back[key].numpy(), value.numpy()) for key, value in one.tensors.items())
        assert merge("reversible", made, {"p": p, "index": index}).sha256() == back.sha256()
    with pytest.raises(InputError, match=f"index={count}: there are {count} adapters"):
        merger.recover(state, count)


def test_reversible_stores_what_the_paper_counts():
    made = [adapter(seed, rank=4, shapes={"u": (7, 9)}) for seed in range(12)]
    merger = make("reversible", {"p": 2})
    store = merger.store(merger.fold(made))
    assert sum(value.numel() for value in store.values()) == (7 + 9) * (2 * (4 + 12) + 4) < (7 + 9) * 4 * 12


def test_reversible_refuses_unequal_ranks():
    with pytest.raises(InputError, match="u has rank 3, the first adapter's is 2"):
        merge("reversible", UNLIKE)


# Orthogonal Adaptation -----------------------------------------------------------------------------------------------


def in_slots(count, rank=2, seed=3):
    made = []
    for slot in range(count):
        start = initial(adapter(slot, rank), slot, seed)
        assert not start["u/B"].any() and not start["v/B"].any()
        made.append(start.replace({key: adapter(slot, rank)[key] for key in ("u/B", "v/B")}))
    return made


def test_slots_are_parts_of_one_orthogonal_matrix():
    blocks = torch.cat([rows(12, 3, slot, 0, "q") for slot in range(4)])
    assert close((blocks @ blocks.T).numpy(), np.eye(12))
    other = rows(12, 3, 0, 1, "q"), rows(12, 3, 0, 0, "k")
    assert all(not torch.allclose(rows(12, 3, 0, 0, "q"), one, atol=0.1) for one in other)


def test_a_task_is_alone_in_the_span_of_its_rows():
    made, weights = in_slots(2), [1.0, 0.5]
    result = merge("orthogonal_adaptation", made, {}, weights)
    for site in SHAPES:
        for one, weight in zip(made, weights, strict=True):
            x = one[f"{site}/A"].numpy().T @ np.array([1.0, -2.0])
            assert close(change(result, site) @ x, weight * change(one, site) @ x)
            assert np.linalg.norm(change(one, site) @ x) > 1
        assert close(change(result, site), change(made[0], site) + 0.5 * change(made[1], site))
        assert result.rank(site) == 4


def test_orthogonal_adaptation_has_a_capacity():
    """Width 5 holds two adapters of rank 2."""
    with pytest.raises(InputError, match="slot=2: v, 5 wide, has 2 slots of rank 2"):
        initial(adapter(0), 2, 0)
    with pytest.raises(InputError, match=r"v is 5 wide and 4 of its directions are taken.*capacity 2"):
        merge(
            "orthogonal_adaptation",
            [*in_slots(2), adapter(9).replace({"u/A": rows(9, 2, 2, 3, "u"), "v/A": torch.eye(5)[:2].double()})],
        )


def test_orthogonal_adaptation_refuses_overlap():
    with pytest.raises(InputError, match="overlaps an earlier one's"):
        merge("orthogonal_adaptation", ALIKE[:2])
    made = in_slots(1)
    with pytest.raises(InputError, match=r"cosine 1, tolerance 0\.01"):
        merge("orthogonal_adaptation", [made[0], made[0]])
    result = merge("orthogonal_adaptation", ALIKE, {"tolerance": 1.0})
    assert close(change(result, "v"), sum(change(one, "v") for one in ALIKE))


# Heads ---------------------------------------------------------------------------------------------------------------


def test_a_head_of_other_classes_is_refused():
    wide = ALIKE[1].replace({"out/weight": torch.zeros(3, 4).double()})
    with pytest.raises(StateMismatch, match=r"out/weight has shape \[3, 4\], expected \[2, 4\]"):
        merge("running_average", [ALIKE[0], wide])
    with pytest.raises(StateMismatch, match="missing out/weight"):
        merge("running_average", [ALIKE[0], ALIKE[1].without(("head",))])


@pytest.mark.parametrize("name", ["opcm", "task_arithmetic", "lora_lego", "reversible"])
def test_heads_are_averaged(name):
    wanted = np.mean([one["out/weight"].numpy() for one in ALIKE], axis=0)
    assert close(merge(name, ALIKE)["out/weight"].numpy(), wanted)
