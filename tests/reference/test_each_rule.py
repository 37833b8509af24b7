"""Each aggregation rule's own numbers, against dense float64 linear algebra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedpeft import config as configs
from fedpeft.errors import InputError
from fedpeft.state import RunContext, ServerState, Update
from fedpeft.strategies.instructions import Drawn
from support import dense

WEIGHTS = [10.0, 30.0, 20.0, 15.0, 25.0]

# FFA-LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"init": "orthonormal"}, {"transport": "dense"}])
def test_ffa_keeps_A_bit_for_bit_and_has_no_residual(options):
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


def test_ffa_orthonormal_spans_the_same_rows():
    start = dense.fresh()
    server = dense.make("ffa_lora", init="orthonormal").initial(start, 0)
    for site in dense.SHAPES:
        A, A0 = dense.array(server.adapter[f"{site}/A"]), dense.array(start[f"{site}/A"])
        np.testing.assert_allclose(A @ A.T, np.eye(3), atol=1e-12)
        np.testing.assert_allclose(A.T @ A, dense.row_projector(A0), atol=1e-12)


def test_ffa_tells_clients_the_hash_of_the_A_that_they_draw():
    strategy = dense.make("ffa_lora")
    server = strategy.initial(dense.fresh(), 0)
    static = strategy.instructions(server).static
    assert static == Drawn(("A",), server.adapter.select(("A",)).sha256())
    assert not strategy.broadcast(server, "c0").select(("A",)).tensors
    sent = dense.make("ffa_lora", transport="dense")
    assert sent.instructions(server).static is None and sent.broadcast(server, "c0").select(("A",)).tensors


def test_ffa_one_step_of_all_clients_is_the_centralised_step():
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

    updates = [
        Update(
            f"c{index}",
            float(size),
            server.adapter.select(("B",)).replace({"u/B": torch.tensor(B - eta * gradient(*data[index]))}),
        )
        for index, size in enumerate(sizes)
    ]
    pooled = gradient(np.hstack([x for x, _ in data]), np.hstack([y for _, y in data]))
    after = strategy.aggregate(server, updates)
    np.testing.assert_allclose(dense.array(after.adapter["u/B"]), B - eta * pooled, rtol=1e-12, atol=1e-14)


# FLoRA and FedEx: what moves the base --------------------------------------------------------------------------------


def test_flora_weights_one_factor_and_starts_again():
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


def test_flora_fresh_A_depends_on_seed_and_round_only():
    def draws(seed, weights):
        return [
            done.server.adapter["u/A"]
            for done in dense.rounds(dense.make("flora"), dense.fresh(), weights, 2, seed=seed)
        ]

    one, other = draws(3, WEIGHTS), draws(3, [1.0, 2.0])
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], draws(4, WEIGHTS)[0])


def test_flora_takes_unequal_ranks():
    strategy = dense.make("flora", context=RunContext(client_ranks={"c0": 1, "c1": 3, "c2": 2, "c3": 1, "c4": 3}))
    played = dense.rounds(strategy, dense.fresh(), WEIGHTS, 2)
    p = dense.fractions(WEIGHTS)
    for done in played:
        for name, rank in strategy.context.client_ranks.items():
            assert done.models[name]["u/A"].shape[0] == done.models[name]["u/B"].shape[1] == rank
            sent = strategy.broadcast(done.sent, name)
            assert torch.equal(sent["u/A"], done.sent.adapter["u/A"][:rank])
        for site in dense.SHAPES:
            expected = dense.base(done.sent.adapter, site) + dense.mean_product(dense.triples(done, site), p)
            assert dense.relative(dense.effective(done.server.adapter, site), expected) < 2e-6


def test_fedex_keeps_the_means_and_puts_the_residual_into_the_base():
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


def test_fedex_residual_of_two_clients_has_rank_r():
    done = dense.rounds(dense.make("fedex"), dense.fresh(2), [1.0, 3.0], 1)[0]
    assert done.server.adapter["u/residual_B"].shape == (7, 2)


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_what_moves_the_base_is_sent_to_everyone(name):
    strategy = dense.make(name)
    server = dense.rounds(strategy, dense.fresh(), WEIGHTS, 2)[-1].server
    sent = strategy.broadcast(server, "newcomer")
    assert strategy.changes_base
    for site in dense.SHAPES:
        assert dense.relative(dense.effective(sent, site), dense.effective(server.adapter, site)) < 1e-12


# FlexLoRA and HetLoRA ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["us", "sqrt"])
def test_flexlora_error_is_the_discarded_spectrum(split):
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


def test_flexlora_sends_each_client_its_best_rank():
    strategy = dense.make("flexlora", context=RunContext(client_ranks={"c0": 1, "c1": 3, "c2": 2, "c3": 1, "c4": 3}))
    first, second = dense.rounds(strategy, dense.fresh(), WEIGHTS, 2)
    p = dense.fractions(WEIGHTS)
    for site in dense.SHAPES:
        wanted = dense.best_of_rank(dense.mean_product(dense.triples(first, site), p), 3)
        for name, rank in strategy.context.client_ranks.items():
            assert second.models[name][f"{site}/A"].shape[0] == rank
            got = dense.product(strategy.broadcast(second.sent, name), site)
            assert dense.relative(got, dense.best_of_rank(wanted, rank)) < 1e-9


def test_flexlora_with_a_shared_A_is_fedsvds_refactor():
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


def test_hetlora_weights_by_norm_and_pads_with_zeros():
    strategy = dense.make("hetlora", context=RunContext(client_ranks={"c0": 1, "c1": 3, "c2": 2, "c3": 1, "c4": 3}))
    played = dense.rounds(strategy, dense.fresh(), WEIGHTS, 2)
    p = dense.fractions(WEIGHTS)
    for done in played:
        for site in dense.SHAPES:
            B, A = dense.hetlora(dense.triples(done, site), p, 2.0, 3)
            assert dense.relative(dense.array(done.server.adapter[f"{site}/B"]), B) < 1e-10
            assert dense.relative(dense.array(done.server.adapter[f"{site}/A"]), A) < 1e-10
    for name, rank in strategy.context.client_ranks.items():
        sent = strategy.broadcast(played[0].server, name)
        assert torch.equal(sent["u/A"], played[0].server.adapter["u/A"][:rank])
        assert torch.equal(sent["u/B"], played[0].server.adapter["u/B"][:, :rank])


def test_hetlora_falls_back_to_the_sizes_where_all_B_are_zero():
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
def test_rolora_alternates_and_only_moves_the_active_factor(options, order):
    played = dense.rounds(dense.make("rolora", **options), dense.fresh(), WEIGHTS, 4)
    for done, active in zip(played, order, strict=True):
        idle = "A" if active == "B" else "B"
        for site in dense.SHAPES:
            assert torch.equal(done.server.adapter[f"{site}/{idle}"], done.sent.adapter[f"{site}/{idle}"])
            assert not torch.equal(done.server.adapter[f"{site}/{active}"], done.sent.adapter[f"{site}/{active}"])
        for update in done.updates:
            assert sorted(update.adapter.tensors) == sorted(["out/weight", f"u/{active}", f"v/{active}"])


def test_fedsa_shares_A_and_leaves_B_and_the_head_alone():
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


def test_fed_sb_averages_the_core_and_nothing_else():
    strategy = dense.make("fed_sb")
    assert strategy.adapter == "lora_sb"
    start = dense.fresh(kind="lora_sb")
    p = dense.fractions(WEIGHTS)
    for done in dense.rounds(strategy, start, WEIGHTS, 2):
        for update in done.updates:
            assert sorted(update.adapter.tensors) == ["out/weight", "u/R", "v/R"]
        for site in dense.SHAPES:
            expected = dense.mean([dense.array(model[f"{site}/R"]) for model in done.models.values()], p)
            assert dense.relative(dense.array(done.server.adapter[f"{site}/R"]), expected) < 1e-12
            for role in ("A", "B"):
                assert torch.equal(done.server.adapter[f"{site}/{role}"], start[f"{site}/{role}"])
    static = strategy.instructions(done.server).static
    assert static.roles == ("A", "B") and static.sha256 == start.select(("A", "B")).sha256()
    assert not strategy.broadcast(done.server, "c0").select(("A", "B")).tensors


# Stock Flower strategies ---------------------------------------------------------------------------------------------


def test_flowers_fedavg_is_fedit_and_its_median_is_the_median_wrapper():
    start = dense.fresh(dtype=torch.float32)
    for stock, ours in (("FedAvg", "fedit"), ("FedMedian", "median"), ("FedTrimmedAvg", "trimmed_mean")):
        one = dense.rounds(dense.make("flower", rule=stock), start, WEIGHTS, 2)[-1].server.adapter
        other = dense.rounds(dense.make(ours), start, WEIGHTS, 2)[-1].server.adapter
        for key, value in other.tensors.items():
            torch.testing.assert_close(one[key], value, rtol=1e-5, atol=1e-7)


def test_flowers_fedadam_keeps_its_moments_in_the_server_state():
    strategy = dense.make(
        "flower", rule="FedAdam", rule_options={"eta": 0.1, "tau": 1e-3, "beta_1": 0.9, "beta_2": 0.99}
    )
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


def test_an_unknown_flower_rule_is_refused():
    with pytest.raises(InputError, match="FedAvg"):
        dense.make("flower", rule="FedAverage")


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("DifferentialPrivacyServerSideAdaptiveClipping", "the wrong way.*privacy.unit=client"),
        ("DifferentialPrivacyClientSideAdaptiveClipping", "the wrong way.*privacy.unit=client"),
        ("DifferentialPrivacyServerSideFixedClipping", "no ledger.*privacy.unit=client"),
    ],
)
def test_flowers_own_dp_is_refused_with_the_reason(rule, said):
    with pytest.raises(InputError, match=said):
        configs.load("quickstart", ["strategy.name=flower", f"strategy.rule={rule}"])
