"""A client starts from its task, trains, uploads and keeps; and it refuses what does not fit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fedpeft import seeds
from fedpeft.clients.app import Local
from fedpeft.clients.guard import Guard
from fedpeft.clients.store import Store
from fedpeft.clients.train import train
from fedpeft.config import ClientConfig, Config, StrategyConfig
from fedpeft.errors import RunError
from fedpeft.state import ServerState
from fedpeft.strategies.rules.fedit import FedIT
from fedpeft.strategies.wrappers.scaffold import CONTROL
from support import small_models as small
from support.instructed import ROLES, task

SGD = ClientConfig(optimizer="sgd", lr=0.1, local_steps=5, local_epochs=None, batch_size=4)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Read-only but for its adapter and head, which every test writes first."""
    return small.adapted(small.save("bert", tmp_path_factory.mktemp("models") / "bert"), "bert")


@pytest.fixture
def model(bert):
    bert.write(small.randomised(bert))
    return bert


@pytest.fixture
def local(model, tmp_path):
    return make(model, tmp_path)


def make(model, tmp_path, **strategy):
    return Local(
        Config(client=SGD, strategy=StrategyConfig(**strategy)),
        model,
        model.state(),
        {"a": small.texts(10)},
        {"a": small.texts(4, seed=1)},
        Store(tmp_path, history=3),
        Guard(Config(client=SGD), tmp_path / "ledger", "run"),
    )


def test_a_client_that_does_not_move_is_an_error(local):
    """With B at zero, A has no gradient."""
    start = local.initial.replace(
        {key: torch.zeros_like(value) for key, value in local.initial.select(("B",)).tensors.items()}
    )
    with pytest.raises(RunError, match=r"no trained tensor moved in 5 steps; check client\.lr"):
        local.train("a", start, task(trains=["A"], uploads=["A"]))
    update, metrics = local.train("a", start, task(trains=["B"], uploads=["B"]))
    assert update.distance(start) > 0 and metrics["num-examples"] == 10


def test_a_client_round_is_training_from_what_was_sent(local, model):
    sent = small.randomised(model, seed=11)
    update, metrics = local.train("a", sent, task())
    model.write(sent)
    steps, loss = train(model, small.texts(10), ROLES, SGD, seeds.derive(0, "round", 1, "client", "a"))
    assert update.sha256() == model.read(sent).sha256()
    assert metrics == {"num-examples": 10.0, "train_loss": loss} and steps == 5
    assert local.train("a", sent, task(round=2))[0].sha256() != update.sha256()


def test_a_client_uploads_no_more_than_it_is_asked_for_and_keeps_the_rest(model, tmp_path):
    local = make(model, tmp_path, name="fedsa")
    sent = small.randomised(model, seed=11).without(("B", "head"))
    update, _ = local.train("a", sent, task(uploads=["A"], keeps=["B", "head"]))
    assert {update.role(key) for key in update.tensors} == {"A"}
    kept = local.store.load("a", before=2)
    assert set(kept) == set(local.initial.select(("B", "head")).tensors)
    assert local.store.load("a", before=1) == {}
    mine, _ = local.compose("a", sent, task(), before=2)
    assert all(torch.equal(mine[key], value) for key, value in kept.items())
    assert all(torch.equal(mine[key], sent[key]) for key in sent.select(("A",)).tensors)


def test_a_scaffold_client_sends_the_change_of_its_control(model, tmp_path):
    local = make(model, tmp_path, wrap=["scaffold"])
    sent = small.randomised(model, seed=11)
    server = {f"{CONTROL}{key}": value for key, value in small.offsets(model).items()}
    update, _ = local.train("a", sent.beside(server), task())
    model.write(sent)
    corrections = {key.removeprefix(CONTROL): value for key, value in server.items()}  # c_k is zero at first
    train(model, small.texts(10), ROLES, SGD, seeds.derive(0, "round", 1, "client", "a"), offset=corrections)
    end = model.state()
    kept = local.store.load("a", before=2)
    for key, value in sent.tensors.items():
        assert torch.equal(update[key], end[key])
        expected = -server[f"{CONTROL}{key}"] + (value - end[key]) / (5 * SGD.lr)
        torch.testing.assert_close(update.extra[f"{CONTROL}{key}"], expected)
        torch.testing.assert_close(kept[f"{CONTROL}{key}"], expected)


def test_a_client_without_records_is_an_error(local):
    with pytest.raises(RunError, match="b has no records here"):
        local.train("b", local.initial, task())


def test_a_core_stands_for_a_frozen_A(model, tmp_path):
    """FedSVD's r x r transport: A is the core times the A that the client drew itself."""
    local = make(model, tmp_path, name="fedsvd")
    site = local.initial.lora_sites()[0]
    core = torch.arange(16.0).reshape(4, 4)
    received = replace(local.initial, tensors={f"{site}/M": core})
    start, _ = local.compose("a", received, task(), before=1)
    torch.testing.assert_close(start[f"{site}/A"], core @ local.initial[f"{site}/A"])


def test_another_draw_than_the_servers_is_refused(local):
    digest = local.initial.select(("A",)).sha256()
    local.compose("a", local.initial, task(static={"roles": ["A"], "sha256": digest}), before=1)
    with pytest.raises(RunError, match=r"roles A drawn from run\.seed=0 differ"):
        local.compose("a", local.initial, task(static={"roles": ["A"], "sha256": "0" * 64}), before=1)


def test_the_tasks_of_a_strategy_fit(local):
    update, _ = local.train("a", local.initial, FedIT().instructions(ServerState(local.initial)))
    local.initial.require_same_form(update, "update")


@pytest.mark.parametrize("method", [{}, {"name": "fedsa"}])
def test_a_round_that_diverged_leaves_the_client_as_it_was(model, tmp_path, method, monkeypatch, caplog):
    """NaN in what it keeps would be in every later round; the next one is that of a client that never did this one."""
    told = {"uploads": ["A"], "keeps": ["B", "head"]} if method else {}
    lasting = replace(SGD, optimizer="adamw", keep_optimizer=not method)
    never, local = (make(model, tmp_path / folder, **method) for folder in ("never", "diverged"))
    for one in (never, local):
        one.config.client = lasting
    sent = small.randomised(model, seed=11)
    sent = sent.without(("B", "head")) if method else sent
    [each.train("a", sent, task(1, **told)) for each in (never, local)]

    def diverged(trained, *arguments, **keywords):
        result = train(trained, *arguments, **keywords)
        for parameter in trained.parameters.values():
            parameter.data.fill_(math.nan)
        for value in (keywords["moments"] or {}).values():
            value.fill_(math.nan)
        return result

    with monkeypatch.context() as patch:
        patch.setattr("fedpeft.clients.local.train", diverged)
        local.train("a", sent, task(2, **told))
    assert "a: round 2 left NaN or inf, so nothing of it is kept" in caplog.text
    update, _ = local.train("a", sent, task(3, **told))
    assert update.sha256() == never.train("a", sent, task(3, **told))[0].sha256()
    assert all(torch.isfinite(value).all() for value in update.tensors.values())
