"""The ledger never counts fewer releases than there were: budgets, damaged files, races, killed processes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedpeft.clients.guard import Guard
from fedpeft.config import ClientConfig, Config, PrivacyConfig
from fedpeft.errors import InputError
from fedpeft.privacy import plan as plans
from fedpeft.privacy.accounting import compose_epsilon
from fedpeft.privacy.ledger import Budget, BudgetExhausted, Entry, Ledger
from support.ledger_parts import DELTA, cost


def entry(run="run", number=1, rate=0.1, sigma=1.0, steps=10):
    return Entry(run, number, f"request-{number}", rate, sigma, steps)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger" / "a.jsonl")


# What was spent -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accountant", "expected"), [("pld", 3.65300), ("rdp", 4.29354), ("prv", 3.66330)])
def test_releases_of_different_kinds_add_up_as_published(accountant, expected, ledger):
    """Rates, noise and steps of the project's notes; one kind comes in two parts, out of order."""
    for rate, sigma, steps in ((0.02, 1.0, 60), (0.05, 0.9, 50), (0.02, 1.5, 200), (0.02, 1.0, 40)):
        ledger.reserve(entry(rate=rate, sigma=sigma, steps=steps), Budget(100.0, DELTA, "rdp"))
    assert ledger.spent(DELTA, accountant) == pytest.approx(expected, abs=2e-4)


def test_nothing_reserved_costs_nothing(ledger):
    assert ledger.entries() == [] and ledger.spent(DELTA) == 0


def test_what_was_reserved_is_read_back(ledger):
    made = [entry(number=number, rate=0.1 + number / 100, steps=number) for number in (1, 2, 3)]
    for one in made:
        ledger.reserve(one, Budget(100.0, DELTA, "rdp"))
    assert Ledger(ledger.path).entries() == made
    lines = ledger.path.read_text().splitlines()
    assert [json.loads(line)["steps"] for line in lines] == [1, 2, 3]


def test_reading_changes_nothing(ledger, tmp_path):
    assert ledger.spent(DELTA) == 0 and not ledger.path.parent.exists()
    ledger.reserve(entry(), Budget(100.0, DELTA, "rdp"))
    with ledger.path.open("ab") as file:
        file.write(b'{"run": "to')  # a torn line is left for the writer to repair
    before = ledger.path.read_bytes(), torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = [ledger.spent(DELTA, name) for name in ("rdp", "prv", "pld", "rdp")]
    assert first[0] == first[-1] == cost((0.1, 1.0, 10))
    assert ledger.spent(1e-6, "rdp") > first[0]
    config = Config(privacy=PrivacyConfig(unit="sample", noise_multiplier=1.0, accountant="rdp"))
    table = Guard(config, ledger.path.parent, "run").spending(["a", "b"])
    assert table["a"]["epsilon"] == first[0] and table["a"]["steps"] == 10 and table["b"]["epsilon"] == 0
    assert ledger.path.read_bytes() == before[0] and os.listdir(ledger.path.parent) == ["a.jsonl"]
    assert torch.equal(torch.get_rng_state(), before[1]) and random.getstate() == before[3]
    assert (np.random.get_state()[1] == before[2]).all()


# Budgets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["pld", "prv", "rdp"])
def test_refused_is_exactly_the_step_that_would_pass(accountant, ledger):
    most = compose_epsilon(((0.1, 1.0, 9),), DELTA, accountant)
    for number in (1, 2, 3):
        ledger.reserve(entry(number=number, steps=3), Budget(most, DELTA, accountant))
    before = ledger.path.read_bytes()
    with pytest.raises(BudgetExhausted, match="budget exhausted: 1 more steps"):
        ledger.reserve(entry(number=4, steps=1), Budget(most, DELTA, accountant))
    assert ledger.path.read_bytes() == before
    assert ledger.spent(DELTA, accountant) == most


def test_a_first_release_over_the_budget_is_refused(ledger):
    with pytest.raises(BudgetExhausted):
        ledger.reserve(entry(), Budget(0.99 * cost((0.1, 1.0, 10)), DELTA, "rdp"))
    assert ledger.entries() == []


def test_a_run_pays_for_itself_and_all_runs_pay_for_the_site(ledger):
    run, site = Budget(cost((0.1, 1.0, 20)), DELTA, "rdp"), Budget(cost((0.1, 1.0, 30)), DELTA, "rdp")
    ledger.reserve(entry("first", steps=20), run, lifetime=site)
    ledger.reserve(entry("second", steps=10), run, lifetime=site)
    with pytest.raises(BudgetExhausted, match="all runs together"):
        ledger.reserve(entry("second", steps=10), run, lifetime=site)
    with pytest.raises(BudgetExhausted, match="this run"):
        ledger.reserve(entry("first", steps=1), run)
    ledger.reserve(entry("second", steps=10), run)
    assert [one.steps for one in ledger.entries()] == [20, 10, 10]


def test_once_counts_the_very_same_release_once_and_any_other_again(ledger):
    budget = Budget(cost((0.1, 1.0, 40)), DELTA, "rdp")
    for one in (entry(), entry(number=2), entry("another"), replace(entry(), request="other bits")):
        for _ in range(2):
            ledger.reserve(one, budget, once=True)
    assert len(ledger.entries()) == 4
    ledger.reserve(entry(), Budget(1e-9, DELTA, "rdp"), once=True)  # what is paid for needs no budget
    ledger.reserve(entry(), Budget(100.0, DELTA, "rdp"))
    assert len(ledger.entries()) == 5


def test_knowing_the_plan_grants_no_step_beyond_it(ledger):
    planned = (0.1, 1.0, 6)
    budget = Budget(cost(planned), DELTA, "rdp")
    for number in (1, 2):
        ledger.reserve(entry(number=number, steps=3), budget, planned)
    with pytest.raises(BudgetExhausted):
        ledger.reserve(entry(number=3, steps=1), budget, planned)


@pytest.mark.parametrize("other", [{"sigma": 0.5}, {"rate": 0.3}])
def test_knowing_the_plan_grants_nothing_of_another_kind(other, ledger):
    planned = (0.1, 1.0, 6)
    with pytest.raises(BudgetExhausted):
        ledger.reserve(entry(steps=6, **other), Budget(cost(planned), DELTA, "rdp"), planned)
    ledger.reserve(entry("earlier", steps=6, **other), Budget(100.0, DELTA, "rdp"))
    ledger.reserve(entry(steps=6), Budget(cost(planned), DELTA, "rdp"), planned)  # another run's are its own


@pytest.mark.parametrize(
    ("epsilon", "accountant"),
    [
        (0.02, "pld"),
        (0.02, "prv"),
        (0.02, "rdp"),
        (0.05, "prv"),
        (1.0, "pld"),
        (1.0, "rdp"),
    ],
)
def test_a_plan_for_a_budget_costs_no_more_than_it(epsilon, accountant):
    """What the ledger grants without computing it must be within the budget, however small that is."""
    made = plans.make_plan(
        PrivacyConfig(unit="sample", epsilon=epsilon, accountant=accountant),
        ClientConfig(local_steps=5, local_epochs=None, batch_size=10),
        20,
        1000,
    )
    assert made.budget.epsilon == epsilon
    assert compose_epsilon((made.release,), 1e-5, accountant) <= epsilon


# Damage ---------------------------------------------------------------------------------------------------------------


def test_a_line_torn_anywhere_was_never_acted_upon_and_is_overwritten(ledger):
    for number in (1, 2):
        ledger.reserve(entry(number=number), Budget(100.0, DELTA, "rdp"))
    whole = ledger.path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        ledger.path.write_bytes(whole[:cut])
        assert [one.round for one in ledger.entries()] == [1]
        if cut % 20 == 0 or cut == len(whole) - 1:
            ledger.reserve(entry(number=3), Budget(100.0, DELTA, "rdp"))
            assert [one.round for one in ledger.entries()] == [1, 3]
            assert ledger.path.read_bytes().startswith(whole[:first]) and ledger.path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "",
        "3",
        "[]",
        "null",
        '{"run": "run"}',
        "\x00\x00",
        '"text"',
        json.dumps({"run": "r", "round": 1, "request": "q", "sample_rate": 0.1, "noise_multiplier": 1.0, "steps": "x"}),
        json.dumps({"run": "r", "round": 1, "request": "q", "sample_rate": 0.1, "noise_multiplier": 1.0, "steps": -9}),
        json.dumps({"run": "r", "round": 1, "request": "q", "sample_rate": 0.0, "noise_multiplier": 1.0, "steps": 9}),
        json.dumps(
            {"run": "r", "round": 1, "request": "q", "sample_rate": 0.1, "noise_multiplier": np.nan, "steps": 9}
        ),
    ],
)
def test_a_damaged_line_is_refused_by_file_and_line(line, ledger):
    """What was spent is not known then, so nothing more may be."""
    for number in (1, 2):
        ledger.reserve(entry(number=number), Budget(100.0, DELTA, "rdp"))
    one, two = ledger.path.read_text().splitlines()
    ledger.path.write_text(f"{one}\n{line}\n{two}\n")
    before = ledger.path.read_bytes()
    for use in (
        ledger.entries,
        lambda: ledger.spent(DELTA, "rdp"),
        lambda: ledger.reserve(entry("r", steps=1), Budget(100.0, DELTA, "rdp"), (0.1, 1.0, 10)),
    ):
        with pytest.raises(InputError, match=r"a\.jsonl: line 2"):
            use()
    assert ledger.path.read_bytes() == before


def test_a_disk_that_does_not_take_the_line_stops_the_release(ledger, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        ledger.reserve(entry(), Budget(100.0, DELTA, "rdp"))


# Races ----------------------------------------------------------------------------------------------------------------

RACER = """
import sys
from pathlib import Path
from fedpeft.privacy.ledger import Budget, BudgetExhausted, Entry, Ledger
from fedpeft.state import AdapterState
budget = Budget(float(sys.argv[1]), 1e-5, "rdp")
Ledger(Path(sys.argv[2])).spent(1e-5, "rdp")  # everything is imported
print("ready", flush=True)
for line in sys.stdin:
    try:
        Ledger(Path(line.strip())).reserve(Entry("run", 1, sys.argv[3], 0.1, 1.0, 10), budget)
        print("yes", flush=True)
    except BudgetExhausted:
        print("no", flush=True)
"""


def test_of_two_processes_only_one_gets_the_last_of_a_budget(tmp_path):
    budget = Budget(cost((0.1, 1.0, 20)), DELTA, "rdp")
    paths = [tmp_path / f"{trial}.jsonl" for trial in range(12)]
    for path in paths:
        Ledger(path).reserve(entry(steps=10), budget)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(budget.epsilon), str(paths[0]), name],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for name in ("one", "two")
    ]
    try:
        assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 2
        for path in paths:
            for racer in racers:
                racer.stdin.write(f"{path}\n")
            for racer in racers:
                racer.stdin.flush()
            assert sorted(racer.stdout.readline() for racer in racers) == ["no\n", "yes\n"], path.name
            assert [one.steps for one in Ledger(path).entries()] == [10, 10]
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
