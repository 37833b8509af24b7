"""`fedpeft privacy ledger`: what the ledgers on the disk hold, read back by somebody who was not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fedpeft.cli import console
from fedpeft.cli.main import app
from fedpeft.errors import InputError
from fedpeft.privacy import ledger
from fedpeft.privacy.accounting import compose_epsilon
from fedpeft.privacy.ledger import Budget, BudgetExhausted, Entry, Ledger, list_exposures, read_account

DELTA = 1e-5
ONE = ((0.1, 1.0, 10), (0.1, 1.0, 5), (0.2, 1.5, 7))  # of a client in two runs: sample rate, noise multiplier, steps
TWO = ((0.1, 2.0, 3),)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the ledgers of two clients."""
    for client, releases in (("client-000", ONE), ("client-001", TWO)):
        for number, release in enumerate(releases):
            entry = Entry("first" if number == 0 else "second", number, f"request-{number}", *release)
            Ledger(tmp_path / "ledger" / f"{client}.jsonl").reserve(entry, Budget(100.0, DELTA, "rdp"))
    return tmp_path


def command(*words: object) -> Result:
    return CliRunner().invoke(app, ["privacy", "ledger", *map(str, words)], env={"COLUMNS": "200"})


def row(releases: tuple[tuple[float, float, int], ...], runs: int, accountant: str = "rdp") -> dict[str, Any]:
    return {
        "epsilon": compose_epsilon(releases, DELTA, accountant),
        "releases": len(releases),
        "steps": sum(steps for _, _, steps in releases),
        "runs": runs,
    }


# The account ----------------------------------------------------------------------------------------------------------


def test_a_run_folder_is_accounted_client_by_client(run):
    found = read_account(run, DELTA, "rdp")
    rows = {"client-000": row(ONE, 2), "client-001": row(TWO, 1)}
    assert found == {"delta": DELTA, "accountant": "rdp", "ledgers": rows, "epsilon_max": rows["client-000"]["epsilon"]}
    assert rows["client-000"]["steps"] == 22 and rows["client-000"]["epsilon"] > rows["client-001"]["epsilon"] > 0


def test_one_file_is_accounted_alone(run):
    found = read_account(run / "ledger" / "client-001.jsonl", DELTA, "rdp")
    assert found["ledgers"] == {"client-001": row(TWO, 1)}
    assert found["epsilon_max"] == row(TWO, 1)["epsilon"]


def test_a_file_of_another_name_is_accounted_as_what_it_holds(run):
    """As a copy that somebody has put away beside the ledger."""
    copy = run / "ledger" / "client-001.bak"
    copy.write_bytes((run / "ledger" / "client-000.jsonl").read_bytes())
    found = read_account(copy, DELTA, "rdp")
    assert found["ledgers"] == {"client-001": row(ONE, 2)}
    assert found["epsilon_max"] == row(ONE, 2)["epsilon"]
    assert read_account(run, DELTA, "rdp")["ledgers"] == {"client-000": row(ONE, 2), "client-001": row(TWO, 1)}


def test_delta_and_accountant_are_those_asked_for(run):
    """The same releases cost more at a smaller delta, and by the looser accountant."""
    plain = read_account(run, DELTA)
    assert plain["accountant"] == "pld" and plain["ledgers"]["client-001"] == row(TWO, 1, "pld")
    assert read_account(run, 1e-7)["epsilon_max"] > plain["epsilon_max"]
    assert read_account(run, DELTA, "rdp")["epsilon_max"] > plain["epsilon_max"]


def test_a_reservation_that_was_never_finished_does_not_count(run):
    """A line without its end was not on the disk before anything could leave."""
    before = read_account(run, DELTA, "rdp")
    with (run / "ledger" / "client-001.jsonl").open("a") as file:
        file.write('{"run": "first", "round": 9')
    assert read_account(run, DELTA, "rdp") == before


def test_what_is_no_ledger_is_refused_by_name(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "nowhere.jsonl", tmp_path / "empty", run / "ledger"):
        with pytest.raises(InputError, match=rf"{path.name}: neither a ledger file nor a run folder"):
            read_account(path, DELTA)


def damage(run: Path) -> None:
    path = run / "ledger" / "client-000.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1].replace('"steps"', '"step"'), lines[2]]))


def test_one_damaged_line_and_nothing_is_said_to_be_known(run):
    damage(run)
    with pytest.raises(InputError, match=r"client-000\.jsonl: line 2 is damaged, so what was spent is not known"):
        read_account(run, DELTA)
    assert read_account(run / "ledger" / "client-001.jsonl", DELTA, "rdp")["ledgers"] == {"client-001": row(TWO, 1)}


@pytest.mark.parametrize(("delta", "accountant", "told"), [(1.5, "pld", "delta"), (DELTA, "moments", "moments")])
def test_a_question_that_has_no_answer_is_refused(delta, accountant, told, run):
    with pytest.raises(InputError, match=told):
        read_account(run, delta, accountant)


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_as_a_program_calls_it(run):
    done = command(run, "--accountant", "rdp", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout) == read_account(run, DELTA, "rdp")
    file = run / "ledger" / "client-001.jsonl"
    assert json.loads(command(file, "--delta", "1e-6", "--json").stdout) == read_account(file, 1e-6, "pld")


def test_the_command_as_a_person_calls_it(run, monkeypatch):
    from fedpeft.cli import console

    monkeypatch.setattr(console.out, "width", 200)
    with console.out.capture() as captured:
        done = command(run, "--accountant", "rdp")
    assert done.exit_code == 0
    lines = captured.get().splitlines()
    assert any("spent at delta 1e-05, by rdp" in line for line in lines)
    for client, wanted in (("client-000", row(ONE, 2)), ("client-001", row(TWO, 1))):
        cells = next(line for line in lines if client in line).replace("│", " ").split()
        numbers = [f"{wanted['epsilon']:.4g}", *(str(wanted[key]) for key in ("releases", "steps", "runs"))]
        assert cells == [client, *numbers]


@pytest.mark.parametrize("place", ["nowhere", "damaged"])
def test_the_command_ends_with_the_reason(place, run):
    if place == "damaged":
        damage(run)
    done = command(run if place == "damaged" else run / place)
    assert isinstance(done.exception, InputError) and done.stdout == ""
    assert ("line 2 is damaged" if place == "damaged" else "nowhere: neither") in str(done.exception)


# Accounts of tasks ----------------------------------------------------------------------------------------------------


def of(run: str, *releases: tuple[float, float, int]) -> list[Entry]:
    return [Entry(run, number, f"{run}-{number}", *release) for number, release in enumerate(releases)]


def test_a_record_is_in_one_task_of_a_run_and_in_any_of_another_run():
    """Tasks of one run do not add up; whoever was in the second task of a run may have been in the first of another."""
    a, b, c = (0.1, 1.0, 10), (0.2, 1.0, 5), (0.3, 2.0, 7)
    assert list_exposures([of("one", a), of("one", b)]) == [of("one", a), of("one", b)]
    assert list_exposures([of("one", a, b)]) == [of("one", a, b)]
    assert list_exposures([]) == list_exposures([[], []]) == [[]]
    both = [of("one", a) + of("two", c), of("one", b)]
    assert list_exposures(both) == [of("one", a) + of("two", c), of("one", b) + of("two", c)]
    plain = [of("plain", c), of("one", a), of("one", b)]
    assert list_exposures(plain) == [of("one", a) + of("plain", c), of("one", b) + of("plain", c)]


def test_the_command_s_epsilon_is_that_of_a_record_over_all_runs(tmp_path):
    a, b, c = (0.3, 1.0, 20), (0.2, 1.0, 5), (0.3, 2.0, 7)
    for name, entries in (("x+task-0", of("one", a)), ("x+task-1", of("one", b) + of("two", c)), ("y", of("one", a))):
        for entry in entries:
            Ledger(tmp_path / "ledger" / f"{name}.jsonl").reserve(entry, Budget(100.0, DELTA, "rdp"))
    found = read_account(tmp_path, DELTA, "rdp")
    assert set(found["ledgers"]) == {"x+task-0", "x+task-1", "y"}
    expected = compose_epsilon((a, c), DELTA, "rdp")  # of a record in the first task of run one
    assert found["epsilon_max"] == expected > max(row["epsilon"] for row in found["ledgers"].values())
    alone = read_account(tmp_path / "ledger" / "x+task-1.jsonl", DELTA, "rdp")
    assert set(alone["ledgers"]) == {"x+task-1"} and alone["epsilon_max"] == expected
    other = read_account(tmp_path / "ledger" / "y.jsonl", DELTA, "rdp")
    assert other["epsilon_max"] == compose_epsilon((a,), DELTA, "rdp") < expected


def test_a_lifetime_counts_the_other_accounts_of_other_runs_only(tmp_path):
    a = (0.1, 1.0, 10)
    once, twice = (compose_epsilon((a,) * times, DELTA, "rdp") for times in (1, 2))
    ledger, run = Ledger(tmp_path / "x+task-1.jsonl"), Budget(100.0, DELTA, "rdp")
    (entry,) = of("two", a)
    ledger.require(entry, run, None, Budget(once, DELTA, "rdp"), of("two", a, a))
    with pytest.raises(BudgetExhausted, match="all runs together"):
        ledger.reserve(entry, run, None, Budget(0.99 * twice, DELTA, "rdp"), of("one", a))
    assert ledger.entries() == []
    ledger.reserve(entry, run, None, Budget(twice, DELTA, "rdp"), of("one", a))
    assert ledger.entries() == [entry]


def test_of_many_clients_those_that_spent_most_are_shown_and_each_file_is_read_once(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "ledger"
    folder.mkdir()
    for number in range(60):
        steps = 50 if number == 41 else 1
        entry = {"run": "r", "round": 1, "request": "q", "sample_rate": 0.1, "noise_multiplier": 2.0, "steps": steps}
        (folder / f"client-{number:03d}.jsonl").write_text(json.dumps({**entry, "time": 0}) + "\n")
    reads = []
    entries = ledger.Ledger.entries
    monkeypatch.setattr(ledger.Ledger, "entries", lambda self: reads.append(self.path) or entries(self))
    found = ledger.read_account(tmp_path, 1e-5)
    assert len(found["ledgers"]) == len(reads) == 60
    assert found["epsilon_max"] == found["ledgers"]["client-041"]["epsilon"] > found["ledgers"]["client-040"]["epsilon"]
    console.ledgers(found)
    lines = capsys.readouterr().out.splitlines()
    assert "client-041" in lines[4] and sum("client-" in line for line in lines) == 20
    assert any("40 more" in line for line in lines)


def test_accounts_of_all_are_those_of_each(tmp_path):
    for name in ("a.jsonl", "a+task-0.jsonl", "a+task-10.jsonl", "ab.jsonl", "b+task-1.jsonl", "note.txt"):
        (tmp_path / name).write_text("")
    found = ledger.accounts_in(tmp_path)
    assert set(found) == {"a", "ab", "b"} and ledger.accounts_in(tmp_path / "none") == {}
    for client, accounts in found.items():
        there = {one.path for one in ledger.accounts_of(tmp_path, client) if one.path.exists()}
        assert {one.path for one in accounts} == there
