"""Every entry of every table is in exactly one class of each question that tests ask about it."""

from __future__ import annotations

import pytest

from fedpeft import registry
from support.classified import PARTS, QUESTIONS, TAKEN_WHOLE, misplaced

TOY = "toy_of_a_test"


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_entry_is_in_exactly_one_class(question):
    assert not misplaced(question)


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_new_entry_is_missed_until_it_is_classified(question, monkeypatch):
    kind, real = QUESTIONS[question][0], registry.table
    monkeypatch.setattr(registry, "table", lambda table: {**real(table), **({TOY: "a:B"} if table == kind else {})})
    assert misplaced(question) == {"in no class": [TOY]}


@pytest.mark.parametrize("question", QUESTIONS)
def test_an_entry_that_is_gone_or_in_two_classes_is_seen(question, monkeypatch):
    kind, classes = QUESTIONS[question]
    first, *rest = registry.names(kind)
    monkeypatch.setitem(QUESTIONS, question, (kind, (*classes, [first])))
    assert misplaced(question) == {"in several": [first]}
    monkeypatch.setitem(QUESTIONS, question, (kind, classes))
    monkeypatch.setattr(registry, "names", lambda table: rest)
    assert misplaced(question) == {"not registered": [first]}


def test_every_table_of_the_registry_is_asked_about():
    assert {kind for kind, _ in QUESTIONS.values()} | {*TAKEN_WHOLE, *PARTS} == set(registry.TABLES)
