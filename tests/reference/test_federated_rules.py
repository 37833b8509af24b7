"""Every aggregation rule against dense float64 linear algebra: what all rules share, and each rule's own numbers."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import InputError
from fedpeft.state import AdapterState, Site
from fedpeft.strategies.base import Needs, ServerState, Update

WEIGHTS = [10.0, 30.0, 20.0, 15.0, 25.0]
EXACT = ["ffa_lora", "fedsvd", "flora", "fedex", "rolora", "fed_sb"]
WRAPPERS = ["fedprox", "scaffold", "norm_clip", "trimmed_mean", "median", "krum"]
# FedSA has no global product, server optimizers move by a step of their own: both are tested apart.
RULES = ["fedit", "lora_fair", "flexlora", "hetlora", "flower", *EXACT, *WRAPPERS]
STATEFUL = [*RULES, "fedsa", "fedadam", "fedyogi", "fedadagrad"]
FLOAT32 = {"flora", "fedex", "flower"}  # residual factors, and Flower's arrays, are float32


def tolerance(name):
    return 2e-6 if name in FLOAT32 else 1e-10


def begin(dense, name, **more):
    return dense.fresh(kind="lora_sb" if name == "fed_sb" else "lora", **more)


def strategy_of(dense, name, **options):
    strategy = dense.make(name, **options)
    strategy.population = len(WEIGHTS)
    return strategy


# What all rules share ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_equal_clients_give_back_the_common_function(dense, name):
    played = dense.rounds(strategy_of(dense, name), begin(dense, name), WEIGHTS, 3, seeds=[7] * len(WEIGHTS))
    for number, done in enumerate(played):
        client = done.models["c0"]
        for site in dense.SHAPES:
            expected = dense.base(done.sent.adapter, site) + dense.product(client, site)
            assert np.linalg.norm(dense.product(client, site)) > 1e-3
            assert dense.relative(dense.effective(done.server.adapter, site), expected) < tolerance(name), (site, number)
        torch.testing.assert_close(done.server.adapter["out/weight"], client["out/weight"], rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", EXACT)
def test_exact_rules_add_the_mean_of_the_products(dense, name):
    played = dense.rounds(strategy_of(dense, name), begin(dense, name), WEIGHTS, 4)
    p = dense.fractions(WEIGHTS)
    for done in played:
        for site in dense.SHAPES:
            expected = dense.base(done.sent.adapter, site) + dense.mean_product(dense.triples(done, site), p)
            assert dense.relative(dense.effective(done.server.adapter, site), expected) < tolerance(name)


def test_fedit_is_the_product_of_means_and_not_exact(dense):
    done = dense.rounds(dense.make("fedit"), dense.fresh(), WEIGHTS, 1)[0]
    p = dense.fractions(WEIGHTS)
    for site in dense.SHAPES:
        clients = dense.triples(done, site)
        got = dense.product(done.server.adapter, site)
        assert dense.relative(got, dense.fedit(clients, p, 2.0)) < 1e-12
        residual = dense.mean_product(clients, p) - got
        covariance = dense.mean([2.0 * (B - dense.mean([b for b, _, _ in clients], p)) @ (
            A - dense.mean([a for _, a, _ in clients], p)) for B, A, _ in clients], p)
        assert dense.relative(covariance, residual) < 1e-10 and np.linalg.norm(residual) > 0.01


@pytest.mark.parametrize("name", RULES)
def test_heads_are_averaged_by_weight(dense, name):
    if name in ("median", "trimmed_mean", "krum", "norm_clip"):
        pytest.xfail("robust statistics are not the weighted mean")
    done = dense.rounds(strategy_of(dense, name), begin(dense, name), WEIGHTS, 1)[0]
    expected = dense.mean([dense.array(model["out/weight"]) for model in done.models.values()], dense.fractions(WEIGHTS))
    assert dense.relative(dense.array(done.server.adapter["out/weight"]), expected) < 2e-7


@pytest.mark.parametrize("name", [*RULES, "fedadam"])
@settings(deadline=None, max_examples=4)
@given(order=st.permutations(range(len(WEIGHTS))))
def test_permuting_clients_changes_nothing_beyond_rounding(dense, name, order):
    strategy = strategy_of(dense, name)
    first, second = dense.rounds(strategy, begin(dense, name), WEIGHTS, 2)
    renamed = [Update(f"c{place}", second.updates[index].weight, second.updates[index].adapter)
               for place, index in enumerate(order)]
    again = strategy.aggregate(second.sent, renamed)
    for site in dense.SHAPES:
        assert dense.relative(dense.effective(again.adapter, site), dense.effective(second.server.adapter, site)) < tolerance(name)


@pytest.mark.parametrize("name", RULES)
def test_weights_count_relative_to_the_participants(dense, name):
    strategy = strategy_of(dense, name)
    done = dense.rounds(strategy, begin(dense, name), WEIGHTS, 2)[1]
    scaled = [Update(update.client, 7 * update.weight, update.adapter) for update in done.updates]
    again = strategy.aggregate(done.sent, scaled)
    for site in dense.SHAPES:
        assert dense.relative(dense.effective(again.adapter, site), dense.effective(done.server.adapter, site)) < tolerance(name)


@pytest.mark.parametrize("name", EXACT)
def test_missing_clients_are_left_out_of_the_weights(dense, name):
    strategy = strategy_of(dense, name)
    done = dense.rounds(strategy, begin(dense, name), WEIGHTS, 1)[0]
    again = strategy.aggregate(done.sent, done.updates[:2])
    for site in dense.SHAPES:
        expected = dense.mean_product(dense.triples(done, site)[:2], [0.25, 0.75])
        assert dense.relative(dense.effective(again.adapter, site), expected) < tolerance(name)


@pytest.mark.parametrize("name", [name for name in RULES if name != "krum"])
def test_one_client_gets_its_own_function_back(dense, name):
    for done in dense.rounds(strategy_of(dense, name), begin(dense, name), [12.0], 2):
        for site in dense.SHAPES:
            expected = dense.base(done.sent.adapter, site) + dense.product(done.models["c0"], site)
            assert dense.relative(dense.effective(done.server.adapter, site), expected) < tolerance(name)


@pytest.mark.parametrize("name", [*EXACT, "fedit", "lora_fair", "flexlora", "hetlora"])
def test_another_scaling_of_a_client_is_folded_in(dense, name):
    """Client k's function is s_k B_k A_k: twice the scaling with half of B is the same client."""
    strategy = strategy_of(dense, name)
    done = dense.rounds(strategy, begin(dense, name), WEIGHTS, 1)[0]
    halved = "R" if name == "fed_sb" else "B"
    updates = []
    for index, update in enumerate(done.updates):
        factor = 1.0 + index
        sites = {key: Site(site.kind, site.shape, site.scaling * (factor if site.kind != "head" else 1))
                 for key, site in update.adapter.sites.items()}
        tensors = {key: value / factor if update.adapter.role(key) == halved else value
                   for key, value in update.adapter.tensors.items()}
        updates.append(Update(update.client, update.weight, AdapterState(tensors, sites)))
    again = strategy.aggregate(done.sent, updates)
    for site in dense.SHAPES:
        assert dense.relative(dense.effective(again.adapter, site), dense.effective(done.server.adapter, site)) < tolerance(name)
        assert again.adapter.sites[site].scaling == 2.0


@pytest.mark.parametrize("name", STATEFUL)
def test_aggregate_is_pure(dense, name):
    strategy = strategy_of(dense, name)
    done = dense.rounds(strategy, begin(dense, name), WEIGHTS, 2)[1]
    before = (done.sent.adapter.sha256(), {key: value.clone() for key, value in done.sent.memory.items()},
              copy.deepcopy(done.sent.numbers), [update.adapter.sha256() for update in done.updates])
    again = strategy.aggregate(done.sent, done.updates)
    assert again.adapter.sha256() == done.server.adapter.sha256()
    assert done.sent.adapter.sha256() == before[0] and done.sent.numbers == before[2]
    assert all(torch.equal(done.sent.memory[key], value) for key, value in before[1].items())
    assert [update.adapter.sha256() for update in done.updates] == before[3]


@pytest.mark.parametrize("name", STATEFUL)
def test_all_state_is_in_the_server_state(dense, name):
    """A new strategy object goes on from a state read back from plain data, bit for bit: what resume relies on."""
    start = begin(dense, name, dtype=torch.float32)
    played = dense.rounds(strategy_of(dense, name), start, WEIGHTS, 4)
    middle = played[1].server
    state = ServerState(middle.adapter.clone(), middle.round, {key: value.clone() for key, value in middle.memory.items()},
                        json.loads(json.dumps(middle.numbers)))
    other = strategy_of(dense, name)
    origin = played[0].sent.adapter
    for expected in played[2:]:
        done = dense.play(other, state, origin, WEIGHTS)
        state = done.server
        assert state.adapter.sha256() == expected.server.adapter.sha256()


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_kept(dense, name, dtype):
    if name == "flower" and dtype == torch.bfloat16:
        dtype = torch.float16
    start = begin(dense, name, dtype=dtype)
    server = dense.rounds(strategy_of(dense, name), start, WEIGHTS, 2)[-1].server
    for key, value in start.tensors.items():
        assert server.adapter[key].dtype == dtype
        assert torch.isfinite(value).all()


def test_which_rules_need_individual_updates(dense):
    individual = {"lora_fair", "flora", "flexlora", "hetlora", "fedex", "norm_clip", "trimmed_mean", "median", "krum"}
    for name in RULES:
        if name != "flower":
            assert dense.make(name).needs is (Needs.INDIVIDUAL if name in individual else Needs.SUM), name


def test_error_order_of_the_rules(dense):
    """Frobenius distance from the mean of products: FlexLoRA <= FAIR (lambda -> 0) <= FAIR <= FedIT, each strictly here."""
    p = dense.fractions(WEIGHTS)
    errors = []
    for strategy in (dense.make("flexlora"), dense.make("lora_fair", lambda_=1e-12), dense.make("lora_fair", lambda_=0.5),
                     dense.make("lora_fair", lambda_=50.0), dense.make("fedit")):
        done = dense.rounds(strategy, dense.fresh(), WEIGHTS, 1)[0]
        errors.append([np.linalg.norm(dense.product(done.server.adapter, site) - dense.mean_product(dense.triples(done, site), p))
                       for site in dense.SHAPES])
    errors = np.array(errors)
    assert (np.diff(errors, axis=0) > 1e-6).all()


def test_bytes_of_roberta_large(dense):
    """q and v of 24 layers of width 1024, r = 8, float32: Table 6 of the FedSVD paper in bytes."""
    sites = {f"{index}": (1024, 1024) for index in range(48)}
    start = dense.fresh(8, 1.0, torch.float32, sites, head=False)
    expected = {("fedit", ()): (3145728, 3145728), ("ffa_lora", ()): (1572864, 1572864),
                ("fedsvd", ()): (1572864, 1585152), ("fedsvd", (("transport", "dense"),)): (1572864, 3145728),
                ("lora_fair", ()): (3145728, 3145728), ("flexlora", ()): (3145728, 3145728)}
    for (name, options), (up, down) in expected.items():
        strategy = dense.make(name, **dict(options))
        server = strategy.initial(start, 0)
        sent = strategy.broadcast(server, "c0")
        assert start.select(strategy.uploads(server)).nbytes == up, name
        assert sent.nbytes == down, name


# FFA-LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"init": "orthonormal"}, {"transport": "dense"}])
def test_ffa_keeps_A_bit_for_bit_and_has_no_residual(dense, options):
    played = dense.rounds(dense.make("ffa_lora", **options), dense.fresh(dtype=torch.float32), WEIGHTS, 3)
    first = played[0].sent.adapter
    p = dense.fractions(WEIGHTS)
    for done in played:
        for site in dense.SHAPES:
            for adapter in (done.server.adapter, *done.models.values()):
                assert torch.equal(adapter[f"{site}/A"], first[f"{site}/A"])
            clients = dense.triples(done, site)
            assert np.allclose(dense.fedit(clients, p, 2.0), dense.mean_product(clients, p), rtol=1e-12, atol=1e-13)
            assert not any(f"{site}/A" in update.adapter for update in done.updates)
            A = dense.array(first[f"{site}/A"])
            got = dense.product(done.server.adapter, site)
            assert np.linalg.norm(got - got @ dense.row_projector(A)) < 1e-6 * np.linalg.norm(got)


def test_ffa_orthonormal_spans_the_same_rows(dense):
    start = dense.fresh()
    server = dense.make("ffa_lora", init="orthonormal").initial(start, 0)
    for site in dense.SHAPES:
        A, A0 = dense.array(server.adapter[f"{site}/A"]), dense.array(start[f"{site}/A"])
        np.testing.assert_allclose(A @ A.T, np.eye(3), atol=1e-12)
        np.testing.assert_allclose(A.T @ A, dense.row_projector(A0), atol=1e-12)


def test_ffa_tells_clients_the_hash_of_the_A_that_they_draw(dense):
    strategy = dense.make("ffa_lora")
    server = strategy.initial(dense.fresh(), 0)
    static = strategy.task(server)["static"]
    assert static == {"roles": ["A"], "sha256": server.adapter.select(("A",)).sha256()}
    assert not strategy.broadcast(server, "c0").select(("A",)).tensors
    sent = dense.make("ffa_lora", transport="dense")
    assert "static" not in sent.task(server) and sent.broadcast(server, "c0").select(("A",)).tensors


def test_ffa_one_step_of_all_clients_is_the_centralised_step(dense):
    """tau = 1, full batches, weights by size: the mean of the clients' B is B - eta * gradient of the pooled loss."""
    random = np.random.default_rng(1)
    sizes, eta, s = [4, 9, 7], 0.3, 2.0
    start = dense.fresh(3, s, shapes={"u": (7, 9)}, head=False)
    strategy = dense.make("ffa_lora")
    server = strategy.initial(start, 0)
    server = server.with_tensors({"u/B": torch.tensor(random.standard_normal((7, 3)))})
    B, A = dense.array(server.adapter["u/B"]), dense.array(server.adapter["u/A"])
    data = [(random.standard_normal((9, size)), random.standard_normal((7, size))) for size in sizes]

    def gradient(x, y):  # of the mean over samples of ||tanh(s B A x) - y||^2 / 2
        z = np.tanh(s * B @ A @ x)
        return s * ((z - y) * (1 - z**2)) @ (A @ x).T / x.shape[1]

    updates = [Update(f"c{index}", float(size), server.adapter.select(("B",)).replace(
        {"u/B": torch.tensor(B - eta * gradient(*data[index]))})) for index, size in enumerate(sizes)]
    pooled = gradient(np.hstack([x for x, _ in data]), np.hstack([y for _, y in data]))
    after = strategy.aggregate(server, updates)
    np.testing.assert_allclose(dense.array(after.adapter["u/B"]), B - eta * pooled, rtol=1e-12, atol=1e-14)


# FLoRA and FedEx: what moves the base --------------------------------------------------------------------------------


def test_flora_weights_one_factor_and_starts_again(dense):
    strategy = dense.make("flora")
    played = dense.rounds(strategy, dense.fresh(), WEIGHTS, 5)
    p = dense.fractions(WEIGHTS)
    total = {site: 0.0 for site in dense.SHAPES}
    draws = []
    for done in played:
        for site, (m, n) in dense.SHAPES.items():
            total[site] = total[site] + dense.mean_product(dense.triples(done, site), p)
            after = done.server.adapter
            assert not after[f"{site}/B"].any()
            assert dense.relative(dense.base(after, site), total[site]) < 2e-6
            squared = sum(w**2 * s * B @ A for w, (B, A, s) in zip(p, dense.triples(done, site), strict=True))
            assert dense.relative(squared, dense.mean_product(dense.triples(done, site), p)) > 0.3
            assert after[f"{site}/residual_B"].shape[1] == after[f"{site}/residual_A"].shape[0] <= min(m, n)
        draws.append(done.server.adapter["u/A"])
    assert not any(torch.equal(one, other) for index, one in enumerate(draws) for other in draws[:index])
    for draw in draws:  # Kaiming-uniform with a = sqrt(5): U(-1/sqrt(n), 1/sqrt(n))
        assert 0.6 / math.sqrt(9) < draw.abs().max() <= 1 / math.sqrt(9)


def test_flora_fresh_A_depends_on_seed_and_round_only(dense):
    def draws(seed, weights):
        return [done.server.adapter["u/A"] for done in dense.rounds(dense.make("flora"), dense.fresh(), weights, 2, seed=seed)]

    one, other = draws(3, WEIGHTS), draws(3, [1.0, 2.0])
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], draws(4, WEIGHTS)[0])


def test_flora_takes_unequal_ranks(dense):
    strategy = dense.make("flora")
    strategy.client_ranks = {"c0": 1, "c1": 3, "c2": 2, "c3": 1, "c4": 3}
    played = dense.rounds(strategy, dense.fresh(), WEIGHTS, 2)
    p = dense.fractions(WEIGHTS)
    for done in played:
        for name, rank in strategy.client_ranks.items():
            assert done.models[name]["u/A"].shape[0] == done.models[name]["u/B"].shape[1] == rank
            sent = strategy.broadcast(done.sent, name)
            assert torch.equal(sent["u/A"], done.sent.adapter["u/A"][:rank])
        for site in dense.SHAPES:
            expected = dense.base(done.sent.adapter, site) + dense.mean_product(dense.triples(done, site), p)
            assert dense.relative(dense.effective(done.server.adapter, site), expected) < 2e-6


def test_fedex_keeps_the_means_and_puts_the_residual_into_the_base(dense):
    played = dense.rounds(dense.make("fedex"), dense.fresh(), WEIGHTS, 5)
    p = dense.fractions(WEIGHTS)
    for done in played:
        for site, (m, n) in dense.SHAPES.items():
            clients, after = dense.triples(done, site), done.server.adapter
            assert dense.relative(dense.array(after[f"{site}/B"]), dense.mean([B for B, _, _ in clients], p)) < 1e-12
            assert dense.relative(dense.array(after[f"{site}/A"]), dense.mean([A for _, A, _ in clients], p)) < 1e-12
            added = dense.base(after, site) - dense.base(done.sent.adapter, site)
            expected = dense.mean_product(clients, p) - dense.fedit(clients, p, 2.0)
            assert np.linalg.norm(added - expected) < 2e-6 * np.linalg.norm(dense.base(after, site))
            assert after[f"{site}/residual_B"].shape[1] <= min(m, n)


def test_fedex_residual_of_two_clients_has_rank_r(dense):
    done = dense.rounds(dense.make("fedex"), dense.fresh(2), [1.0, 3.0], 1)[0]
    assert done.server.adapter["u/residual_B"].shape == (7, 2)


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_what_moves_the_base_is_sent_to_everyone(dense, name):
    strategy = dense.make(name)
    server = dense.rounds(strategy, dense.fresh(), WEIGHTS, 2)[-1].server
    sent = strategy.broadcast(server, "newcomer")
    assert strategy.changes_base
    for site in dense.SHAPES:
        assert dense.relative(dense.effective(sent, site), dense.effective(server.adapter, site)) < 1e-12


# FlexLoRA and HetLoRA ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["us", "sqrt"])
def test_flexlora_error_is_the_discarded_spectrum(dense, split):
    done = dense.rounds(dense.make("flexlora", split=split), dense.fresh(), WEIGHTS, 1)[0]
    p = dense.fractions(WEIGHTS)
    for site in dense.SHAPES:
        wanted, got = dense.mean_product(dense.triples(done, site), p), dense.product(done.server.adapter, site)
        spectrum = np.linalg.svd(wanted, compute_uv=False)
        assert np.linalg.norm(wanted - got) == pytest.approx(math.sqrt((spectrum[3:] ** 2).sum()), rel=1e-10)
        assert dense.relative(got, dense.best_of_rank(wanted, 3)) < 1e-10
        B, A, s = dense.triple(done.server.adapter, site)
        share = (lambda value: value) if split == "us" else np.sqrt
        np.testing.assert_allclose(np.linalg.norm(B, axis=0), share(spectrum[:3] / s), rtol=1e-10)
        if split == "us":
            np.testing.assert_allclose(A @ A.T, np.eye(3), atol=1e-12)


def test_flexlora_sends_each_client_its_best_rank(dense):
    strategy = dense.make("flexlora")
    strategy.client_ranks = {"c0": 1, "c1": 3, "c2": 2, "c3": 1, "c4": 3}
    first, second = dense.rounds(strategy, dense.fresh(), WEIGHTS, 2)
    p = dense.fractions(WEIGHTS)
    for site in dense.SHAPES:
        wanted = dense.best_of_rank(dense.mean_product(dense.triples(first, site), p), 3)
        for name, rank in strategy.client_ranks.items():
            assert second.models[name][f"{site}/A"].shape[0] == rank
            got = dense.product(strategy.broadcast(second.sent, name), site)
            assert dense.relative(got, dense.best_of_rank(wanted, rank)) < 1e-9


def test_flexlora_with_a_shared_A_is_fedsvds_refactor(dense):
    start = dense.fresh()
    updates = [Update(f"c{index}", weight, dense.drift(start, ("B",), index)) for index, weight in enumerate(WEIGHTS)]
    flex = dense.make("flexlora").aggregate(ServerState(start), updates).adapter
    fedsvd = dense.make("fedsvd", transport="dense")
    server = fedsvd.initial(start, 0)
    only_B = [Update(update.client, update.weight, update.adapter.select(("B", "head"))) for update in updates]
    mean = fedsvd.aggregate(server, only_B)
    refactored = fedsvd.before_round(ServerState(mean.adapter, 1, mean.memory, mean.numbers)).adapter
    for key in ("u/A", "u/B", "v/A", "v/B"):
        assert dense.relative(dense.array(flex[key]), dense.array(refactored[key])) < 1e-9


def test_hetlora_weights_by_norm_and_pads_with_zeros(dense):
    strategy = dense.make("hetlora")
    strategy.client_ranks = {"c0": 1, "c1": 3, "c2": 2, "c3": 1, "c4": 3}
    played = dense.rounds(strategy, dense.fresh(), WEIGHTS, 2)
    p = dense.fractions(WEIGHTS)
    for done in played:
        for site in dense.SHAPES:
            B, A = dense.hetlora(dense.triples(done, site), p, 2.0, 3)
            assert dense.relative(dense.array(done.server.adapter[f"{site}/B"]), B) < 1e-10
            assert dense.relative(dense.array(done.server.adapter[f"{site}/A"]), A) < 1e-10
    for name, rank in strategy.client_ranks.items():
        sent = strategy.broadcast(played[0].server, name)
        assert torch.equal(sent["u/A"], played[0].server.adapter["u/A"][:rank])
        assert torch.equal(sent["u/B"], played[0].server.adapter["u/B"][:, :rank])


def test_hetlora_falls_back_to_the_sizes_where_all_B_are_zero(dense):
    start = dense.fresh()
    updates = [Update(f"c{index}", weight, dense.drift(start, ("A",), index)) for index, weight in enumerate(WEIGHTS)]
    after = dense.make("hetlora").aggregate(ServerState(start), updates).adapter
    p = dense.fractions(WEIGHTS)
    for site in dense.SHAPES:
        expected = dense.mean([dense.array(update.adapter[f"{site}/A"]) for update in updates], p)
        assert dense.relative(dense.array(after[f"{site}/A"]), expected) < 1e-12
        assert not after[f"{site}/B"].any()


# One factor at a time, one factor kept, the core alone ---------------------------------------------------------------


@pytest.mark.parametrize(("options", "order"), [({}, "BABA"), ({"first": "A"}, "ABAB")])
def test_rolora_alternates_and_only_moves_the_active_factor(dense, options, order):
    played = dense.rounds(dense.make("rolora", **options), dense.fresh(), WEIGHTS, 4)
    for done, active in zip(played, order, strict=True):
        idle = "A" if active == "B" else "B"
        for site in dense.SHAPES:
            assert torch.equal(done.server.adapter[f"{site}/{idle}"], done.sent.adapter[f"{site}/{idle}"])
            assert not torch.equal(done.server.adapter[f"{site}/{active}"], done.sent.adapter[f"{site}/{active}"])
        for update in done.updates:
            assert sorted(update.adapter.tensors) == sorted(["out/weight", f"u/{active}", f"v/{active}"])


def test_fedsa_shares_A_and_leaves_B_and_the_head_alone(dense):
    strategy = dense.make("fedsa")
    assert set(strategy.keeps) == {"B", "head"} and set(strategy.trains) == {"A", "B", "head"}
    done = dense.rounds(strategy, dense.fresh(), WEIGHTS, 1)[0]
    p = dense.fractions(WEIGHTS)
    assert sorted(strategy.broadcast(done.sent, "c0").tensors) == ["u/A", "v/A"]
    for update in done.updates:
        assert sorted(update.adapter.tensors) == ["u/A", "v/A"]
    for site in dense.SHAPES:
        expected = dense.mean([dense.array(model[f"{site}/A"]) for model in done.models.values()], p)
        assert dense.relative(dense.array(done.server.adapter[f"{site}/A"]), expected) < 1e-12


def test_fed_sb_averages_the_core_and_nothing_else(dense):
    strategy = dense.make("fed_sb")
    assert strategy.adapter == "lora_sb"
    start = begin(dense, "fed_sb")
    p = dense.fractions(WEIGHTS)
    for done in dense.rounds(strategy, start, WEIGHTS, 2):
        for update in done.updates:
            assert sorted(update.adapter.tensors) == ["out/weight", "u/R", "v/R"]
        for site in dense.SHAPES:
            expected = dense.mean([dense.array(model[f"{site}/R"]) for model in done.models.values()], p)
            assert dense.relative(dense.array(done.server.adapter[f"{site}/R"]), expected) < 1e-12
            for role in ("A", "B"):
                assert torch.equal(done.server.adapter[f"{site}/{role}"], start[f"{site}/{role}"])
    static = strategy.task(done.server)["static"]
    assert sorted(static["roles"]) == ["A", "B"] and static["sha256"] == start.select(("A", "B")).sha256()
    assert not strategy.broadcast(done.server, "c0").select(("A", "B")).tensors


# Stock Flower strategies ---------------------------------------------------------------------------------------------


def test_flowers_fedavg_is_fedit_and_its_median_is_the_median_wrapper(dense):
    start = dense.fresh(dtype=torch.float32)
    for stock, ours in (("FedAvg", "fedit"), ("FedMedian", "median"), ("FedTrimmedAvg", "trimmed_mean")):
        one = dense.rounds(dense.make("flower", rule=stock), start, WEIGHTS, 2)[-1].server.adapter
        other = dense.rounds(dense.make(ours), start, WEIGHTS, 2)[-1].server.adapter
        for key, value in other.tensors.items():
            torch.testing.assert_close(one[key], value, rtol=1e-5, atol=1e-7)


def test_flowers_fedadam_keeps_its_moments_in_the_server_state(dense):
    strategy = dense.make("flower", rule="FedAdam", rule_options={"eta": 0.1, "tau": 1e-3, "beta_1": 0.9, "beta_2": 0.99})
    start = dense.fresh(1, shapes={"u": (1, 1)}, head=False, dtype=torch.float32)
    server = strategy.initial(start, 0)
    first = strategy.aggregate(server, [Update("c0", 1.0, start.replace({"u/B": torch.ones(1, 1)}))])
    # Flower corrects the bias with exponent round + 1: 0.1 sqrt(1 - 0.99^2) / (1 - 0.9^2) = 0.07425 = eta_norm
    m, v = 0.1, 0.01
    expected = 0.0742453 * m / (math.sqrt(v) + 1e-3)
    assert float(first.adapter["u/B"]) == pytest.approx(expected, rel=1e-4)
    again = strategy.aggregate(server, [Update("c0", 1.0, start.replace({"u/B": torch.ones(1, 1)}))])
    assert torch.equal(again.adapter["u/B"], first.adapter["u/B"])
    assert first.memory or first.numbers


def test_an_unknown_flower_rule_is_refused(dense):
    with pytest.raises(InputError, match="FedAvg"):
        dense.make("flower", rule="FedAverage")
