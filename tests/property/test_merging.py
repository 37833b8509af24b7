"""Mergers keep their promises over shapes, ranks, scalings and rank deficiency."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.merging.base import make, merge
from fedpeft.state import AdaptedLayer, AdapterState

SETTINGS = settings(deadline=None, max_examples=40)
TOLERANCE = 1e-10


@st.composite
def tasks(draw, least=2, equal_rank=False):
    """Two to four adapters of one layer: full rank, with a zero or repeated column, zero, or of another scale."""
    m, n, common = draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(st.integers(1, 5))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    made = []
    for _ in range(draw(st.integers(least, 4))):
        r = common if equal_rank else draw(st.integers(1, 5))
        B, A = random.standard_normal((m, r)), random.standard_normal((r, n))
        kind = draw(st.sampled_from(["full", "zero column", "repeated column", "zero", "scaled"]))
        if kind == "zero column":
            B[:, 0] = 0
        elif kind == "repeated column":
            B[:, -1] = B[:, 0]
        elif kind == "zero":
            B[:] = 0
        elif kind == "scaled":
            B *= 10.0 ** draw(st.integers(-3, 3))
        scaling = draw(st.sampled_from([0.25, 1.0, 3.0]))
        sites = {"q": AdaptedLayer("lora", (m, n), scaling)}
        made.append(AdapterState({"q/A": torch.tensor(A), "q/B": torch.tensor(B)}, sites))
    return made


def change(one):
    return one.sites["q"].scaling * one["q/B"].numpy() @ one["q/A"].numpy()


def size(made):
    return max(np.linalg.norm(change(one)) for one in made) + 1e-300


@SETTINGS
@given(tasks())
def test_the_running_average_is_the_mean(made):
    result = merge("running_average", made)
    error = np.linalg.norm(change(result) - np.mean([change(one) for one in made], axis=0))
    assert error <= TOLERANCE * size(made)
    rank = np.linalg.matrix_rank(np.mean([change(one) for one in made], axis=0), tol=1e-9 * size(made))
    assert max(1, rank) <= result.rank("q") <= max(1, min(result.sites["q"].shape))


@SETTINGS
@given(tasks(least=3), st.permutations(range(4)), st.lists(st.floats(-2, 2), min_size=4, max_size=4))
def test_task_arithmetic_is_linear_and_has_no_order(made, order, weights):
    wanted = sum(weight * change(one) for weight, one in zip(weights, made, strict=False))
    order = [index for index in order if index < len(made)]
    result = merge(
        "task_arithmetic", [made[index] for index in order], {"lambda": 1.0}, [weights[index] for index in order]
    )
    assert np.linalg.norm(change(result) - wanted) <= TOLERANCE * size(made)


@SETTINGS
@given(tasks(), st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
def test_opcm_has_the_mean_norm_and_adds_only_what_is_orthogonal(made, alpha):
    merger = make("opcm", {"alpha": alpha})
    state = merger.add(merger.start(), made[0])
    for index in range(1, len(made)):
        before, lambda_before = change(merger.result(state)), state["numbers"]["lambda"]
        state = merger.add(state, made[index])
        after, lambda_after = change(merger.result(state)), state["numbers"]["lambda"]
        assert np.isfinite(after).all() and lambda_after > 0
        mean = np.mean([np.linalg.norm(change(one)) for one in made[: index + 1]])
        if np.linalg.norm(after) > 0:
            assert abs(np.linalg.norm(after) - mean) <= TOLERANCE * mean
        P = lambda_after * after - lambda_before * before
        scale = np.linalg.norm(before) * (np.linalg.norm(change(made[index])) + lambda_before * np.linalg.norm(before))
        assert abs((P * before).sum()) <= TOLERANCE * scale


@SETTINGS
@given(tasks(least=1), st.integers(1, 6))
def test_the_squeezed_mean_is_the_best_of_its_rank(made, rank):
    mean = np.mean([change(one) for one in made], axis=0)
    result = merge("lora_squeeze", made, {"rank": rank})
    values = np.linalg.svd(mean, compute_uv=False)
    error = np.linalg.norm(change(result) - mean)
    assert abs(error - np.linalg.norm(values[rank:])) <= TOLERANCE * size(made)
    assert result.rank("q") <= rank


@SETTINGS
@given(tasks(equal_rank=True), st.integers(0, 4))
def test_reversible_loses_less_with_more_components_and_nothing_with_all(made, p):
    def error(p):
        merger = make("reversible", {"p": p})
        state = merger.fold(made)
        unit = made[0].sites["q"].scaling
        pairs = [(merger.recover(state, index), one) for index, one in enumerate(made)]
        return (
            sum(
                float(
                    (back["q/A"] - one["q/A"]).square().sum()
                    + (back["q/B"] - one["q/B"] * one.sites["q"].scaling / unit).square().sum()
                )
                for back, one in pairs
            )
            ** 0.5
        )

    total = max(float(one[key].norm() * one.sites["q"].scaling) for one in made for key in ("q/A", "q/B")) * 12
    assert error(p + 1) <= error(p) + TOLERANCE * total
    assert error(len(made)) <= TOLERANCE * total


@SETTINGS
@given(tasks(equal_rank=True), st.integers(1, 6), st.integers(0, 99))
def test_lego_does_not_see_the_order_of_ranks(made, k, seed):
    k = min(k, sum(one.rank("q") for one in made))
    order = torch.randperm(made[0].rank("q"), generator=torch.Generator().manual_seed(seed))
    mixed = [one.replace({"q/A": one["q/A"][order], "q/B": one["q/B"][:, order]}) for one in made]
    one, other = (change(merge("lora_lego", these, {"k": k})) for these in (made, mixed))
    assert np.linalg.norm(one - other) <= TOLERANCE * size(made) * 10
