"""A coordinator shows its sites, and goes on after rounds that fail."""

from __future__ import annotations

import pytest

from fedpeft.strategies.wire import PACKED


def test_a_reason_with_markup_is_shown_as_it_is():
    from rich.console import Console

    from fedpeft.cli import console as terminal
    from fedpeft.cli import deploy_tables

    console = Console(record=True, width=120, **terminal.PLAIN)
    console.print(deploy_tables.rounds([{"round": 1, "clients": ["a"], "quarantined": {"b": "[/red] [link=x]y"}}]))
    assert "b: [/red] [link=x]y" in console.export_text()


def test_a_round_that_failed_is_tried_again_and_in_the_end_given_up(tmp_path, monkeypatch):
    from fedpeft.run import loop
    from fedpeft.state import RoundFailed

    monkeypatch.setattr(loop, "PAUSE_S", 0.0)
    events, answers = [], iter([RoundFailed("one"), RoundFailed("two"), 7])

    def session(steady):
        return loop.Session(None, tmp_path, loop.Federation(None, PACKED, steady, lambda event: {}), events.append)

    def act():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert session(steady=False).attempt(3, act) == 7
    assert [(event["event"], event["round"], event["reason"]) for event in events] == [
        ("round_failed", 3, "one"),
        ("round_failed", 3, "two"),
    ]
    answers = (RoundFailed(str(number)) for number in range(99))
    with pytest.raises(RoundFailed, match=str(loop.TRIES - 1)):
        session(steady=False).attempt(4, act)
    with pytest.raises(RoundFailed, match=str(loop.TRIES)):  # a simulation's clients would fail again
        session(steady=True).attempt(4, act)
