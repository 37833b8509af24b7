"""Strategies put around others: robust statistics, server optimizers, FedProx, SCAFFOLD; against numpy and by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from fedpeft.errors import InputError, RunError
from fedpeft.state import AdaptedLayer, AdapterState, Needs, RunContext, ServerState, Update
from fedpeft.strategies.client import client_halves
from support import dense

WEIGHTS = [10.0, 30.0, 20.0, 15.0, 25.0]
KEYS = ["out/weight", "u/A", "u/B", "v/A", "v/B"]


def cohort(count=5, outlier=0.0):
    """A server in mid-run and `count` updates; the last is thrown far off by `outlier`."""
    start = dense.drift(dense.fresh(), ("A", "B", "head"), 99)
    updates = [
        Update(f"c{index}", weight, dense.drift(start, ("A", "B", "head"), index, 0.1 + 0.05 * index))
        for index, weight in zip(range(count), itertools.cycle(WEIGHTS))
    ]
    if outlier:
        updates[-1] = Update("c-last", 1e6, updates[-1].adapter.map(lambda value: value + outlier))
        updates.sort(key=lambda update: update.client)
    return ServerState(start), updates


def vectors(updates):
    return [np.concatenate([dense.array(update.adapter[key]).ravel() for key in KEYS]) for update in updates]


# Robust statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 5])
def test_median_is_numpys(count):
    server, updates = cohort(count)
    after = dense.make("median").aggregate(server, updates).adapter
    for key in KEYS:
        expected = np.median([dense.array(update.adapter[key]) for update in updates], axis=0)
        np.testing.assert_allclose(dense.array(after[key]), expected, atol=1e-14)


@pytest.mark.parametrize(
    ("fraction", "count", "cut"), [(0.2, 5, 1), (0.2, 9, 1), (0.4, 5, 2), (0.0, 4, 0), (0.2, 4, 0), (0.1, 10, 1)]
)
def test_trimmed_mean_cuts_from_each_end(fraction, count, cut):
    server, updates = cohort(count)
    after = dense.make("trimmed_mean", fraction=fraction).aggregate(server, updates).adapter
    for key in KEYS:
        values = np.sort([dense.array(update.adapter[key]) for update in updates], axis=0)
        np.testing.assert_allclose(dense.array(after[key]), values[cut : count - cut].mean(axis=0), atol=1e-13)


@pytest.mark.parametrize(("byzantine", "keep"), [(1, 1), (1, 3), (2, 2), (0, 4)])
def test_krum_keeps_the_best_scores(byzantine, keep):
    server, updates = cohort(7, outlier=5.0)
    scores = dense.krum_scores(vectors(updates), byzantine)
    best = sorted(np.argsort(scores)[:keep])
    p = dense.fractions([updates[index].weight for index in best])
    after = dense.make("krum", byzantine=byzantine, keep=keep).aggregate(server, updates).adapter
    assert sum(update.client == "c-last" for update in updates) == 1 and updates[best[0]].client != "c-last"
    for key in KEYS:
        expected = dense.mean([dense.array(updates[index].adapter[key]) for index in best], p)
        np.testing.assert_allclose(dense.array(after[key]), expected, atol=1e-13)


def test_krum_refuses_too_few_updates():
    server, updates = cohort(4)
    with pytest.raises((InputError, RunError), match=r"krum.*\d"):
        dense.make("krum", byzantine=2).aggregate(server, updates)


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "krum"])
def test_robust_rules_withstand_a_far_and_heavy_client(name):
    server, updates = cohort(5, outlier=1e6)
    honest = [update for update in updates if update.client != "c-last"]
    after = dense.make(name).aggregate(server, updates).adapter
    for key in KEYS:
        values = [dense.array(update.adapter[key]) for update in honest]
        assert (dense.array(after[key]) <= np.max(values, axis=0) + 1e-12).all()
        assert (dense.array(after[key]) >= np.min(values, axis=0) - 1e-12).all()


@pytest.mark.parametrize("bound", [1.5, None])
def test_norm_clip_shortens_long_updates_and_leaves_short_ones(bound):
    server, updates = cohort(5)
    moves = [vector - vectors([Update("s", 1.0, server.adapter)])[0] for vector in vectors(updates)]
    norms = [np.linalg.norm(move) for move in moves]
    limit = np.median(norms) if bound is None else bound
    assert min(norms) < limit < max(norms)
    clipped = [move * min(1.0, limit / norm) for move, norm in zip(moves, norms, strict=True)]
    expected = vectors([Update("s", 1.0, server.adapter)])[0] + dense.mean(clipped, dense.fractions(WEIGHTS))
    after = dense.make("norm_clip", bound=bound).aggregate(server, updates).adapter
    np.testing.assert_allclose(vectors([Update("s", 1.0, after)])[0], expected, atol=1e-13)


def test_norm_clip_with_a_loose_bound_is_the_inner_rule():
    server, updates = cohort()
    loose = dense.make("norm_clip", bound=1e9).aggregate(server, updates).adapter
    plain = dense.make("fedit").aggregate(server, updates).adapter
    for key in KEYS:
        np.testing.assert_allclose(dense.array(loose[key]), dense.array(plain[key]), atol=1e-13)


def test_norm_clip_measures_from_what_a_client_of_low_rank_was_sent():
    """Rank-1 and rank-3 clients: each is clipped around its own first rows, not around the server's factors."""
    inner = dense.make("flexlora", context=RunContext(client_ranks={"c0": 1, "c1": 3}))
    strategy = dense.make("norm_clip", inner=inner, bound=0.5)
    first, second = dense.rounds(strategy, dense.fresh(), [1.0, 3.0], 2)
    clipped = []
    for update in second.updates:
        sent = strategy.broadcast(second.sent, update.client)
        move = {key: value - sent[key] for key, value in update.adapter.tensors.items()}
        norm = math.sqrt(sum(float(value.square().sum()) for value in move.values()))
        assert norm > 0.5
        tensors = {key: sent[key] + value * 0.5 / norm for key, value in move.items()}
        clipped.append(Update(update.client, update.weight, AdapterState(tensors, update.adapter.sites)))
    expected = inner.aggregate(second.sent, clipped).adapter
    for site in dense.SHAPES:
        assert dense.relative(dense.product(second.server.adapter, site), dense.product(expected, site)) < 1e-10
    assert first.server.round == 1


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "krum"])
def test_coordinate_statistics_refuse_unequal_ranks(name):
    ranks = {"c0": 1, "c1": 3, "c2": 2, "c3": 1, "c4": 3}
    inner = dense.make("hetlora", context=RunContext(client_ranks=ranks))
    with pytest.raises(InputError, match=r"shape|rank"):
        dense.rounds(dense.make(name, inner=inner), dense.fresh(), WEIGHTS, 1)


def test_robust_rules_see_individual_updates():
    for name in ("norm_clip", "trimmed_mean", "median", "krum"):
        assert dense.make(name, inner=dense.make("ffa_lora")).needs is Needs.INDIVIDUAL


# Wrappers leave the rest to what they wrap ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "norm_clip", "fedprox"])
def test_a_wrapper_trains_sends_and_refactors_as_its_inner_strategy(name):
    wrapped = dense.make(name, inner=dense.make("fedsvd"))
    played = dense.rounds(wrapped, dense.fresh(), [1.0, 1.0, 1.0], 3, seeds=[5, 5, 5])
    plain = dense.rounds(dense.make("fedsvd"), dense.fresh(), [1.0, 1.0, 1.0], 3, seeds=[5, 5, 5])
    assert wrapped.trains == ("B", "head") and wrapped.uploads(played[0].sent) == ("B", "head")
    assert "u/M" in wrapped.broadcast(played[1].sent, "c0") and wrapped.inner.config.transport == "core"
    for one, other in zip(played, plain, strict=True):
        for key, value in other.server.adapter.tensors.items():
            np.testing.assert_allclose(dense.array(one.server.adapter[key]), dense.array(value), atol=1e-9)


def test_wrappers_compose_in_order():
    """Clip to 0.7, then take the median: not the other way round."""
    server, updates = cohort()
    both = dense.make("norm_clip", inner=dense.make("median"), bound=0.7).aggregate(server, updates).adapter
    origin = vectors([Update("s", 1.0, server.adapter)])[0]
    moves = [vector - origin for vector in vectors(updates)]
    clipped = [move * min(1.0, 0.7 / np.linalg.norm(move)) for move in moves]
    np.testing.assert_allclose(vectors([Update("s", 1.0, both)])[0], origin + np.median(clipped, axis=0), atol=1e-13)


def test_wrappers_know_what_the_inner_strategy_knows_of_the_run():
    context = RunContext(client_ranks={"c0": 1}, population=9)
    outer = dense.make("fedprox", inner=dense.make("norm_clip", inner=dense.make("flora", context=context)))
    assert outer.context is outer.inner.context is context
    assert outer.unequal_ranks and outer.changes_base


# FedProx and SCAFFOLD ------------------------------------------------------------------------------------------------


def test_fedprox_tells_clients_mu_and_aggregates_as_before():
    strategy = dense.make("fedprox", mu=0.3)
    server, updates = cohort()
    assert [half.proximal(None) for half in client_halves(strategy)] == [0.0, 0.3]
    after, plain = strategy.aggregate(server, updates).adapter, dense.make("fedit").aggregate(server, updates).adapter
    assert after.sha256() == plain.sha256()


def controls(strategy, server):
    return {key: value.double().numpy() for key, value in strategy.broadcast(server, "c0").extra.items()}


def test_scaffold_server_step():
    """c += |S| / N mean(delta c), unweighted; x += eta_g (mean y - x). Equal weights, 2 of 8 clients."""
    strategy = dense.make("scaffold", context=RunContext(population=8), server_lr=0.5)
    start = dense.fresh()
    server = strategy.initial(start, 0)
    zero = controls(strategy, server)
    assert set(zero) == {f"control:{key}" for key in KEYS} and not any(value.any() for value in zero.values())
    expected = zero
    for _ in range(2):
        done = dense.play(strategy, server, start, [3.0, 3.0])
        for key in KEYS:
            old, new = dense.array(server.adapter[key]), dense.array(done.server.adapter[key])
            mean = np.mean([dense.array(model[key]) for model in done.models.values()], axis=0)
            np.testing.assert_allclose(new, old + 0.5 * (mean - old), atol=1e-13)
        moves = [update.adapter.extra for update in done.updates]
        expected = {
            key: value + 2 / 8 * np.mean([dense.array(move[key]) for move in moves], axis=0)
            for key, value in expected.items()
        }
        server = done.server
        got = controls(strategy, server)
        for key, value in expected.items():
            np.testing.assert_allclose(got[key], value, atol=2e-7)


def test_scaffold_controls_are_not_weighted_by_examples():
    strategy = dense.make("scaffold", context=RunContext(population=2))
    start = dense.fresh()
    done = dense.play(strategy, strategy.initial(start, 0), start, [1.0, 99.0])
    got = controls(strategy, done.server)
    for key, value in got.items():
        expected = np.mean([dense.array(update.adapter.extra[key]) for update in done.updates], axis=0)
        np.testing.assert_allclose(value, expected, atol=2e-7)


def test_scaffold_sends_controls_for_trained_tensors_only():
    strategy = dense.make("scaffold", inner=dense.make("ffa_lora"))
    server = strategy.initial(dense.fresh(), 0)
    assert set(controls(strategy, server)) == {"control:out/weight", "control:u/B", "control:v/B"}


@pytest.mark.parametrize("wrapper", ["scaffold", "fedadam", "fedyogi", "fedadagrad"])
@pytest.mark.parametrize("inner", ["fedsvd", "flexlora"])
def test_state_by_coordinate_refuses_a_moving_basis(wrapper, inner):
    with pytest.raises(InputError, match=f"(?is)(?=.*{wrapper})(?=.*{inner})"):
        dense.make(wrapper, inner=dense.make(inner))


# Server optimizers ---------------------------------------------------------------------------------------------------

ETA, BETA_1, BETA_2, TAU = 0.1, 0.9, 0.99, 1e-3
MOVES = [1.0, -2.0, 0.1, 0.5]


def path(name, moves, **options):
    """B of a 1 x 1 site after each round whose clients' weighted mean moves B by these amounts; A never moves."""
    start = AdapterState(
        {"q/A": torch.ones(1, 1).double(), "q/B": torch.zeros(1, 1).double()}, {"q": AdaptedLayer("lora", (1, 1))}
    )
    strategy = dense.make(name, **options)
    server, values = strategy.initial(start, 0), []
    for move in moves:
        # 1/4 of (move + 3 d) and 3/4 of (move - d): the mean is `move`
        updates = [
            Update(client, weight, server.adapter.replace({"q/B": server.adapter["q/B"] + move + shift}))
            for client, weight, shift in (("a", 1.0, 0.3), ("b", 3.0, -0.1))
        ]
        server = strategy.aggregate(server, updates)
        values.append(float(server.adapter["q/B"]))
        assert float(server.adapter["q/A"]) == 1.0
    return values


def reference(name, moves):
    """theta += eta m / (sqrt v + tau), no bias correction; v = m = 0 at first."""
    theta, m, v, values = 0.0, 0.0, 0.0, []
    for move in moves:
        m = move if name == "fedadagrad" else BETA_1 * m + (1 - BETA_1) * move
        if name == "fedadam":
            v = BETA_2 * v + (1 - BETA_2) * move**2
        elif name == "fedyogi":
            v = v - (1 - BETA_2) * move**2 * np.sign(v - move**2)
        else:
            v = v + move**2
        theta += ETA * m / (math.sqrt(v) + TAU)
        values.append(theta)
    return values


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
def test_server_optimizers_follow_their_equations(name):
    np.testing.assert_allclose(path(name, MOVES), reference(name, MOVES), rtol=2e-6)


@pytest.mark.parametrize(
    ("name", "first"), [("fedadam", 0.1 * 0.1 / 0.101), ("fedyogi", 0.1 * 0.1 / 0.101), ("fedadagrad", 0.1 / 1.001)]
)
def test_first_step_has_no_bias_correction(name, first):
    assert path(name, [1.0])[0] == pytest.approx(first, rel=1e-6)


def test_yogi_and_adam_part_when_moves_shrink():
    assert path("fedadam", MOVES)[:1] == pytest.approx(path("fedyogi", MOVES)[:1])
    assert abs(path("fedadam", MOVES)[2] - path("fedyogi", MOVES)[2]) > 1e-6


def test_options_of_the_server_optimizers():
    """lr = 1, beta_1 = 0, beta_2 = 0: a step of move / (|move| + tau)."""
    assert path("fedadam", [0.5], lr=1.0, beta_1=0.0, beta_2=0.0, tau=0.5)[0] == pytest.approx(0.5)
    assert path("fedadagrad", [0.5], lr=2.0, tau=0.5)[0] == pytest.approx(1.0)


def test_server_optimizers_move_every_trained_role_and_no_other():
    strategy = dense.make("fedadam", inner=dense.make("ffa_lora"))
    played = dense.rounds(strategy, dense.fresh(), WEIGHTS, 2)
    for done in played:
        for key in KEYS:
            assert torch.equal(done.server.adapter[key], done.sent.adapter[key]) == key.endswith("/A")
