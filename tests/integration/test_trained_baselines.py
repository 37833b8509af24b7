"""Clients alone, and one client on all records, are trained as a federation of one client would be."""

from __future__ import annotations

import pytest
import torch

from fedpeft import config as configs
from fedpeft import seeds
from fedpeft.cli import console
from fedpeft.config import Config
from fedpeft.errors import InputError
from fedpeft.run.world import load_world
from fedpeft.simulations import trained_baselines as rows

BOTH = {"run.trained_baselines": ["local", "central"], "client.lr": 0.05, "run.cohort_tokens": 0}


@pytest.mark.parametrize("keep_optimizer", [False, True])
def test_of_one_client_all_three_are_the_federated_model(keep_optimizer, tiny):
    summary = tiny("run", {**BOTH, "data.clients": 1, "data.holdout": 0.3, "client.keep_optimizer": keep_optimizer})
    found = summary["baselines"]
    assert found["local"] == found["local_worst"] == found["central"] == summary["final"]["accuracy"]
    assert found["local"] != summary["baseline"]["accuracy"]
    assert found["clients_local"] == found["clients_central"]


def test_they_see_the_pictures_as_augmented_as_the_clients_do(tiny):
    alone = {**BOTH, "data.clients": 1, "client.lr": 0.05, "run.rounds": 4}
    summary = tiny("run", {**alone, "data.augment": ["crop", "flip"]})
    found = summary["baselines"]
    assert found["local"] == found["central"] == summary["final"]["accuracy"]
    assert found["local"] != tiny("plain", alone)["baselines"]["local"]


def test_they_have_the_tokens_hidden_that_a_client_has_in_each_round(tmp_path, monkeypatch):
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "patient {place} is well"}}\n' for place in range(30)))
    task = {"model.name": "tiny-bert", "model.task": "masked-lm", "data.source": str(tmp_path / "texts.jsonl")}
    world = load_world(configs.load({}, {**task, "data.partition": "iid", "run.rounds": 2}), tmp_path / "run")
    (client, data), seen = next(iter(world.local.train_data.items())), []
    monkeypatch.setattr(rows, "train", lambda model, shown, *_, **__: seen.append(shown.labels))
    rows.train_alone(world, client, data, world.config.client)
    each = [seeds.derive(world.config.run.seed, "round", number, "client", client) for number in (1, 2)]
    assert all(torch.equal(labels, data.augmented(seed).labels) for labels, seed in zip(seen, each, strict=True))
    assert not torch.equal(*seen)


def test_of_several_clients_each_is_trained_on_its_own_records_alone(tiny, tmp_path):
    summary = tiny("run", {**BOTH, "data.holdout": 0.3, "strategy": "fedsa"})
    found = summary["baselines"]
    world = load_world(configs.load(tmp_path / "run" / "resolved.yaml"), tmp_path / "run")
    on_test, right, held = [], 0, 0
    for client, data in world.local.train_data.items():
        rows.train_alone(world, client, data, world.config.client)
        on_test.append(rows.evaluated(world, world.test_encoded)["accuracy"])
        own = rows.evaluated(world, world.local.holdout[client])
        right, held = right + own["accuracy"] * own["num-examples"], held + own["num-examples"]
    assert len(set(on_test)) > 1  # their records are other ones
    assert found["local"] == pytest.approx(sum(on_test) / 4) and found["local_worst"] == min(on_test)
    assert found["clients_local"] == pytest.approx(right / held)
    assert found["central"] not in (found["local"], summary["baseline"]["accuracy"])
    # The clients are what a personalised run is scored on, and so its rows.
    assert summary["comparison"]["baseline"] in ("frozen", "clients_largest_class", "clients_local", "clients_central")
    with console.out.capture() as shown:
        console.run_result(summary)
    assert "each client alone, on its own records" in shown.get() and "one model of all records" in shown.get()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"run.trained_baselines": ["centrl"]}, r"'centrl' is not known\. Did you mean 'central'\?"),
        ({"run.trained_baselines": ["local", "local"]}, "local stands there twice"),
        ({**BOTH, "continual.body": "sequential", "continual.tasks": 2}, "records come task by task"),
        ({**BOTH, "model.task": "regression", "model.name": "tiny-bert"}, "accuracies, and model.task=regression has"),
    ],
)
def test_what_they_cannot_be_is_refused(more, said):
    with pytest.raises(InputError, match=said):
        configs.load({}, more)


def test_real_sites_keep_their_records_where_they_are():
    config = Config()
    config.run.trained_baselines, config.run.engine = ["local"], "sites"
    with pytest.raises(InputError, match="those are not here"):
        configs.check(config)
