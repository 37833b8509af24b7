"""A simulated run says each sentence of its privacy where it is true, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedpeft import config as configs
from fedpeft.clients.guard import Guard
from fedpeft.privacy.accounting import compose_epsilon
from fedpeft.privacy.ledger import Budget, Entry, Ledger
from fedpeft.run.guarantee import Spent, list_outside, section
from fedpeft.strategies.build import build
from fedpeft.strategies.wrappers.client_dp import ClientDP
from support.allowed import opened

DELTA = 1e-5
NONE: dict[str, Any] = {}
SAMPLE: dict[str, Any] = {
    "privacy.unit": "sample",
    "privacy.noise_multiplier": 1.0,
    "privacy.accountant": "rdp",
    "privacy.clip": 0.7,
    "strategy.weighting": "uniform",
    "client.local_steps": 2,
    "client.local_epochs": None,
}
CLIENT: dict[str, Any] = {
    "privacy.unit": "client",
    "privacy.noise_multiplier": 1.0,
    "privacy.accountant": "rdp",
    "strategy.weighting": "uniform",
    "run.rounds": 3,
}
SILENT: dict[str, Any] = {**SAMPLE, "privacy.randomness": "os", "privacy.records": 50, "run.baselines": False}
LAST = "which clients took part or failed, and how long they took"


def here(folder: Path, settings: dict[str, Any], releases: dict[str, list[tuple[float, float, int]]]) -> Any:
    """A world of which only what its privacy rests on is there: config, strategy, and ledgers with these releases."""
    config = configs.load({}, settings)
    guard = Guard(config, folder / "ledger", "run")
    for client, each in releases.items():
        for number, release in enumerate(each, start=1):
            guard.ledger(client).reserve(Entry("run", number, str(number), *release), Budget(100.0, DELTA, "rdp"))
    return SimpleNamespace(
        config=config, strategy=build(config), local=SimpleNamespace(guard=guard, train_data=dict.fromkeys(releases))
    )


ROUND: dict[str, Any] = {"round": 10, "clients": ["client-000", "client-001"], "quarantined": {}}
TWO = {"client-000": [(0.1, 2.0, 2)], "client-001": [(0.1, 1.0, 2), (0.1, 1.0, 2)]}


# What is outside of the guarantee -------------------------------------------------------------------------------------


def told(folder: Path, settings: dict[str, Any]) -> list[str]:
    return list_outside(here(folder, settings, {"client-000": [], "client-001": []}))


def test_every_simulation_shows_who_took_part_and_nothing_else_has_to(tmp_path):
    assert told(tmp_path, SILENT) == [LAST]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"privacy.randomness": "seeded"}, "whoever has it can remove the noise"),
        ({"privacy.records": None}, "number of records of a client counts as public"),
        ({"privacy.release_metrics": True}, "(privacy.release_metrics)"),
        ({"privacy.release_metrics": True, "data.holdout": 0.2}, "loss, accuracy and counts of each client"),
        ({"run.baselines": True}, "logistic regressions"),
    ],
)
def test_a_key_adds_the_line_that_it_is_the_reason_of(changes, words, tmp_path):
    lines = told(tmp_path, {**SILENT, **changes})
    assert len(lines) == 2 and words in lines[0] and lines[1] == LAST


def test_all_lines_together_are_the_lines_of_each(tmp_path):
    loud = {
        "privacy.randomness": "seeded",
        "privacy.records": None,
        "privacy.release_metrics": True,
        "run.baselines": True,
    }
    single = [told(tmp_path, {**SILENT, key: value})[0] for key, value in loud.items()]
    assert told(tmp_path, {**SILENT, **loud}) == [*single, LAST]


@pytest.mark.parametrize(
    ("policies", "public"),
    [
        (["records: 50", "records: 60"], False),
        (["records: 50", "max_rounds: 9"], True),
        (["max_rounds: 8", "max_rounds: 9"], True),
    ],
)
def test_a_policy_hides_the_number_of_records_only_where_it_gives_one(policies, public, tmp_path):
    (tmp_path / "policies").mkdir()
    for number, text in enumerate(policies):
        (tmp_path / "policies" / f"client-00{number}.yaml").write_text(opened(text))
    lines = told(tmp_path, {**SILENT, "privacy.records": None, "privacy.policy": str(tmp_path / "policies")})
    assert any("number of records" in line for line in lines) == public
    assert told(tmp_path, {**SILENT, "privacy.policy": str(tmp_path / "policies")}) == [LAST]


def test_under_client_level_privacy_numbers_of_records_set_nothing(tmp_path):
    settings = {**CLIENT, "privacy.randomness": "os", "run.baselines": False}
    assert configs.load({}, settings).privacy.records is None and told(tmp_path, settings) == [LAST]


def test_no_regression_is_fitted_to_texts_that_are_to_be_continued(tmp_path):
    language = {"model.name": "tiny-llama", "model.task": "causal-lm", "run.baselines": True}
    assert told(tmp_path, {**SILENT, **language}) == [LAST]


# The section of the summary -------------------------------------------------------------------------------------------


def test_a_run_without_privacy_claims_nothing(tmp_path):
    assert section(here(tmp_path, NONE, {})) is None and Spent(here(tmp_path, NONE, {})).describe_round(ROUND) == {}


def test_the_section_of_sample_level_privacy(tmp_path):
    world = here(tmp_path, SAMPLE, TWO)
    found = section(world)
    assert json.loads(json.dumps(found)) == found
    spent_by = {
        client: (row["epsilon"], row["steps"], row["rounds"], row["noise_multiplier"])
        for client, row in found["clients"].items()
    }
    assert spent_by == {
        "client-000": (compose_epsilon(((0.1, 2.0, 2),), DELTA, "rdp"), 2, 1, 2.0),
        "client-001": (compose_epsilon(((0.1, 1.0, 4),), DELTA, "rdp"), 4, 2, 1.0),
    }
    assert {key: found[key] for key in ("unit", "delta", "accountant", "clip", "relation")} == {
        "unit": "sample",
        "delta": DELTA,
        "accountant": "rdp",
        "clip": 0.7,
        "relation": "add or remove one record",
    }
    assert "(epsilon, 1e-05)-private for neighbours that add or remove one record" in found["claim"]
    assert "the server included" in found["claim"] and "theirs add up" in found["claim"]
    assert found["outside"] == list_outside(world)


@pytest.mark.parametrize(("randomness", "words"), [("os", "operating system"), ("seeded", "not private")])
def test_the_section_says_where_the_noise_is_from(randomness, words, tmp_path):
    for settings in (SAMPLE, CLIENT):
        world = here(tmp_path, {**settings, "privacy.randomness": randomness}, {})
        found = section(world)
        assert words in found["randomness"]
        assert any("run.seed" in line for line in found["outside"]) == (randomness == "seeded")


def test_the_section_of_client_level_privacy(tmp_path):
    world = here(tmp_path, CLIENT, {})
    assert isinstance(world.strategy, ClientDP)
    found = section(world)
    epsilon = compose_epsilon(((1.0, 1.0, 3),), DELTA, "rdp")
    assert found["claim"].startswith(f"client-level differential privacy: epsilon={epsilon:.4g} at delta=1e-05")
    assert found["unit"] == "client" and found["clients"] == {} and "relation" not in found
    assert "the server is trusted" in found["claim"] and "server included" not in found["claim"]


# Epsilon by round -----------------------------------------------------------------------------------------------------


def test_a_round_says_what_those_that_it_asked_have_spent_and_the_most_of_any(tmp_path):
    world, most = here(tmp_path, SAMPLE, TWO), compose_epsilon(((0.1, 1.0, 4),), DELTA, "rdp")
    spent = Spent(world)
    whole = spent.describe_round({**ROUND, "clients": ["client-001"], "quarantined": {"client-000": "late"}})
    assert whole["epsilon_max"] == whole["epsilon_by_client"]["client-001"] == most
    assert 0 < whole["epsilon_by_client"]["client-000"] < most
    part = spent.describe_round({**ROUND, "round": 11, "clients": ["client-000"]})
    assert part == {"epsilon_max": most, "epsilon_by_client": {"client-000": whole["epsilon_by_client"]["client-000"]}}


def test_nothing_released_is_nothing_spent(tmp_path):
    assert Spent(here(tmp_path, SAMPLE, {"client-000": []})).describe_round(ROUND)["epsilon_max"] == 0.0


def test_client_level_privacy_is_accounted_by_the_strategy(tmp_path):
    assert Spent(here(tmp_path, CLIENT, TWO)).describe_round(ROUND) == {}


def test_a_run_spends_as_it_goes_and_says_so(tiny, tmp_path):
    private = {**SAMPLE, "run.rounds": 2, "client.batch_size": 8}
    summary = tiny("run", private)
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    by_round = [event["epsilon_max"] for event in events if event["event"] == "round"]
    clients = summary["privacy"]["clients"].values()
    rate = max(row["sample_rate"] for row in clients)
    assert by_round == pytest.approx([compose_epsilon(((rate, 1.0, steps),), DELTA, "rdp") for steps in (2, 4)])
    assert summary["epsilon_max"] == by_round[1] == max(row["epsilon"] for row in clients)
    assert set(summary["baselines"]) == {"largest_class", "largest_class_name"}
    assert not any("regression" in line for line in summary["privacy"]["outside"])


# Epsilon by round is kept from one round to the next ------------------------------------------------------------------


def reserve(world, client, number, sigma=1.0, account=None):
    entry = Entry("run", number, f"{client} {number} {sigma}", 0.1, sigma, 2)
    world.local.guard.ledger(account or client).reserve(entry, Budget(1000.0, DELTA, "rdp"))


def asked_in(number, clients, late=()):
    return {"round": number, "clients": list(clients), "quarantined": dict.fromkeys(late, "late")}


def twelve(tmp_path, **settings):
    return here(tmp_path, {**SAMPLE, "run.rounds": 30, **settings}, {f"client-{k:03d}": [] for k in range(12)})


@pytest.fixture
def reads(monkeypatch):
    """The accounts that were read, in their order."""
    found: list[str] = []
    true = Ledger.entries

    def entries(ledger):
        found.append(ledger.account)
        return true(ledger)

    monkeypatch.setattr(Ledger, "entries", entries)
    return found


def test_a_round_reads_the_ledgers_of_those_that_it_asked_and_no_others(tmp_path, reads):
    world = twelve(tmp_path)
    names, spent = list(world.local.train_data), Spent(world)
    for client in names:
        reserve(world, client, 1, sigma=1.0 if client == names[0] else 2.0)
    reads.clear()
    most = spent.describe_round(asked_in(1, names))["epsilon_max"]
    assert reads == names
    for number in range(2, 8):
        for client in names[number : number + 2]:
            reserve(world, client, number, sigma=5.0)
        reads.clear()
        found = spent.describe_round(asked_in(number, [names[number]], [names[number + 1]]))
        assert reads == names[number : number + 2]  # who was late in the round before is asked again in this one
        assert found["epsilon_max"] == most and len(found["epsilon_by_client"]) == 2


def test_what_is_kept_from_round_to_round_is_what_reading_all_again_would_say(tmp_path):
    """Clients that are late spend after the event, rounds are dropped, and the run has been further than it is now."""
    world = twelve(tmp_path)
    names, spent = list(world.local.train_data), Spent(world)
    for client in names[:3]:  # by a process that was killed in round 3
        for number in (1, 2, 3):
            reserve(world, client, number, sigma=0.5)
    for number in range(1, 20):
        answered, late = names[number % 5 :: 5], [names[(number + 1) % 12]]
        for client in answered:
            reserve(world, client, number, sigma=1 + number % 3)
        if number % 6 == 0:  # dropped: no event
            continue
        event = asked_in(number, answered, late)
        assert spent.describe_round(event) == Spent(world).describe_round(event), number
        for client in late:
            reserve(world, client, number, sigma=0.7)


def test_a_client_that_spends_many_rounds_after_it_was_late_is_counted_once_it_has(tmp_path, reads):
    world = twelve(tmp_path)
    names, spent = list(world.local.train_data), Spent(world)
    for number in range(1, 8):
        if number == 5:
            reserve(world, names[9], 2, sigma=0.6)
        reserve(world, names[0], number)
        event = asked_in(number, [names[0]], [names[9]] if number == 2 else ())
        reads.clear()
        found = spent.describe_round(event)
        assert (names[9] in reads) == (2 <= number <= 5)
        assert found == Spent(world).describe_round(event), number
    assert found["epsilon_max"] == compose_epsilon(((0.1, 0.6, 2),), DELTA, "rdp")


def test_sums_of_all_clients_are_in_the_first_round_of_the_task_that_follows(tmp_path):
    body = {"continual.body": "frozen", "continual.head": "lda", "continual.tasks": 3, "run.rounds": 6}
    world = twelve(tmp_path, **body, **{"continual.statistics_noise": 1.0})
    names, spent = list(world.local.train_data), Spent(world)
    for number in range(1, 5):
        if number == 3:
            reserve(world, names[7], 2, 0.6, f"{names[7]}+task-0")
        reserve(world, names[number], number, 3.0, f"{names[number]}+task-{(number - 1) // 2}")
        event = asked_in(number, [names[number]])
        found = spent.describe_round(event)
        assert found == Spent(world).describe_round(event), number
    assert found["epsilon_max"] == compose_epsilon(((0.1, 0.6, 2),), DELTA, "rdp")
