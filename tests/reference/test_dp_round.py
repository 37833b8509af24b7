"""A client's whole private round: what the signal and the noise reach, and what they must not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedpeft import registry
from fedpeft.clients.guard import Guard
from fedpeft.clients.local import Local
from fedpeft.clients.store import Store
from fedpeft.config import Config, DataConfig, PrivacyConfig, StrategyConfig
from fedpeft.privacy.noise import OperatingSystem
from fedpeft.strategies.build import make_named
from fedpeft.strategies.instructions import Instructions
from support import small_models as small
from support.dp_steps import ROLES, SGD, adversaries, joined
from support.per_sample import records, single, without_dropout


def client(adapted, data, folder, sigma=1.0, randomness="os", records=None, name="fedit", **client):
    """A private client "a" that takes every record in every step."""
    config = Config(
        client=replace(SGD, batch_size=records or len(data), local_steps=3, **client),
        privacy=PrivacyConfig(
            unit="sample", noise_multiplier=sigma, accountant="rdp", records=records, randomness=randomness
        ),
        strategy=StrategyConfig(name=name),
        data=DataConfig(clients=1),
    )
    return Local(
        config,
        adapted,
        adapted.state(),
        {"a": single(data)},
        {},
        Store(folder / "store", 3),
        Guard(config, folder / "ledger", "run"),
    )


@pytest.fixture
def silent(monkeypatch):
    """The operating system's noise is zero: what moves has moved by a signal."""
    monkeypatch.setattr(OperatingSystem, "normal", lambda self, count: np.zeros(count))


def one_round(name, adapted, folder):
    """A round of this strategy: where the client began, where it ended, and what the strategy declares."""
    strategy = make_named(name, {}, "strategy")
    server = strategy.before_round(strategy.initial(adapted.state(), 0))
    local = client(adapted, records("vit", 6), folder, name=name)
    local.initial = server.adapter
    task = replace(strategy.instructions(server), round=1)
    start, _ = local.compose("a", strategy.broadcast(server, "a"), task, before=1)
    adapted.write(start)
    frozen = {key: value.clone() for key, value in adapted.base.backbone.state_dict().items()}
    _, metrics = local.train("a", strategy.broadcast(server, "a"), task)
    assert metrics == {"num-examples": 1.0}
    trained = {id(adapted.parameters[key]) for key in start.select(strategy.trained(server)).tensors}
    now = adapted.base.backbone.state_dict(keep_vars=True)
    for key, value in frozen.items():
        assert id(now[key]) in trained or torch.equal(now[key].detach(), value), key
    return start, adapted.state(), set(start.select(strategy.trained(server)).tensors)


@pytest.mark.parametrize("name", registry.names("strategies"))
def test_the_signal_reaches_all_that_a_strategy_trains_and_nothing_else(name, folder, tmp_path, silent):
    """DP-LoRA that never learns: epsilon grows, and noise alone makes the parameters look alive."""
    adapted = small.adapted(folder("vit"), "vit", method=registry.load("strategies", name).adapter)
    start, end, declared = one_round(name, adapted, tmp_path)
    for key, value in end.tensors.items():
        assert torch.equal(value, start[key]) != (key in declared), key


@pytest.mark.parametrize("name", ["fedit", "ffa_lora", "fedsvd", "rolora", "fedsa", "fed_sb"])
def test_the_noise_reaches_every_entry_of_what_is_trained_and_nothing_else(name, folder, tmp_path):
    adapted = small.adapted(folder("vit"), "vit", method=registry.load("strategies", name).adapter)
    start, end, declared = one_round(name, adapted, tmp_path)
    for key, value in end.tensors.items():
        share = float((value != start[key]).float().mean())
        assert share > 0.99 if key in declared else share == 0, key


@pytest.mark.parametrize("place", [0, 2, 6])
@pytest.mark.parametrize("name", ["nan", "inf", "one inf"])
def test_a_record_that_is_not_a_number_does_not_reach_the_update(name, place, folder, tmp_path, silent):
    adapted, updates = small.adapted(folder("vit"), "vit"), []
    without_dropout(adapted)
    start = small.randomised(adapted, scale=0.3)
    data = records("vit", 6)
    for index, told in enumerate((data, joined(data, adversaries("vit")[name], place))):
        local = client(adapted, told, tmp_path / str(index), records=7)
        updates.append(local.train("a", start, Instructions(1, tuple(ROLES), tuple(ROLES)))[0])
    assert all(torch.isfinite(value).all() for value in updates[1].tensors.values())
    assert updates[0].distance(start) > 0.01
    assert updates[0].distance(updates[1]) < 1e-5


def test_only_a_seeded_client_can_be_repeated(folder, tmp_path):
    adapted = small.adapted(folder("vit"), "vit")
    without_dropout(adapted)
    start, ends = small.randomised(adapted, scale=0.3), {}
    for index, randomness in enumerate(("os", "os", "seeded", "seeded")):
        torch.manual_seed(0)
        np.random.seed(0)
        local = client(adapted, records("vit", 6), tmp_path / str(index), randomness=randomness)
        task = Instructions(1, tuple(ROLES), tuple(ROLES))
        ends.setdefault(randomness, []).append(local.train("a", start, task)[0])
        again = local.train("a", start, replace(task, round=2))[0]
        assert again.distance(ends[randomness][-1]) > 0.01  # every round has noise of its own
    assert ends["os"][0].distance(ends["os"][1]) > 0.01
    assert ends["seeded"][0].distance(ends["seeded"][1]) == 0
