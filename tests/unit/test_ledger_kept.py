"""What a private client kept of a round that its ledger never counted is no part of what it sends later."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch

from fedpeft.clients import guard
from fedpeft.clients.guard import Guard
from fedpeft.clients.local import Local
from fedpeft.clients.store import Store
from fedpeft.config import ClientConfig, Config, PrivacyConfig, RunConfig, StrategyConfig
from fedpeft.errors import RunError
from fedpeft.strategies.wrappers.scaffold import CONTROL
from support import small_models as small
from support.instructed import task

KEPT = {
    "moments": ({"optimizer": "adamw", "keep_optimizer": True}, StrategyConfig(), {}),
    "factors": ({"optimizer": "sgd"}, StrategyConfig(name="fedsa"), {"uploads": ["A"], "keeps": ["B", "head"]}),
    "control": ({"optimizer": "sgd"}, StrategyConfig(wrap=["scaffold"]), {}),
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return small.adapted(small.save("bert", tmp_path_factory.mktemp("models") / "bert"), "bert")


@pytest.fixture
def site(bert, tmp_path):
    """`site(folder, kind)`: a client's process on its folder, and what it is sent and told in a round."""
    initial = small.randomised(bert)

    def make(folder, kind, history=5):
        client, strategy, told = KEPT[kind]
        config = Config(
            client=ClientConfig(local_steps=2, local_epochs=None, batch_size=4, **client),
            privacy=PrivacyConfig(unit="sample", noise_multiplier=1.0, accountant="rdp", randomness="seeded"),
            strategy=strategy,
            run=RunConfig(rounds=9),
        )
        here = tmp_path / folder
        stands = Guard(config, here / "ledger", "run")
        local = Local(config, bert, initial, {"a": small.texts(12)}, {}, Store(here / "store", history), stands)
        sent = initial.without(("B", "head")) if told else initial
        if kind == "control":
            sent = sent.beside({f"{CONTROL}{key}": torch.zeros_like(value) for key, value in initial.tensors.items()})
        return local, lambda number: local.train("a", sent, task(number, **told))[0]

    return make


def full(*arguments, **keywords):
    raise OSError("no space left")


def broken(*arguments, **keywords):
    raise MemoryError


FAULTS = {  # where round 1 ends, and how many lines the ledger has of it
    "the answer is not written": (Store, "save_reply", full, 0),
    "killed before it is counted": (guard.Ledger, "_append", full, 0),
    "the rest of the round fails": (Guard, "allowed", broken, 1),
}


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_round_that_was_not_counted_is_no_part_of_the_next_update(kind, fault, site, monkeypatch):
    """Bit for bit the update of a site that was never asked for round 1."""
    _, train = site("never", kind)
    expected = train(2)
    local, train = site("failed", kind)
    owner, name, failure, counted = FAULTS[fault]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failure)
        with pytest.raises((OSError, RunError)):
            train(1)
    assert local.store.load("a", before=2), "the test needs a round that left something"
    assert len(local.guard.ledger("a").entries()) == counted
    assert train(2).sha256() == expected.sha256()


@pytest.mark.parametrize("kind", KEPT)
def test_what_a_counted_round_kept_is_part_of_the_next_update_also_where_it_was_counted_late(kind, site, monkeypatch):
    _, train = site("never", kind)
    without = train(2)
    _, train = site("whole", kind)
    train(1)
    expected = train(2)
    assert expected.sha256() != without.sha256()
    local, train = site("late", kind)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(guard.Ledger, "_append", full)
        train(1)
    train(1)  # the answer that was kept is counted, and leaves
    assert [one.round for one in local.guard.ledger("a").entries()] == [1]
    assert train(2).sha256() == expected.sha256()


def test_a_round_done_again_otherwise_and_not_counted_counts_as_not_done(site, monkeypatch):
    """Its state has taken the place of the counted one; the number of the round is in the ledger nevertheless."""
    local, train = site("again", "moments")
    train(1)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(Store, "save_reply", full)
        local.train("a", small.randomised(local.model, seed=5), task(1))
    _, never = site("never", "moments")
    assert train(2).sha256() == never(2).sha256()


def test_another_runs_count_pays_for_nothing(site, tmp_path):
    _, train = site("one", "moments")
    train(1)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    local, train = site("two", "moments")
    local.guard.run = "another"
    _, never = site("never", "moments")
    assert train(2).sha256() == never(2).sha256()


def test_the_last_counted_state_outlives_any_number_of_rounds_that_were_not(site, monkeypatch):
    local, train = site("many", "moments", history=1)
    train(1)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "save_reply", full)
        for number in (2, 3, 4, 5):
            with pytest.raises(OSError, match="no space"):
                train(number)
    counted = partial(local.guard.counted, "a")
    kept = local.store.load("a", 6, counted)
    assert kept.keys() == local.store.load("a", 2, counted).keys() != set()
    assert all(torch.equal(value, kept[key]) for key, value in local.store.load("a", 2, counted).items())
