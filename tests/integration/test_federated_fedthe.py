"""FedTHE in a federation: the mean features on the wire, each client's numbers by hand, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft import config as configs
from fedpeft import seeds
from fedpeft.clients import test_time
from fedpeft.clients.policy import Refused
from fedpeft.errors import InputError
from fedpeft.record import checkpoint
from fedpeft.run.world import load_world
from fedpeft.strategies.wrappers.fedthe import FEATURES
from fedpeft.tta.deployed import deploy
from fedpeft.tta.method import make

PRIVATE: dict[str, Any] = {
    "data.limit": 60,
    "data.clients": 2,
    "data.partition": "iid",
    "client.local_steps": 2,
    "client.local_epochs": None,
    "client.batch_size": 8,
    "run.rounds": 1,
    "privacy.unit": "sample",
    "privacy.noise_multiplier": 1.0,
    "privacy.randomness": "seeded",
    "strategy.weighting": "uniform",
}
CONFIG: dict[str, Any] = {
    "data.holdout": 0.5,
    "data.limit": 72,
    "data.test_fraction": 0.05,
    "data.clients": 2,
    "run.rounds": 2,
    "run.evaluate_every": 2,
    "client.local_steps": 4,
    "data.partition": "dirichlet",
    "data.partition.alpha": 0.3,
    "strategy.wrap": ["fedthe"],
    "tta.method": "fedthe",
    "tta.corruption": "sequence",
    "tta.severity": 4,
    "tta.batch_size": 6,
    "tta.head_lr": 0.05,
    "tta.keep": True,
}


def again(folder: Path) -> tuple[Any, Any]:
    return load_world(configs.load(folder / "resolved.yaml"), folder), checkpoint.latest(folder / "checkpoints")


def evaluated(folder: Path) -> dict[str, Any]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [event for event in found if event["event"] == "clients_evaluated"][-1]["clients"]


def features(here: Any, state: Any, data: Any) -> torch.Tensor:
    """What enters the head [N, D], with a hook of our own."""
    here.local.model.write(state)
    seen: list[torch.Tensor] = []
    handle = here.local.model.base.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        here.local.model.logits(data.inputs)
    handle.remove()
    return seen[0]


def test_clients_send_mean_features_the_server_averages_them_and_clients_use_them(tiny, tmp_path):
    summary = tiny("run", CONFIG)
    here, server = again(tmp_path / "run")
    first = checkpoint.read(tmp_path / "run" / "checkpoints" / "round-000001")
    assert not here.strategy.broadcast(here.start, "client-000").extra[FEATURES].any()
    total, count = torch.zeros(()), 0
    for client, data in here.local.train_data.items():
        task, received = replace(here.strategy.instructions(first), round=2), here.strategy.broadcast(first, client)
        assert torch.equal(received.extra[FEATURES], first.memory[FEATURES].float()) and received.extra[FEATURES].any()
        update, _ = here.local.train(client, received, task)
        start, _ = here.local.compose(client, received, task, before=2)
        own = features(here, start.replace(update), data).mean(0)
        torch.testing.assert_close(update.extra[FEATURES], own, rtol=1e-4, atol=1e-5)
        total, count = total + len(data) * update.extra[FEATURES].double(), count + len(data)
    torch.testing.assert_close(server.memory[FEATURES], total / count, rtol=1e-4, atol=1e-5)
    # The adapter's rounds are what they are without it.
    tiny("plain", {key: value for key, value in CONFIG.items() if not key.startswith(("strategy", "tta"))})
    assert again(tmp_path / "plain")[1].adapter.sha256() == server.adapter.sha256()
    # Each client's numbers are the method's with its own records and that mean.
    here, server = again(tmp_path / "run")
    moved = 0
    for client, result in evaluated(tmp_path / "run").items():
        received = here.strategy.broadcast(server, client)
        start, kept = here.local.compose(client, received, here.strategy.instructions(server), before=99)
        assert not kept, "nothing personal lies about: the personal head is made when it is used"
        here.local.model.write(start)
        method = make(
            "fedthe",
            deploy(here.local.model),
            {"head_lr": 0.05},
            seeds.derive(here.config.run.seed, "tta", client, "method"),
        )
        method.receive(here.local.train_data[client], server.memory[FEATURES].float())
        given = test_time.stream(here.config, client, here.local.holdout[client])
        probs = torch.cat([method.step(batch)[0] for batch in given.batches()])
        assert result["tta_accuracy"] == pytest.approx(float((probs.argmax(-1) == given.labels).double().mean()))
        moved += result["tta_accuracy"] != result["tta_source_accuracy"]
    assert moved, "the method changes nothing here, so the test shows nothing"
    assert summary["tta"]["method"] == "fedthe"


@pytest.mark.parametrize("extra", ["mean", "rates"])
def test_a_client_under_privacy_sends_no_mean_and_no_rates_whatever_the_server_asks(extra, tmp_path):
    here = load_world(configs.load({}, PRIVATE), tmp_path)
    server = here.start
    trained = next(iter(server.adapter.select(here.strategy.trains).tensors))
    more = FEATURES if extra == "mean" else f"rates:{trained}"
    size = (here.local.model.base.head.in_features,) if extra == "mean" else ()
    received = server.adapter.beside({more: torch.zeros(size)})
    honest = here.strategy.instructions(server)
    for told in (honest, replace(honest, uploads=(*honest.uploads, extra))):
        with pytest.raises(Refused, match=r"sends no such tensor|task\.uploads"):
            here.local.train("client-000", received, told)
    update, _ = here.local.train("client-000", server.adapter, honest)
    assert not update.extra and update.tensors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strategy.wrap": []}, r"strategy.wrap=\[fedthe\]"),
        ({"strategy": "fedsa"}, "fedsa leaves B, head with each client, so there is no global one"),
        ({"adapter.train_head": False}, "adapter.train_head=false has none"),
        (
            {
                "model.task": "causal-lm",
                "model.name": "tiny-llama",
                "data.source": "docstrings",
                "tta.corruption": "clean",
                "data.partition": "iid",
            },
            "model.task=causal-lm",
        ),
        (
            {"secagg.enabled": True, "strategy.weighting": "uniform", "data.clients": 4},
            "summed beside them, may be larger",
        ),
        (
            {
                "privacy.unit": "client",
                "privacy.noise_multiplier": 1.0,
                "strategy.weighting": "uniform",
                "privacy.release_metrics": True,
            },
            "fedthe has clients send mean features of their records, a second release",
        ),
        (
            {
                "privacy.unit": "sample",
                "privacy.noise_multiplier": 1.0,
                "strategy.weighting": "uniform",
                "privacy.release_metrics": True,
                "client.local_epochs": None,
                "client.local_steps": 2,
            },
            "does not cover",
        ),
        ({"continual.body": "sequential", "continual.tasks": 2}, "continual.body=null"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(changes, words, tiny, tmp_path):
    config = {**CONFIG, **changes}
    if changes.get("data.partition") == "iid":
        del config["data.partition.alpha"]
    with pytest.raises(InputError, match=words):
        tiny("run", config)
    assert not (tmp_path / "run").exists()
