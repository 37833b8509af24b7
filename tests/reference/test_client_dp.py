"""Client-level privacy: the clipped and noised sum against numpy, its sensitivity, its noise, its clip."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideAdaptiveClipping, FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft import registry
from fedpeft.privacy import accounting
from fedpeft.seeds import numpy_generator
from fedpeft.state import AdaptedLayer, AdapterState, Needs, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy
from fedpeft.strategies.wrappers.client_dp import CLIP, sum_changes, sum_multiplier
from support.client_dp_rounds import INNER, Quiet, cohort, flat, ones, private

# The sum -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", INNER)
def test_a_round_is_the_noised_clipped_sum_over_a_constant(inner):
    """Reference: every client one long vector, clipped, added up, noise from the seed, divided by m = 7."""
    strategy = private(inner, population=7, run={"seed": 3}, clip=0.8, noise_multiplier=0.5)
    server, updates = cohort(strategy, [0.0, 0.3, 0.8, 2.0, 50.0], weights=[1, 9999, 3, 7, 20])
    roles = strategy.uploads(server)
    start = flat(server.adapter.select(roles))
    total = np.zeros_like(start)
    for update in updates:
        change = flat(update.adapter) - start
        norm = np.linalg.norm(change)
        total += change if norm <= 0.8 else change * 0.8 / norm
    total += 0.5 * 0.8 * numpy_generator(3, "client_dp", 1, "noise").standard_normal(len(start))
    after = strategy.aggregate(server, updates)
    np.testing.assert_allclose(flat(after.adapter.select(roles)), start + total / 7, atol=1e-13)
    assert all(torch.equal(value, server.adapter[key]) for key, value in after.adapter.without(roles).tensors.items())
    assert after.numbers == server.numbers


class Spy(FederatedStrategy):
    def aggregate(self, server, updates):
        self.seen = updates
        return server


def test_the_strategy_inside_sees_one_update_that_stands_for_all():
    spy = Spy()
    strategy = private(spy)
    server, updates = cohort(strategy, [1.0, 1.0, 1.0], weights=[1, 2, 3])
    strategy.aggregate(server, updates)
    (seen,) = spy.seen
    assert (seen.count, seen.weight, seen.metrics) == (3, 1.0, {})
    assert strategy.needs is Needs.INDIVIDUAL  # the server clips: no secure aggregation


def test_server_optimizers_step_on_the_noised_mean():
    """FedAdam around FedIT, by hand: m = 0.1 D, v = 0.01 D^2, one step of 0.1 m / (sqrt v + 1e-3)."""
    adam = registry.load("strategies", "fedadam")(inner=registry.load("strategies", "fedit")())
    strategy = private(adam, cls=Quiet, clip=1.0)
    server, updates = cohort(strategy, [4.0, 0.5])
    start = flat(server.adapter)
    changes = [flat(update.adapter) - start for update in updates]
    D = (changes[0] / 4.0 + changes[1]) / 5
    expected = start + 0.1 * (0.1 * D) / (np.sqrt(0.01 * D**2) + 1e-3)
    np.testing.assert_allclose(flat(strategy.aggregate(server, updates).adapter), expected, atol=1e-12)


# Sensitivity ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 8), st.floats(-3, 150), st.floats(0.01, 10), st.integers(0, 4), st.floats(-3, 6))
def test_one_more_client_moves_the_mean_by_at_most_clip_over_cohort(tensors, size, clip, others, weight):
    """Any number of tensors, any size up to 1e150, any example count, any number of replies."""
    random = np.random.default_rng(7)

    def adapter(scale: float) -> AdapterState:
        values = {f"h/{index}": torch.tensor(scale * random.standard_normal((2, 3))) for index in range(tensors)}
        return AdapterState(values, {"h": AdaptedLayer("head", (2, 3))})

    strategy = private(population=5, cls=Quiet, clip=clip)
    server = ServerState(adapter(0.0))
    updates = [Update(f"c{index}", 1.0, adapter(1.0)) for index in range(others)]
    extra = Update("extra", 10.0**weight, adapter(10.0**size))
    without = flat(strategy.aggregate(server, updates).adapter)
    with_it = flat(strategy.aggregate(server, [*updates, extra]).adapter)
    bound = clip / 5
    assert np.linalg.norm(with_it - without) <= bound * (1 + 1e-9)
    if size > 2:  # the bound is reached, so that dividing by too much is no way to keep it
        assert np.linalg.norm(with_it - without) >= bound * (1 - 1e-9)


def test_the_divisor_stays_when_clients_drop():
    strategy = private(cls=Quiet, population=9, run={"clients_per_round": 6}, clip=10.0)
    server, updates = cohort(strategy, [1.0, 2.0, 3.0])
    start = flat(server.adapter)
    for replied in (updates, updates[1:], updates[2:], []):
        total = sum((flat(update.adapter) - start for update in replied), np.zeros_like(start))
        np.testing.assert_allclose(flat(strategy.aggregate(server, replied).adapter), start + total / 6, atol=1e-13)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.7e308, 1e200])
def test_what_has_no_finite_norm_adds_nothing(value):
    strategy = private(cls=Quiet, clip=1.0)
    server, updates = cohort(strategy, [0.5, 0.5])
    server = replace(server, adapter=server.adapter.replace({"u/B": torch.full((7, 3), 1.7e308, dtype=torch.float64)}))
    updates = [replace(one, adapter=one.adapter.replace({"u/B": server.adapter["u/B"]})) for one in updates]
    bad = torch.full((7, 3), value, dtype=torch.float64)
    broken = replace(updates[1], adapter=updates[1].adapter.replace({"u/B": bad}))
    alone, both = (strategy.aggregate(server, chosen).adapter for chosen in (updates[:1], [updates[0], broken]))
    np.testing.assert_array_equal(flat(alone), flat(both))


@settings(deadline=None, max_examples=25)
@given(st.floats(0.05, 4), st.floats(1.01, 20), st.floats(-3, 3))
def test_sum_and_count_together_move_by_at_most_one_over_z(z, excess, size):
    """Both releases in units of their noise are one vector; one client moves it by 1 / z at most, and may reach it."""
    count_noise, clip = excess * z / 2, 0.7
    start = AdapterState({"h/w": torch.zeros(4).double()}, {"h": AdaptedLayer("head", (4,))})
    update = Update("c", 1.0, start.map(lambda value: value + 10.0**size / 2))
    total, unclipped = sum_changes(start, [update], clip)
    moved = math.hypot(float(total.norm()) / (sum_multiplier(z, count_noise) * clip), unclipped / count_noise)
    assert moved <= (1 + 1e-9) / z
    assert moved >= (1 - 1e-9) / z or 10.0**size < clip


# Noise ---------------------------------------------------------------------------------------------------------------


def wide() -> ServerState:
    """120,000 coordinates: two factors of one size and a head."""
    sites = {"q": AdaptedLayer("lora", (200, 200)), "out": AdaptedLayer("head", (400, 100))}
    sizes = {"q/A": (200, 200), "q/B": (200, 200), "out/weight": (400, 100)}
    return ServerState(AdapterState({key: torch.zeros(size).double() for key, size in sizes.items()}, sites))


@pytest.mark.parametrize("randomness", ["seeded", "os"])
def test_noise_has_its_size_in_every_tensor_and_is_independent(randomness):
    strategy = private(population=20, noise_multiplier=1.5, clip=0.4, randomness=randomness)
    server = wide()
    sigma = 1.5 * 0.4 / 20
    noises = {}
    for number in range(3):
        now = replace(server, round=number)
        noises[number] = strategy.aggregate(now, [Update("c", 1.0, server.adapter)] * (10 * number)).adapter
        assert flat(noises[number]).std() == pytest.approx(sigma, rel=0.01)
        assert abs(flat(noises[number]).mean()) < 5 * sigma / math.sqrt(120_000)
        for value in noises[number].tensors.values():
            assert float(value.std()) == pytest.approx(sigma, rel=0.02)
        A, B = (noises[number][key].numpy().ravel() for key in ("q/A", "q/B"))
        assert abs(np.corrcoef(A, B)[0, 1]) < 0.025
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert abs(np.corrcoef(flat(noises[one]), flat(noises[other]))[0, 1]) < 0.015


def test_seeded_noise_is_a_function_of_seed_and_round_and_is_added_once():
    server = wide()
    zero = Update("c", 1.0, server.adapter)
    first = private(run={"seed": 1}).aggregate(server, [])
    for replies in ([zero], [zero] * 5):
        assert torch.equal(private(run={"seed": 1}).aggregate(server, replies).adapter["q/A"], first.adapter["q/A"])
    for other in (
        private(run={"seed": 2}).aggregate(server, []),
        private(run={"seed": 1}).aggregate(replace(server, round=1), []),
    ):
        assert abs(np.corrcoef(flat(first.adapter), flat(other.adapter))[0, 1]) < 0.015
    system = private(randomness="os")
    assert not torch.equal(system.aggregate(server, []).adapter["q/A"], system.aggregate(server, []).adapter["q/A"])


# Adaptive clipping ---------------------------------------------------------------------------------------------------


def flowers_clip(clip: float, rounds: int) -> float:
    """The same by Flower's wrapper, without noise: ten updates of norm 1 each round."""
    logged = DifferentialPrivacyServerSideAdaptiveClipping(
        FedAvg(),
        noise_multiplier=0.0,
        num_sampled_clients=10,
        initial_clipping_norm=clip,
        target_clipped_quantile=0.5,
        clip_norm_lr=0.2,
        clipped_count_stddev=0.0,
    )
    logged.current_arrays = ArrayRecord({"w": Array(np.zeros(4))})
    for number in range(1, rounds + 1):
        replies = []
        for client in range(1, 11):
            content = RecordDict(
                {"arrays": ArrayRecord({"w": Array(np.full(4, 0.5))}), "metrics": MetricRecord({"num-examples": 1})}
            )
            replies.append(Message(content, metadata=Metadata(1, "", client, 0, "", "", 0.0, 1.0, "train")))
        logged.aggregate_train(number, replies)
    return logged.clipping_norm


@pytest.mark.parametrize(("clip", "flowers"), [(0.1, 0.0135), (10.0, 73.9)])
def test_the_clip_settles_at_the_norm_where_flowers_runs_away(clip, flowers):
    strategy = private(population=10, cls=Quiet, clip=clip, adaptive_clip=True, noise_multiplier=0.1)
    server, updates = ones(10)
    path = []
    for _ in range(40):
        adapted = strategy.aggregate(server, updates)
        server = replace(server, numbers=adapted.numbers)
        path.append(strategy.clip(server))
    assert all(math.exp(-0.11) < value < math.exp(0.11) for value in path[-10:])
    assert flowers_clip(clip, 20) == pytest.approx(flowers, rel=0.01)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.sampled_from([0.2, 0.5, 2.0]), max_size=8), st.integers(0, 5), st.floats(0.1, 0.9))
def test_the_clip_moves_by_the_noised_share_of_the_planned_cohort(norms, number, quantile):
    """Eight planned; who is absent counts as one half, so that a client moves the count by one half only."""
    strategy = private(
        population=8,
        run={"seed": 5},
        clip=3.0,
        adaptive_clip=True,
        clip_quantile=quantile,
        clip_lr=0.3,
        clip_count_noise=1.7,
        noise_multiplier=0.9,
    )
    server, (one, *_) = ones(1)
    updates = [replace(one, adapter=one.adapter.map(lambda value, norm=norm: value * norm)) for norm in norms]
    after = strategy.aggregate(replace(server, round=number, numbers={CLIP: 0.5, "other": 1}), updates)
    noise = numpy_generator(5, "client_dp", number + 1, "noise").standard_normal(5)
    votes = sum(1 if norm <= 0.5 else 0 for norm in norms) + (8 - len(norms)) / 2 + 1.7 * noise[4]
    assert after.numbers[CLIP] == pytest.approx(0.5 * math.exp(-0.3 * (votes / 8 - quantile)), rel=1e-12)
    total = sum(
        (flat(update.adapter) * min(1, 0.5 / norm) for update, norm in zip(updates, norms, strict=True)), np.zeros(4)
    )
    z_sum = 1 / math.sqrt(1 / 0.9**2 - 1 / 3.4**2)
    np.testing.assert_allclose(flat(after.adapter), (total + 0.5 * z_sum * noise[:4]) / 8, atol=1e-12)
    assert strategy.clip(after) == after.numbers[CLIP] and after.numbers["other"] == 1


@pytest.mark.parametrize(("z", "count_noise"), [(1.0, 0.6), (0.5, 1.0), (3.0, 5.0)])
def test_sum_and_count_cost_what_is_claimed(z, count_noise):
    """The count is shifted by 1/2, so its sensitivity is 1/2 and its multiplier twice its noise."""
    pair = ((1.0, sum_multiplier(z, count_noise), 10), (1.0, 2 * count_noise, 10))
    for accountant, tolerance in (("rdp", 1e-6), ("pld", 2e-3)):
        claimed = accounting.compose_epsilon(((1.0, z, 10),), 1e-5, accountant)
        assert accounting.compose_epsilon(pair, 1e-5, accountant) == pytest.approx(claimed, abs=tolerance)
        assert accounting.compose_epsilon(pair[:1], 1e-5, accountant) < claimed - 0.05
