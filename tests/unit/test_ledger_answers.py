"""A client's answer is counted once: again at no cost, another request anew, and none leaves uncounted."""

from __future__ import annotations

import pytest
import torch

from fedpeft.clients import guard
from fedpeft.clients.guard import Guard
from fedpeft.clients.local import Local
from fedpeft.clients.store import Store
from fedpeft.config import ClientConfig, Config, PrivacyConfig, RunConfig
from fedpeft.errors import RunError
from fedpeft.privacy.ledger import BudgetExhausted
from support import small_models as small
from support.instructed import task
from support.ledger_parts import DELTA, cost


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return small.adapted(small.save("bert", tmp_path_factory.mktemp("models") / "bert"), "bert")


@pytest.fixture
def start(bert):
    """`start()` is the client after a restart: new objects on the same folders."""
    initial = small.randomised(bert)
    folder = [None]

    def make(tmp_path, rounds=3, **privacy):
        folder[0] = tmp_path
        settings = {"noise_multiplier": 1.0, "accountant": "rdp", "randomness": "os", **privacy}
        config = Config(
            client=ClientConfig(optimizer="sgd", local_steps=2, local_epochs=None, batch_size=4),
            privacy=PrivacyConfig(unit="sample", **settings),
            run=RunConfig(rounds=rounds),
        )
        return Local(
            config,
            bert,
            initial,
            {"a": small.texts(12)},
            {},
            Store(tmp_path / "store", 3),
            Guard(config, tmp_path / "ledger", "run"),
        )

    return make


def test_the_same_request_is_answered_again_at_no_cost(start, tmp_path):
    local = start(tmp_path)
    first, _ = local.train("a", local.initial, task())
    for again in (local, start(tmp_path)):
        update, metrics = again.train("a", local.initial, task())
        assert update.sha256() == first.sha256() and update.sites == first.sites
        assert metrics == {"num-examples": 1.0}
    assert [one.steps for one in local.guard.ledger("a").entries()] == [2]


@pytest.mark.parametrize("change", ["adapter", "round", "task"])
def test_any_other_request_is_a_new_release(change, start, tmp_path):
    local = start(tmp_path)
    first, _ = local.train("a", local.initial, task())
    sent, told = local.initial, task()
    if change == "adapter":
        key = next(iter(sent.tensors))
        sent = sent.replace({key: sent[key] + torch.finfo(torch.float32).eps})
    else:
        told = task(2) if change == "round" else task(uploads=["A", "B"])
    second, _ = local.train("a", sent, told)
    assert second.distance(first) > 0
    assert len(local.guard.ledger("a").entries()) == 2


def test_rounds_are_refused_when_the_budget_is_spent_and_earlier_answers_stay_free(start, tmp_path):
    local = start(tmp_path, rounds=2)
    local.train("a", local.initial, task(1))
    second, _ = local.train("a", local.initial, task(2))
    with pytest.raises(BudgetExhausted, match="budget exhausted"):
        local.train("a", local.initial, task(3))
    assert local.train("a", local.initial, task(2))[0].sha256() == second.sha256()
    spent = local.guard.ledger("a").spent(DELTA, "rdp")
    assert spent == cost((1 / 3, 1.0, 4))


def test_an_answer_is_on_the_disk_before_it_is_counted_and_counted_before_it_leaves(start, tmp_path, monkeypatch):
    local, seen = start(tmp_path), []
    reserve, request = guard.Ledger.reserve, guard.hash_request(local.initial, task())

    def watched(*arguments, **options):
        saved = local.store.reply("a", 1, request)
        seen.append((saved is not None, guard.name_release(request, saved[0]) == arguments[1].request))
        reserve(*arguments, **options)

    monkeypatch.setattr(guard.Ledger, "reserve", watched)
    local.train("a", local.initial, task())
    assert seen == [(True, True)]
    assert [one.steps for one in local.guard.ledger("a").entries()] == [2]


@pytest.mark.parametrize("randomness", ["os", "seeded"])
def test_what_was_saved_and_not_counted_is_counted_once_when_it_leaves(randomness, start, tmp_path, monkeypatch):
    local = start(tmp_path, rounds=1, randomness=randomness)
    monkeypatch.setattr(guard.Ledger, "_append", lambda *arguments: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        local.train("a", local.initial, task())
    monkeypatch.undo()
    saved, _ = local.store.reply("a", 1, guard.hash_request(local.initial, task()))
    for again in (start(tmp_path, rounds=1, randomness=randomness), local):
        update, _ = again.train("a", local.initial, task())
        assert update.sha256() == saved.sha256()
        assert [one.steps for one in local.guard.ledger("a").entries()] == [2]


@pytest.mark.parametrize(("randomness", "counted"), [("os", 2), ("seeded", 1)])
def test_an_answer_that_is_lost_and_made_again_is_another_release_unless_it_is_the_same(
    randomness, counted, start, tmp_path
):
    """A server that asks for an old round, whose reply is gone, gets no second draw of the noise for nothing."""
    local = start(tmp_path, randomness=randomness)
    first, _ = local.train("a", local.initial, task())
    (tmp_path / "store" / "a" / "reply-000001.safetensors").unlink()
    second, _ = local.train("a", local.initial, task())
    assert (first.sha256() == second.sha256()) == (counted == 1)
    assert len(local.guard.ledger("a").entries()) == counted


def test_what_fails_beside_records_is_counted_once_and_answered_again(start, tmp_path, monkeypatch):
    """That it failed may have to do with a record; the same request gets the same sentence, which costs nothing."""
    local = start(tmp_path)

    def train(*arguments, **keywords):
        raise MemoryError

    monkeypatch.setattr("fedpeft.clients.local.train", train)
    for _ in range(2):
        with pytest.raises(RunError, match="the client failed; the reason stays with it"):
            local.train("a", local.initial, task())
    assert [one.steps for one in local.guard.ledger("a").entries()] == [2]
    monkeypatch.undo()
    with pytest.raises(RunError, match="the client failed; the reason stays with it"):
        start(tmp_path).train("a", local.initial, task())
    assert [one.steps for one in local.guard.ledger("a").entries()] == [2]
    local.train("a", local.initial, task(2))
    assert [one.steps for one in local.guard.ledger("a").entries()] == [2, 2]


def test_nothing_leaves_where_the_ledger_cannot_be_written(start, tmp_path, monkeypatch):
    local = start(tmp_path)
    monkeypatch.setattr(guard.Ledger, "_append", lambda *arguments: (_ for _ in ()).throw(OSError("full")))
    for _ in range(2):  # the saved answer does not leave either
        with pytest.raises(OSError, match="full"):
            local.train("a", local.initial, task())
    assert local.guard.ledger("a").entries() == []
