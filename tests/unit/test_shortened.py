"""FEDPEFT_ROUNDS and FEDPEFT_SEEDS cut what is started and nothing else, and refuse what is no number."""

from __future__ import annotations

import logging

import pytest

from fedpeft.config import shortened
from fedpeft.errors import InputError


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in (shortened.ROUNDS, shortened.SEEDS):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("config", "most", "given", "kept"),
    [
        ("quickstart", "3", {}, 3),
        ("quickstart", "1", {"run.rounds": "7"}, 1),
        ("continual", "2", {}, 5),  # five tasks, one round each
        ("continual", "14", {}, 10),
        ("continual", "7", {"continual.tasks": "2", "run.rounds": "8"}, 6),
        ("continual", "7", {"continual.leave_out": [1, 3], "run.rounds": 9}, 6),  # three of five are learned
    ],
)
def test_rounds_are_cut_to_what_is_asked_for_and_tasks_stay_equal(config, most, given, kept, monkeypatch, caplog):
    monkeypatch.setenv(shortened.ROUNDS, most)
    with caplog.at_level(logging.WARNING, "fedpeft"):
        assert shortened.rounds(config, given) == {**given, "run.rounds": kept}
    assert f"FEDPEFT_ROUNDS={most}: run.rounds is {kept} instead of" in caplog.text


@pytest.mark.parametrize(("most", "given"), [("", {}), ("2", {"run.rounds": "2"}), ("100", {"run.rounds": "3"})])
def test_what_is_short_enough_stays(most, given, monkeypatch, caplog):
    monkeypatch.setenv(shortened.ROUNDS, most)
    assert shortened.rounds("quickstart", given) is given and not caplog.text


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "two", " ", "1e3", "٣", "9" * 12])
@pytest.mark.parametrize("name", [shortened.ROUNDS, shortened.SEEDS])
def test_what_is_no_number_is_refused_by_name(name, text, monkeypatch):
    monkeypatch.setenv(name, text)
    with pytest.raises(InputError, match=name):
        shortened.rounds("quickstart", {}) if name == shortened.ROUNDS else shortened.seeds(3)


@pytest.mark.parametrize(
    ("most", "asked", "least", "kept"), [("", 3, 1, 3), ("1", 3, 1, 1), ("1", 8, 2, 2), ("5", 3, 1, 3)]
)
def test_seeds_are_cut_to_what_the_benchmark_needs(most, asked, least, kept, monkeypatch):
    monkeypatch.setenv(shortened.SEEDS, most)
    assert shortened.seeds(asked, least) == kept
