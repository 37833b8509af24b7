"""Client-level privacy: who is sampled, what is spent and told, and whole runs that account for every release."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedpeft.errors import InputError
from fedpeft.privacy import accounting
from fedpeft.privacy.ledger import Ledger
from fedpeft.record import checkpoint
from fedpeft.seeds import numpy_generator
from fedpeft.simulations import run as runs
from fedpeft.state import RoundFailed, Rules, ServerState
from fedpeft.strategies.rules.fedit import FedIT
from fedpeft.strategies.wrappers.client_dp import describe
from support.client_dp_rounds import INNER, Quiet, cohort, ones, private

# Sampling and account ------------------------------------------------------------------------------------------------


def test_poisson_sampling_takes_each_client_independently():
    strategy = private(population=40, run={"clients_per_round": 10}, client_sampling="poisson")
    names, rules = [f"c{index:02d}" for index in range(40)], Rules(rounds=1, clients_per_round=10)
    rounds = [strategy.choose(names, rules, number) for number in range(4000)]
    joined = np.array([[name in chosen for name in names] for chosen in rounds])
    sizes = joined.sum(axis=1)
    assert sizes.mean() == pytest.approx(10, abs=0.2)
    assert sizes.var() == pytest.approx(40 * 0.25 * 0.75, rel=0.1)
    assert np.abs(joined.mean(axis=0) - 0.25).max() < 0.03
    off = np.corrcoef(joined.T)[~np.eye(40, dtype=bool)]
    assert np.abs(off).max() < 0.08
    assert np.abs([np.corrcoef(joined[:-1, k], joined[1:, k])[0, 1] for k in range(40)]).max() < 0.08
    assert rounds[7] == strategy.choose(names, rules, 7) == sorted(rounds[7])
    # The rate is what is accounted for, also when only half of the clients have joined.
    few = [len(strategy.choose(names[:20], rules, number)) for number in range(2000)]
    assert np.mean(few) == pytest.approx(5, abs=0.2)
    system = private(population=40, run={"clients_per_round": 20}, client_sampling="poisson", randomness="os")
    assert system.choose(names, rules, 1) != system.choose(names, rules, 1)


def test_fixed_sampling_is_the_usual_draw_at_the_whole_price():
    strategy = private(population=6, run={"clients_per_round": 2})
    names, rules = list("abcdef"), Rules(rounds=1, clients_per_round=2)
    assert strategy.choose(names, rules, 4) == strategy.inner.choose(names, rules, 4)
    assert strategy.sample_rate == 1.0 and strategy.cohort == 2


def test_known_epsilons():
    """Published values: Poisson q = 0.1 by RDP, no sampling by PLD; a budget gives the noise back."""
    common = {"clients_per_round": 10, "rounds": 50}
    poisson = private(population=100, run=common, client_sampling="poisson", accountant="rdp")
    assert poisson.spent(50) == pytest.approx(5.88543, abs=1e-5)
    fixed = private(population=100, run=common, noise_multiplier=5.0)
    assert fixed.spent(50) == pytest.approx(6.57297, abs=2e-4)
    planned = private(population=100, run=common, epsilon=5.88543, client_sampling="poisson", accountant="rdp")
    assert planned.noise_multiplier == pytest.approx(1.0, abs=2e-4)
    assert planned.spent(50) <= 5.88543 < planned.spent(51)
    longer = private(
        population=100, run=common, epsilon=5.88543, client_sampling="poisson", accountant="rdp", planned_rounds=200
    )
    assert longer.noise_multiplier > 1.2


@pytest.mark.parametrize("randomness", ["seeded", "os"])
def test_every_release_is_on_the_disk_before_anything_is_made_of_it(randomness, tmp_path):
    path, seen = tmp_path / "ledger" / "server.jsonl", []

    class Inner(FedIT):
        def aggregate(self, server, updates):
            seen.append(len(path.read_text().splitlines()))
            return super().aggregate(server, updates)

    strategy = private(Inner(), ledger=path, randomness=randomness, accountant="rdp")
    server, updates = ones(3)
    for number in range(3):
        strategy.aggregate(replace(server, round=number), updates)
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_same_round_is_the_same_release_and_other_updates_are_another(adaptive, tmp_path):
    """Two rounds are paid for. One of them may be done again, with the same updates and no others."""
    path = tmp_path / "ledger" / "server.jsonl"
    strategy = private(
        epsilon=8.0, ledger=path, accountant="rdp", run={"rounds": 2}, adaptive_clip=adaptive, clip_count_noise=0.9
    )
    server, updates = ones(3)
    for number in (0, 1):
        once, twice = (strategy.aggregate(replace(server, round=number), updates) for _ in range(2))
        assert once.adapter.sha256() == twice.adapter.sha256() and once.numbers == twice.numbers
    assert [entry.round for entry in Ledger(path).entries()] == [1, 2]
    more = replace(updates[0], adapter=updates[0].adapter.map(lambda value: value * 1.5))
    for other in (updates[:2], [*updates[1:], replace(updates[0], adapter=server.adapter)]):
        with pytest.raises(RoundFailed, match=r"round 2: budget exhausted.*epsilon=8 .*Spent so far: 7\.9"):
            strategy.aggregate(replace(server, round=1), other)
    assert len(Ledger(path).entries()) == 2 and len(list((tmp_path / "ledger").iterdir())) == 1
    assert "epsilon=8 at delta=1e-05 after 2 rounds (rdp); spent so far 8\n" in describe(strategy)
    path = tmp_path / "spare" / "server.jsonl"
    spare = private(ledger=path, accountant="rdp")
    for given in (updates, updates[:2], [more, *updates[1:]], updates):
        spare.aggregate(server, given)
    changed = 2 if more.adapter.distance(server.adapter) > spare.clip(server) else 3  # clipped to what it was, or not
    assert len(Ledger(path).entries()) == changed


@pytest.mark.parametrize("adaptive", [False, True])
def test_noise_of_the_system_is_drawn_once_a_round_and_never_put_on_other_updates(adaptive, tmp_path):
    """Two sums under one noise would differ by a client's update; two noises would be two releases."""
    path = tmp_path / "ledger" / "server.jsonl"
    strategies = [
        private(
            epsilon=8.0,
            ledger=path,
            accountant="rdp",
            run={"rounds": 1},
            randomness="os",
            adaptive_clip=adaptive,
            clip_count_noise=0.9,
        )
        for _ in range(2)
    ]
    server, updates = ones(3)
    after = []
    for strategy, given in zip(strategies, (updates, updates[:1]), strict=True):  # the second is after a kill
        after.append(strategy.aggregate(server, given))
    assert after[0].adapter.sha256() == after[1].adapter.sha256() and after[0].numbers == after[1].numbers
    assert len(Ledger(path).entries()) == 1
    with pytest.raises(RoundFailed, match="budget exhausted"):  # from another state it is another round
        strategies[1].aggregate(ServerState(after[0].adapter), updates)


def test_without_a_ledger_it_warns_once_and_keeps_to_the_planned_rounds(caplog):
    strategy = private(epsilon=8.0, accountant="rdp", run={"rounds": 2})
    server, updates = ones(3)
    for number in range(2):
        strategy.aggregate(replace(server, round=number), updates)
    with pytest.raises(RoundFailed, match="budget exhausted"):
        strategy.aggregate(replace(server, round=2), updates)
    assert sum("without a ledger" in text for text in caplog.messages) == 1


@pytest.mark.parametrize("released", [False, True])
def test_metrics_of_clients_stay_out_of_the_event(released):
    strategy = private(cls=Quiet, release_metrics=released, accountant="rdp", clip=0.3)
    server, updates = cohort(strategy, [1.0, 1.0, 1.0])
    after, event = strategy.conclude(server, updates, {}, Rules(rounds=1), lambda event: None)
    assert event.get("train_loss") == (1.0 if released else None)
    assert (event["clip"], event["noise_multiplier"]) == (0.3, 1.0)
    assert event["epsilon_max"] == accounting.compose_epsilon(((1.0, 1.0, 1),), 1e-5, "rdp") and after.round == 1


def test_finished_adapters_have_no_account():
    strategy = private()
    with pytest.raises(InputError, match="client_dp accounts for the rounds"):
        strategy.offline(*cohort(strategy, [1.0]))


def test_the_summary_names_threat_guarantee_and_seed():
    text = describe(private(epsilon=4.0, accountant="rdp", population=50))
    for part in (
        "epsilon=4 at delta=1e-05 after 10 rounds (rdp)",
        "the server is trusted and sees every update",
        "added or removed",
        "reproducible, not private",
        "no amplification",
    ):
        assert part in text
    real = describe(
        private(
            population=40, run={"clients_per_round": 10}, client_sampling="poisson", randomness="os", accountant="rdp"
        )
    )
    assert "not private" not in real and "probability 0.25; who joined must stay with the server" in real


# Whole runs ----------------------------------------------------------------------------------------------------------

CONFIG = {
    "privacy.unit": "client",
    "privacy.noise_multiplier": 0.8,
    "privacy.delta": 1e-3,
    "privacy.clip": 0.05,
    "privacy.accountant": "rdp",
    "strategy.weighting": "uniform",
    "data.limit": 60,
}


def events(run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Stop(Exception):
    pass


def stop(event: dict[str, Any]) -> None:
    if event["event"] == "round" and event["round"] == 2:  # recorded before its checkpoint: round 2 is done again
        raise Stop


@pytest.mark.parametrize("name", [*INNER, "fedadam"])
def test_a_run_repeats_and_resumes_bit_for_bit_and_counts_every_release_once(name, tiny, tmp_path):
    config = {**CONFIG, "strategy": "fedit" if name == "fedadam" else name}
    config |= {"strategy.wrap": ["fedadam"], "privacy.client_sampling": "poisson"} if name == "fedadam" else {}
    config |= {"adapter": "lora_sb"} if name == "fed_sb" else {}
    config |= {"privacy.adaptive_clip": True, "privacy.clip_count_noise": 0.5} if name == "fedit" else {}
    summary = tiny("whole", config)
    with pytest.raises(Stop):
        tiny("broken", config, on_event=stop)
    resumed = runs.resume(tmp_path / "broken")
    whole, broken = (checkpoint.latest(tmp_path / run / "checkpoints") for run in ("whole", "broken"))
    assert whole.round == broken.round == 3 and whole.numbers == broken.numbers
    assert whole.adapter.sha256() == broken.adapter.sha256()
    assert {key: value.tolist() for key, value in whole.memory.items()} == {
        key: value.tolist() for key, value in broken.memory.items()
    }
    assert summary["epsilon_max"] == accounting.compose_epsilon(((1.0, 0.8, 3),), 1e-3, "rdp")
    assert resumed["epsilon_max"] == summary["epsilon_max"]
    assert [entry.round for entry in Ledger(tmp_path / "broken" / "ledger" / "server.jsonl").entries()] == [1, 2, 3]
    clips = [event["clip"] for event in events(tmp_path / "whole") if event["event"] == "round"]
    assert clips[0] == 0.05 and (len(set(clips)) == 3) == (name == "fedit")
    assert not any("train_loss" in event for event in events(tmp_path / "whole"))


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_a_run_with_noise_of_the_system_resumes_within_its_budget(sampling, tiny, tmp_path):
    """Also where a draw of clients that nobody can repeat differs after the kill."""
    config = {
        **CONFIG,
        "privacy.randomness": "os",
        "privacy.noise_multiplier": None,
        "privacy.epsilon": 5.0,
        "privacy.client_sampling": sampling,
        "run.clients_per_round": 2,
    }
    broken = {}

    def stop_at_2(event):
        if event["event"] == "round" and event["round"] == 2:
            broken.update(event)
            raise Stop

    with pytest.raises(Stop):
        tiny("run", config, on_event=stop_at_2)
    runs.resume(tmp_path / "run")
    assert [entry.round for entry in Ledger(tmp_path / "run" / "ledger" / "server.jsonl").entries()] == [1, 2, 3]
    again = next(event for event in events(tmp_path / "run") if event["event"] == "round" and event["round"] == 2)
    assert (again["accuracy"], again["loss"]) == (broken["accuracy"], broken["loss"])


def test_the_run_stops_with_its_budget(tiny, tmp_path):
    config = {**CONFIG, "privacy.noise_multiplier": None, "privacy.epsilon": 5.0, "privacy.planned_rounds": 2}
    with pytest.raises(RoundFailed, match="round 3: budget exhausted"):
        tiny("run", config)
    done = [event for event in events(tmp_path / "run") if event["event"] == "round"]
    assert len(done) == 2 and done[-1]["epsilon_max"] <= 5.0 < 1.5 * done[-1]["epsilon_max"]
    with pytest.raises(RoundFailed, match="round 3: budget exhausted"):
        runs.resume(tmp_path / "run")


def test_a_round_that_nobody_joined_is_noise(tiny, tmp_path):
    def joins(seed: int, number: int) -> int:
        return int((numpy_generator(seed, "client_dp", number, "choose").random(4) < 0.25).sum())

    seed = next(seed for seed in range(100) if joins(seed, 1) == 0 < joins(seed, 2))
    summary = tiny(
        "run",
        {**CONFIG, "run.seed": seed, "run.rounds": 2, "run.clients_per_round": 1, "privacy.client_sampling": "poisson"},
    )
    empty, other = (event for event in events(tmp_path / "run") if event["event"] == "round")
    assert empty["clients"] == [] and empty["bytes_up"] == 0 and len(other["clients"]) == joins(seed, 2)
    assert empty["epsilon_max"] > 0
    assert summary["epsilon_max"] == accounting.compose_epsilon(((0.25, 0.8, 2),), 1e-3, "rdp")
    first = checkpoint.read(tmp_path / "run" / "checkpoints" / "round-000001").adapter
    assert float(first.select(("B",)).tensors[next(iter(first.select(("B",)).tensors))].std()) > 0.01
