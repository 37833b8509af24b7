"""Finished adapters aggregated once, every rule against dense references; and what each rule refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.adapters.flat import flatten_adapter
from fedpeft.errors import InputError
from fedpeft.state import AdaptedLayer, AdapterState, StateMismatch
from fedpeft.strategies.offline import aggregate
from support import dense

WEIGHTS = [10.0, 30.0, 20.0]
DTYPES = [torch.float32, torch.float64]
SHARED_A = ("ffa_lora", "fedsvd", "fed_sb", "rolora")


def adapters(*, dtype=torch.float64, roles=("A", "B", "head"), ranks=(3, 3, 3), scalings=(2.0, 2.0, 2.0), seed=0):
    """Trained adapters of one start: those roles moved at random."""
    made = []
    for index, (rank, scaling) in enumerate(zip(ranks, scalings, strict=True)):
        start = dense.fresh(rank, scaling, dtype=dtype, seed=seed)
        made.append(dense.drift(start, roles, 10 * seed + index))
    return made


def references(made, site, weights):
    return [dense.triple(adapter, site) for adapter in made], dense.fractions(weights)


def expected_product(name, clients, p, s=2.0):
    exact = dense.mean_product(clients, p)
    if name == "fedit":
        return dense.fedit(clients, p, s)
    if name == "lora_fair":
        A = dense.mean([A for _, A, _ in clients], p)
        B, A = dense.lora_fair(clients, p, s, 0.01 * np.trace(A @ A.T) / len(A))
        return s * B @ A
    if name == "flexlora":
        return dense.best_of_rank(exact, 3)
    if name == "hetlora":
        B, A = dense.hetlora(clients, p, s, 3)
        return s * B @ A
    if name == "median":
        return s * np.median([B for B, _, _ in clients], axis=0) @ np.median([A for _, A, _ in clients], axis=0)
    if name == "flower":
        return dense.fedit(clients, p, s)
    return exact


RULES = ["fedit", "lora_fair", "flexlora", "hetlora", "flora", "fedex", "flower", "median", *SHARED_A]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_result_is_the_dense_reference(name, dtype, weights):
    made = adapters(dtype=dtype, roles=("B", "head") if name in SHARED_A else ("A", "B", "head"))
    result, _ = aggregate(dense.make(name), made, weights)
    for site in dense.SHAPES:
        clients, p = references(made, site, weights or [1.0, 1.0, 1.0])
        assert dense.relative(dense.effective(result, site), expected_product(name, clients, p)) < 1e-6, site
        assert result.sites[site].kind == "lora"
    if name != "median":
        heads = dense.mean(
            [dense.array(adapter["out/weight"]) for adapter in made], dense.fractions(weights or [1.0] * 3)
        )
        assert dense.relative(dense.array(result["out/weight"]), heads) < 1e-6


@pytest.mark.parametrize("name", ["fedit", "ffa_lora", "fedsvd", "lora_fair", "flexlora", "hetlora", "rolora"])
def test_float64_adapters_are_aggregated_in_float64(name):
    made = adapters(roles=("B", "head") if name in SHARED_A else ("A", "B", "head"))
    result, _ = aggregate(dense.make(name), made, WEIGHTS)
    for site in dense.SHAPES:
        clients, p = references(made, site, WEIGHTS)
        assert dense.relative(dense.effective(result, site), expected_product(name, clients, p)) < 1e-11
        assert result[f"{site}/A"].dtype == torch.float64


@pytest.mark.parametrize("name", ["fedit", "ffa_lora", "fedsvd", "lora_fair", "flexlora", "hetlora", "flora", "fedex"])
def test_scalings_of_the_adapters_are_folded_in(name):
    made = adapters(
        roles=("B", "head") if name in ("ffa_lora", "fedsvd") else ("A", "B", "head"), scalings=(2.0, 0.5, 8.0)
    )
    result, _ = aggregate(dense.make(name), made, WEIGHTS)
    for site in dense.SHAPES:
        clients, p = references(made, site, WEIGHTS)
        s = result.sites[site].scaling
        assert dense.relative(dense.effective(result, site), expected_product(name, clients, p, s)) < 1e-6


@pytest.mark.parametrize("options", [{}, {"every": 7}, {"transport": "dense"}])
def test_fedsvd_returns_orthonormal_rows_whatever_its_period(options):
    made = adapters(roles=("B", "head"))
    result, _ = aggregate(dense.make("fedsvd", **options), made, WEIGHTS)
    for site in dense.SHAPES:
        B, A, _ = dense.triple(result, site)
        clients, p = references(made, site, WEIGHTS)
        np.testing.assert_allclose(A @ A.T, np.eye(3), atol=1e-12)
        np.testing.assert_allclose(2 * B @ A, dense.mean_product(clients, p), atol=1e-12)
        np.testing.assert_allclose(A.T @ A, dense.row_projector(clients[0][1]), atol=1e-12)


def test_flora_stacks_the_adapters():
    made = adapters(ranks=(1, 3, 2))
    result, _ = aggregate(dense.make("flora"), made, WEIGHTS)
    assert result.rank("u") == 1 + 3 + 2
    assert sorted(result.tensors) == ["out/weight", "u/A", "u/B", "v/A", "v/B"]
    for site in dense.SHAPES:
        clients, p = references(made, site, WEIGHTS)
        assert dense.relative(dense.product(result, site), dense.mean_product(clients, p)) < 1e-6


def test_fedex_has_rank_K_r_and_no_residual_left_apart():
    result, _ = aggregate(dense.make("fedex"), adapters(ranks=(2, 2, 2)), WEIGHTS)
    assert result.rank("u") == 2 + 2 * 2
    assert not any("residual" in key for key in result.tensors)


@pytest.mark.parametrize("name", ["flora", "flexlora", "hetlora"])
def test_unequal_ranks(name):
    made = adapters(ranks=(1, 3, 2))
    result, _ = aggregate(dense.make(name), made, WEIGHTS)
    for site in dense.SHAPES:
        clients, p = references(made, site, WEIGHTS)
        assert dense.relative(dense.effective(result, site), expected_product(name, clients, p)) < 1e-6


@pytest.mark.parametrize("common", ["A", "B"])
def test_rolora_takes_either_common_factor(common):
    other = "B" if common == "A" else "A"
    start = dense.drift(dense.fresh(), ("A", "B"), 50)
    made = [dense.drift(start, (other, "head"), index) for index in range(3)]
    result, _ = aggregate(dense.make("rolora"), made, WEIGHTS)
    for site in dense.SHAPES:
        clients, p = references(made, site, WEIGHTS)
        assert dense.relative(dense.product(result, site), dense.mean_product(clients, p)) < 1e-12


def test_fedsa_averages_both_as_a_start_and_says_so():
    made = adapters()
    result, notes = aggregate(dense.make("fedsa"), made, WEIGHTS)
    p = dense.fractions(WEIGHTS)
    for site in dense.SHAPES:
        for role in ("A", "B"):
            expected = dense.mean([dense.array(adapter[f"{site}/{role}"]) for adapter in made], p)
            assert dense.relative(dense.array(result[f"{site}/{role}"]), expected) < 1e-12
    assert any("B" in note for note in notes)


def test_fed_sb_on_its_own_adapters_averages_the_cores():
    start = dense.fresh(kind="lora_sb")
    made = [dense.drift(start, ("R", "head"), index) for index in range(3)]
    result, notes = aggregate(dense.make("fed_sb"), made, WEIGHTS)
    p = dense.fractions(WEIGHTS)
    for site in dense.SHAPES:
        core = dense.mean([dense.array(adapter[f"{site}/R"]) for adapter in made], p)
        expected = 2.0 * dense.array(start[f"{site}/B"]) @ core @ dense.array(start[f"{site}/A"])
        assert dense.relative(dense.effective(result, site), expected) < 1e-12
    assert notes == []


def test_fed_sb_notes_adapters_without_a_common_column_space():
    _, notes = aggregate(dense.make("fed_sb"), adapters(roles=("B",)), WEIGHTS)
    assert any("column space" in note for note in notes)
    start = dense.drift(dense.fresh(), ("B",), 3)
    generator = torch.Generator().manual_seed(0)
    shared = [
        start.replace(
            {f"{site}/B": start[f"{site}/B"] @ torch.randn(3, 3, generator=generator).double() for site in dense.SHAPES}
        )
        for _ in range(3)
    ]
    assert aggregate(dense.make("fed_sb"), shared, WEIGHTS)[1] == []


def test_the_start_is_what_norm_clip_measures_from():
    start = dense.fresh()
    made = [dense.drift(start, ("A", "B", "head"), index) for index in range(3)]
    result, _ = aggregate(dense.make("norm_clip", bound=1e-9), made, WEIGHTS, start)
    for key, value in start.tensors.items():
        np.testing.assert_allclose(dense.array(result[key]), dense.array(value), atol=2e-9)
    with pytest.raises(InputError, match="start"):
        aggregate(dense.make("norm_clip", bound=1.0), made, WEIGHTS)


@pytest.mark.parametrize("name", ["fedit", "ffa_lora", "flexlora", "fedsvd"])
def test_inputs_are_left_alone_and_one_adapter_is_its_own_aggregate(name):
    made = adapters(roles=("B", "head"))
    before = [adapter.sha256() for adapter in made]
    aggregate(dense.make(name), made, WEIGHTS)
    assert [adapter.sha256() for adapter in made] == before
    alone, _ = aggregate(dense.make(name), made[:1])
    for site in dense.SHAPES:
        assert dense.relative(dense.product(alone, site), dense.product(made[0], site)) < 1e-12


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ffa_lora", "fedsvd", "fed_sb"])
def test_a_frozen_A_must_be_the_same_on_all(name):
    made = adapters(roles=("B", "head"))
    made[2] = made[2].replace({"v/A": made[2]["v/A"] + 1e-3})
    with pytest.raises(InputError, match=rf"(?s)(?=.*{name})(?=.*\bv\b)"):
        aggregate(dense.make(name), made, WEIGHTS)


@pytest.mark.parametrize("name", ["ffa_lora", "fedsvd"])
def test_a_frozen_A_must_be_that_of_the_start(name):
    made = adapters(roles=("B", "head"))
    start = dense.fresh()
    aggregate(dense.make(name), made, WEIGHTS, start)
    with pytest.raises(InputError, match=name):
        aggregate(dense.make(name), made, WEIGHTS, start.replace({"u/A": start["u/A"] + 1e-3}))


@pytest.mark.parametrize("name", ["fedit", "lora_fair", "fedex", "rolora", "median", "flower"])
def test_unequal_ranks_are_refused_with_the_rules_that_take_them(name):
    with pytest.raises(InputError, match=r"(?s)(?=.*ranks)(?=.*flora)(?=.*flexlora)(?=.*hetlora)"):
        aggregate(dense.make(name), adapters(ranks=(1, 3, 2)), WEIGHTS)


def test_rolora_needs_a_common_factor():
    with pytest.raises(InputError, match="rolora"):
        aggregate(dense.make("rolora"), adapters(), WEIGHTS)


def test_other_sites_or_shapes_are_refused():
    made = adapters()
    with pytest.raises(StateMismatch, match="v/"):
        aggregate(
            dense.make("fedit"),
            [
                made[0],
                AdapterState(
                    {key: value for key, value in made[1].tensors.items() if not key.startswith("v/")},
                    {key: site for key, site in made[1].sites.items() if key != "v"},
                ),
            ],
        )
    wide = dense.fresh(shapes={"u": (7, 9), "v": (6, 6)})
    with pytest.raises(StateMismatch, match=r"v/A.*\[3, 6\].*\[3, 5\]"):
        aggregate(dense.make("fedit"), [made[0], wide])


@pytest.mark.parametrize(
    "weights", [[1.0, 2.0], [1.0, -1.0, 1.0], [0.0, 1.0, 1.0], [float("nan"), 1.0, 1.0], [float("inf"), 1.0, 1.0]]
)
def test_weights_must_fit(weights):
    with pytest.raises(InputError, match="weights"):
        aggregate(dense.make("fedit"), adapters(), weights)


def test_no_adapters():
    with pytest.raises(InputError, match="no adapters"):
        aggregate(dense.make("fedit"), [])


# Folding the residual and the core into plain factors ----------------------------------------------------------------


def test_flat_keeps_the_function_and_the_scaling():
    state = dense.rounds(dense.make("fedex"), dense.fresh(), WEIGHTS, 3)[-1].server.adapter
    plain = flatten_adapter(state)
    for site in dense.SHAPES:
        assert dense.relative(dense.product(plain, site), dense.effective(state, site)) < 1e-6
        assert plain.sites[site] == AdaptedLayer("lora", dense.SHAPES[site], 2.0)
    assert sorted(plain.tensors) == ["out/weight", "u/A", "u/B", "v/A", "v/B"]
    core = dense.drift(dense.fresh(kind="lora_sb"), ("R",), 0)
    assert dense.relative(dense.product(flatten_adapter(core), "u"), dense.product(core, "u")) < 1e-12
    assert "u/R" not in flatten_adapter(core) and flatten_adapter(core).sites["u"].kind == "lora"
    untouched = dense.fresh()
    assert flatten_adapter(untouched).sha256() == untouched.sha256()
