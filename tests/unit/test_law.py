"""What a private client sends is a function of request, config, policy and ledger, plus noised sums in the ledger."""

from __future__ import annotations

import random

import hostile
import pytest
import small_models as small

pytestmark = pytest.mark.usefixtures("flower_run")

CLIENTS = ({}, {"lr": 1e30}, {"lr": 1e-30}, {"local_steps": 1}, {"optimizer": "adamw", "lr": 0.5},
           {"momentum": 1.0, "weight_decay": 1e20})
CLIPS = ({}, {"clip": 1e-6}, {"clip": 1e6}, {"noise_multiplier": 1e-6}, {"noise_multiplier": 1e3})
KINDS = ("train", "train", "train", "evaluate", "query.sums")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: small.adapted(small.save(kind, folder / kind), kind) for kind in hostile.RECORDS}


def pair(models, folder, seed):
    """Two sites, a kind of request and a request that is as good as the seed makes it."""
    draw = random.Random(seed)
    kind = draw.choice(sorted(hostile.RECORDS))
    extreme = draw.choice(sorted(hostile.RECORDS[kind]))
    strategy, client, clips = draw.choice(sorted(hostile.STRATEGIES)), draw.choice(CLIENTS), draw.choice(CLIPS)
    if strategy == "scaffold":
        client = {**client, "optimizer": "sgd", "momentum": 0.0}
    clips = {**clips, "release_metrics": False}
    sites = [hostile.Site(models[kind], folder / f"{seed}-{name}", strategy, hostile.data(kind, own), client, clips)
             for name, own in (("plain", None), ("other", extreme))]
    asked = draw.choice(KINDS)
    received, task = sites[0].request(asked, draw.randint(0, 3))
    if draw.random() < 0.9:
        received, task = hostile.spoiled(received, task, draw)
    return sites, asked, received, task


def told(models, folder, seed):
    """The answers of both sites to a request, asked twice, with their ledgers."""
    sites, asked, received, task = pair(models, folder, seed)
    return [[(site.answer(asked, received, task), site.entries()) for _ in range(2)] for site in sites], task


def require_law(models, folder, seed):
    (one, other), task = told(models, folder, seed)
    assert one == other, (seed, task)
    for first, again in (one, other):
        assert first == again, seed  # the same request again: the same answer, at no cost
        (status, *said), entries = first
        if status == "error":
            assert "Error:" not in said[1] or "RunError" in said[1], (seed, said)
            assert any(name in said[1] for name in ("Refused", "RunError", "BudgetExhausted", "Failed")), (seed, said)
        else:
            assert entries, seed  # what left is in the ledger
    return one[0][0]


def test_hostile_requests_to_sites_that_differ_in_one_record_are_answered_alike(models, tmp_path):
    answers = [require_law(models, tmp_path, seed) for seed in range(20)]
    assert len({answer[0] for answer in answers}) == 2  # some are refused, some are trained


@pytest.mark.attack
def test_two_hundred_hostile_requests_are_answered_alike(models, tmp_path):
    answers = [require_law(models, tmp_path, seed) for seed in range(20, 220)]
    assert sum(answer[0] == "ok" for answer in answers) > 20
