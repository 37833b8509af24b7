"""A private client sends a function of request, config, policy and ledger, plus noised sums in the ledger."""

from __future__ import annotations

import pytest

from support import hostile, law
from support import small_models as small
from support.law_mutants import LEAKS

pytestmark = pytest.mark.usefixtures("flower_run")
SAMPLE = {"training": 16, "sums": 3, "scoring": 6, "test-time": 4, "stages": 3}
QUICK = (
    "a check of gradients on the records",
    "a status that hangs on the loss",
    "an update in no ledger",
    "a score that fails by a record",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: small.adapted(small.save(kind, folder / kind), kind) for kind in hostile.RECORDS}


@pytest.mark.parametrize("kind", SAMPLE)
def test_hostile_requests_to_sites_that_differ_in_one_record_are_answered_alike(kind, models, tmp_path):
    answers = [status for seed in range(SAMPLE[kind]) for status in law.require(models, tmp_path, kind, seed)]
    assert set(answers) == {"ok", "error"}  # some are refused, some are answered


@pytest.mark.attack
def test_two_hundred_hostile_requests_are_answered_alike(models, tmp_path):
    kinds = law.kinds(200)
    answers = {kind: [] for kind in law.KINDS}
    for seed, kind in enumerate(kinds, start=100):
        answers[kind] += law.require(models, tmp_path, kind, seed)
    for kind, said in answers.items():
        assert kinds.count(kind) >= 20 and said.count("ok") >= 5, kind


# The check itself ----------------------------------------------------------------------------------------------------


def caught(leak, models, folder, monkeypatch):
    """Whether the law finds a leak within the requests of its kinds."""
    LEAKS[leak].make(monkeypatch)
    for seed in range(LEAKS[leak].tries):
        try:
            law.require(models, folder, LEAKS[leak].kind, seed)
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("leak", QUICK)
def test_the_law_finds_a_leak(leak, models, tmp_path, monkeypatch):
    assert caught(leak, models, tmp_path, monkeypatch)


@pytest.mark.attack
@pytest.mark.parametrize("leak", [leak for leak in LEAKS if leak not in QUICK])
def test_the_law_finds_every_leak(leak, models, tmp_path, monkeypatch):
    assert caught(leak, models, tmp_path, monkeypatch)
