"""Every aggregation rule against dense float64 linear algebra: what all rules share, and each rule's own numbers."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.state import AdaptedLayer, AdapterState, Needs, RunContext, ServerState, Update
from support import dense
from support.classified import EXACT, REFERENCED, ROBUST

WEIGHTS = [10.0, 30.0, 20.0, 15.0, 25.0]
# FedSA has no global product, server optimizers move by a step of their own: both are tested apart.
RULES = REFERENCED
STATEFUL = (*RULES, "fedsa", "fedadam", "fedyogi", "fedadagrad", "atp")
FLOAT32 = {"flora", "fedex", "flower"}  # residual factors, and Flower's arrays, are float32


def tolerance(name):
    return 2e-6 if name in FLOAT32 else 1e-10


def begin(name, **more):
    return dense.fresh(kind="lora_sb" if name == "fed_sb" else "lora", **more)


def strategy_of(name, **options):
    return dense.make(name, context=RunContext(population=len(WEIGHTS)), **options)


# What all rules share ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_equal_clients_give_back_the_common_function(name):
    played = dense.rounds(strategy_of(name), begin(name), WEIGHTS, 3, seeds=[7] * len(WEIGHTS))
    for number, done in enumerate(played):
        client = done.models["c0"]
        for site in dense.SHAPES:
            expected = dense.base(done.sent.adapter, site) + dense.product(client, site)
            assert np.linalg.norm(dense.product(client, site)) > 1e-3
            assert dense.relative(dense.effective(done.server.adapter, site), expected) < tolerance(name), (
                site,
                number,
            )
        torch.testing.assert_close(done.server.adapter["out/weight"], client["out/weight"], rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", EXACT)
def test_exact_rules_add_the_mean_of_the_products(name):
    played = dense.rounds(strategy_of(name), begin(name), WEIGHTS, 4)
    p = dense.fractions(WEIGHTS)
    for done in played:
        for site in dense.SHAPES:
            expected = dense.base(done.sent.adapter, site) + dense.mean_product(dense.triples(done, site), p)
            assert dense.relative(dense.effective(done.server.adapter, site), expected) < tolerance(name)


def test_fedit_is_the_product_of_means_and_not_exact():
    done = dense.rounds(dense.make("fedit"), dense.fresh(), WEIGHTS, 1)[0]
    p = dense.fractions(WEIGHTS)
    for site in dense.SHAPES:
        clients = dense.triples(done, site)
        got = dense.product(done.server.adapter, site)
        assert dense.relative(got, dense.fedit(clients, p, 2.0)) < 1e-12
        residual = dense.mean_product(clients, p) - got
        covariance = dense.mean(
            [
                2.0 * (B - dense.mean([b for b, _, _ in clients], p)) @ (A - dense.mean([a for _, a, _ in clients], p))
                for B, A, _ in clients
            ],
            p,
        )
        assert dense.relative(covariance, residual) < 1e-10 and np.linalg.norm(residual) > 0.01


@pytest.mark.parametrize("name", [name for name in RULES if name not in ROBUST])
def test_heads_are_averaged_by_weight(name):
    done = dense.rounds(strategy_of(name), begin(name), WEIGHTS, 1)[0]
    expected = dense.mean(
        [dense.array(model["out/weight"]) for model in done.models.values()], dense.fractions(WEIGHTS)
    )
    assert dense.relative(dense.array(done.server.adapter["out/weight"]), expected) < 2e-7


@pytest.mark.parametrize("name", [*RULES, "fedadam"])
@settings(deadline=None, max_examples=4)
@given(order=st.permutations(range(len(WEIGHTS))))
def test_permuting_clients_changes_nothing_beyond_rounding(name, order):
    strategy = strategy_of(name)
    second = dense.rounds(strategy, begin(name), WEIGHTS, 2)[1]
    renamed = [
        Update(f"c{place}", second.updates[index].weight, second.updates[index].adapter)
        for place, index in enumerate(order)
    ]
    again = strategy.aggregate(second.sent, renamed)
    for site in dense.SHAPES:
        assert dense.relative(
            dense.effective(again.adapter, site), dense.effective(second.server.adapter, site)
        ) < tolerance(name)


@pytest.mark.parametrize("name", RULES)
def test_weights_count_relative_to_the_participants(name):
    strategy = strategy_of(name)
    done = dense.rounds(strategy, begin(name), WEIGHTS, 2)[1]
    scaled = [Update(update.client, 7 * update.weight, update.adapter) for update in done.updates]
    again = strategy.aggregate(done.sent, scaled)
    for site in dense.SHAPES:
        assert dense.relative(
            dense.effective(again.adapter, site), dense.effective(done.server.adapter, site)
        ) < tolerance(name)


@pytest.mark.parametrize("name", EXACT)
def test_missing_clients_are_left_out_of_the_weights(name):
    strategy = strategy_of(name)
    done = dense.rounds(strategy, begin(name), WEIGHTS, 1)[0]
    again = strategy.aggregate(done.sent, done.updates[:2])
    for site in dense.SHAPES:
        expected = dense.mean_product(dense.triples(done, site)[:2], [0.25, 0.75])
        assert dense.relative(dense.effective(again.adapter, site), expected) < tolerance(name)


@pytest.mark.parametrize("name", [name for name in RULES if name != "krum"])
def test_one_client_gets_its_own_function_back(name):
    for done in dense.rounds(strategy_of(name), begin(name), [12.0], 2):
        for site in dense.SHAPES:
            expected = dense.base(done.sent.adapter, site) + dense.product(done.models["c0"], site)
            assert dense.relative(dense.effective(done.server.adapter, site), expected) < tolerance(name)


@pytest.mark.parametrize("name", [*EXACT, "fedit", "lora_fair", "flexlora", "hetlora"])
def test_another_scaling_of_a_client_is_folded_in(name):
    """Client k's function is s_k B_k A_k: twice the scaling with half of B is the same client."""
    strategy = strategy_of(name)
    done = dense.rounds(strategy, begin(name), WEIGHTS, 1)[0]
    halved = "R" if name == "fed_sb" else "B"
    updates = []
    for index, update in enumerate(done.updates):
        factor = 1.0 + index
        sites = {
            key: AdaptedLayer(site.kind, site.shape, site.scaling * (factor if site.kind != "head" else 1))
            for key, site in update.adapter.sites.items()
        }
        tensors = {
            key: value / factor if update.adapter.role(key) == halved else value
            for key, value in update.adapter.tensors.items()
        }
        updates.append(Update(update.client, update.weight, AdapterState(tensors, sites)))
    again = strategy.aggregate(done.sent, updates)
    for site in dense.SHAPES:
        assert dense.relative(
            dense.effective(again.adapter, site), dense.effective(done.server.adapter, site)
        ) < tolerance(name)
        assert again.adapter.sites[site].scaling == 2.0


@pytest.mark.parametrize("name", STATEFUL)
def test_aggregate_is_pure(name):
    strategy = strategy_of(name)
    done = dense.rounds(strategy, begin(name), WEIGHTS, 2)[1]
    before = (
        done.sent.adapter.sha256(),
        {key: value.clone() for key, value in done.sent.memory.items()},
        copy.deepcopy(done.sent.numbers),
        [update.adapter.sha256() for update in done.updates],
    )
    again = strategy.aggregate(done.sent, done.updates)
    assert again.adapter.sha256() == done.server.adapter.sha256()
    assert done.sent.adapter.sha256() == before[0] and done.sent.numbers == before[2]
    assert all(torch.equal(done.sent.memory[key], value) for key, value in before[1].items())
    assert [update.adapter.sha256() for update in done.updates] == before[3]


@pytest.mark.parametrize("name", STATEFUL)
def test_all_state_is_in_the_server_state(name):
    """A new strategy object goes on from a state read back from plain data, bit for bit: what resume relies on."""
    start = begin(name, dtype=torch.float32)
    played = dense.rounds(strategy_of(name), start, WEIGHTS, 4)
    middle = played[1].server
    state = ServerState(
        middle.adapter.clone(),
        middle.round,
        {key: value.clone() for key, value in middle.memory.items()},
        json.loads(json.dumps(middle.numbers)),
    )
    other = strategy_of(name)
    origin = played[0].sent.adapter
    for expected in played[2:]:
        done = dense.play(other, state, origin, WEIGHTS)
        state = done.server
        assert state.adapter.sha256() == expected.server.adapter.sha256()


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_kept(name, dtype):
    start = begin(name, dtype=dtype)
    server = dense.rounds(strategy_of(name), start, WEIGHTS, 2)[-1].server
    for key in start.tensors:
        assert server.adapter[key].dtype == dtype
        assert torch.isfinite(server.adapter[key]).all()


def test_which_rules_need_individual_updates():
    individual = {"lora_fair", "flora", "flexlora", "hetlora", "fedex", "norm_clip", "trimmed_mean", "median", "krum"}
    for name in RULES:
        if name != "flower":
            assert dense.make(name).needs is (Needs.INDIVIDUAL if name in individual else Needs.SUM), name


def test_error_order_of_the_rules():
    """Distance from the mean of products: FlexLoRA <= FAIR (lambda -> 0) <= FAIR <= FedIT, each strictly here."""
    p = dense.fractions(WEIGHTS)
    errors = []
    for strategy in (
        dense.make("flexlora"),
        dense.make("lora_fair", lambda_=1e-12),
        dense.make("lora_fair", lambda_=0.5),
        dense.make("lora_fair", lambda_=50.0),
        dense.make("fedit"),
    ):
        done = dense.rounds(strategy, dense.fresh(), WEIGHTS, 1)[0]
        errors.append(
            [
                np.linalg.norm(
                    dense.product(done.server.adapter, site) - dense.mean_product(dense.triples(done, site), p)
                )
                for site in dense.SHAPES
            ]
        )
    errors = np.array(errors)
    assert (np.diff(errors, axis=0) > 1e-6).all()


def test_bytes_of_roberta_large():
    """q and v of 24 layers of width 1024, r = 8, float32: Table 6 of the FedSVD paper in bytes."""
    sites = {f"{index}": (1024, 1024) for index in range(48)}
    start = dense.fresh(8, 1.0, torch.float32, sites, head=False)
    expected = {
        ("fedit", ()): (3145728, 3145728),
        ("ffa_lora", ()): (1572864, 1572864),
        ("fedsvd", ()): (1572864, 1585152),
        ("fedsvd", (("transport", "dense"),)): (1572864, 3145728),
        ("lora_fair", ()): (3145728, 3145728),
        ("flexlora", ()): (3145728, 3145728),
    }
    for (name, options), (up, down) in expected.items():
        strategy = dense.make(name, **dict(options))
        server = strategy.initial(start, 0)
        sent = strategy.broadcast(server, "c0")
        assert start.select(strategy.uploads(server)).nbytes == up, name
        assert sent.nbytes == down, name
