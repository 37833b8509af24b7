"""`client.memory_mb`: the formula of a client's memory against what torch holds at most in steps, and ranks by it."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fedpeft import config as configs
from fedpeft.clients.train import train
from fedpeft.config import ClientConfig
from fedpeft.errors import InputError
from fedpeft.run import ranks
from fedpeft.simulations.run import simulate
from support import small_models as small

TOKENS = 32


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose adapters of high ranks are no small part of it."""

    return functools.cache(lambda kind: small.save_wide(kind, tmp_path_factory.mktemp(kind)))


def records(kind, count=8):
    """Texts of one length."""
    data = small.texts(count, not small.HEADS[kind])
    ids = torch.randint(3, 60, (count, TOKENS), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = data.labels if data.labels.ndim == 1 else ids
    return type(data)(inputs, labels)


def measure_peak(model, data, trains, client):
    """Bytes that training takes at most, beside the model with its adapter."""
    work = functools.partial(train, model, data, trains, client, 0)
    work()  # what is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum(events).max())


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize(
    ("rank", "optimizer", "batch"), [(1, "adamw", 4), (32, "adamw", 4), (32, "sgd", 4), (32, "adamw", 1)]
)
def test_the_formula_is_what_a_step_takes_at_most(wide, kind, rank, optimizer, batch):
    """At this rank, said by a model of another one."""
    client = ClientConfig(optimizer=optimizer, local_steps=2, local_epochs=None, batch_size=batch)
    trains = ("A", "B", "head") if small.HEADS[kind] else ("A", "B")
    data = records(kind)
    need = ranks.count_need(small.adapted(wide(kind), kind, r=4), data, trains, client)
    model = small.adapted(wide(kind), kind, r=rank)
    own = sum(4 * value.numel() for value in model.parameters.values())  # held ahead of the step
    measured = need.base + own + measure_peak(model, data, trains, client)
    assert need.at(rank) - need.base == pytest.approx(measured - need.base, rel=0.15)
    held = {value.data_ptr(): value.nbytes for value in [*model.base.backbone.parameters()]}
    assert need.base == pytest.approx(sum(held.values()) - own, rel=0.02)


CONFIG = {
    "strategy": "hetlora",
    "adapter.r": 4,
    "data.limit": 60,
    "data.clients": 4,
    "run.clients_per_round": None,
    "client.local_steps": 1,
    "client.local_epochs": None,
    "run.baselines": False,
    "run.rounds": 1,
}


@pytest.fixture
def need(monkeypatch, tmp_path):
    """That of CONFIG."""
    found = []
    count = ranks.count_need
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "count_need", lambda *given: found.append(count(*given)) or found[0])
        ranks.settle_ranks(configs.load("quickstart", {**CONFIG, "client.memory_mb": [1000]}), tmp_path / "run")
    return found[0]


def test_the_largest_rank_is_the_last_that_fits(need):
    for rank in (1, 2, 3, 100):
        assert need.largest(need.at(rank)) == need.largest(need.at(rank + 1) - 1) == rank
    assert need.largest(need.at(1) - 1) == 0 and need.largest(0) < 1


def test_each_client_of_a_run_has_the_largest_rank_that_its_memory_has_room_for(need, tmp_path):
    memory = [need.at(2) / 1e6 + 1e-4, 1000.0]
    simulate("quickstart", {**CONFIG, "client.memory_mb": memory}, out=tmp_path / "run")
    text = (tmp_path / "run" / "resolved.yaml").read_text()
    assert text.startswith("# client.memory_mb=[") and "ranks 2, 4." in text.splitlines()[0]
    config = configs.load(tmp_path / "run" / "resolved.yaml")
    assert config.adapter.client_ranks == [2, 4] and config.client.memory_mb is None
    plain = simulate("quickstart", {**CONFIG, "adapter.client_ranks": [2, 4]}, out=tmp_path / "plain")
    assert plain["bytes_up"] == bytes_of(tmp_path / "run")
    with pytest.raises(InputError, match=r"client\.memory_mb=\[.*\]: .* MB have no room for rank 1\. The base takes"):
        simulate("quickstart", {**CONFIG, "client.memory_mb": [need.at(1) / 1e6 - 1e-3]}, out=tmp_path / "none")
    assert not (tmp_path / "none").exists() or not any((tmp_path / "none").iterdir())


def bytes_of(run):
    return json.loads((run / "summary.json").read_text())["bytes_up"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strategy": "fedit"}, r"client\.memory_mb=\[9\.0\]: strategy fedit needs equal ranks"),
        ({"adapter.client_ranks": [1, 2]}, r"Set one of them to null"),
        ({"client.memory_mb": []}, r"more than 0 MB"),
        ({"client.memory_mb": [3.0, -1.0]}, r"more than 0 MB"),
        (
            {"privacy.unit": "sample", "privacy.epsilon": 8.0, "strategy.weighting": "uniform"},
            r"noise would fill the rows",
        ),
    ],
)
def test_memory_is_refused_where_unequal_ranks_are(changes, words):
    with pytest.raises(InputError, match=words):
        configs.load("quickstart", {**CONFIG, "client.memory_mb": [9.0], **changes})


def test_with_checkpoints_of_gradients_no_rank_is_said_to_fit(tmp_path):
    config = configs.load("quickstart", {**CONFIG, "client.memory_mb": [9.0], "model.gradient_checkpointing": True})
    with pytest.raises(InputError, match=r"model\.gradient_checkpointing"):
        ranks.settle_ranks(config, tmp_path / "run")
