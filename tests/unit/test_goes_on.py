"""A run that goes on sends its next round before it loads the model, and reads no answer before it has looked at it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from flwr.app import Message

from fedpeft import config as configs
from fedpeft.deploy import keys
from fedpeft.deploy.build import LaterWorld
from fedpeft.deploy.coordinator import run as runs
from fedpeft.errors import InputError
from fedpeft.flower import empty_run, identify
from fedpeft.record import checkpoint
from fedpeft.record.metrics import Recorder
from support.deployed import LABELS

CONFIG = {
    "model": {"name": "tiny-bert", "task": "sequence-classification"},
    "adapter": {"name": "lora", "r": 2, "alpha": 4},
    "data": {"labels": LABELS, "clients": 2},
    "strategy": {"name": "fedsvd"},
    "run": {"engine": "sites", "rounds": 3},
}


class Sent(Exception):
    """A message has come as far as the way to the sites."""


class Sites:
    """Two connected sites, from which no answer ever comes."""

    def __init__(self, line):
        self.nodes = [SimpleNamespace(node_id=1 + at, name=f"site-{at}", public_key=keys.pem(line)) for at in range(2)]
        self.pushed: list[Message] = []
        self.pulls = 0

    def get_nodes(self):
        return self.nodes

    def push_messages(self, messages):
        self.pushed += messages
        return [f"message-{len(self.pushed)}"]

    def wait(self, names):
        self.pulls += 1

    def pull_messages(self, names):
        self.pulls += 1
        raise AssertionError("an answer was read")


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    """The folder of a run after round 1, its sites' key, and what its sites were told."""
    run = tmp_path_factory.mktemp("runs") / "run-1"
    run.mkdir()
    config = configs.load(CONFIG)
    (run / "resolved.yaml").write_text(configs.to_yaml(config))
    world, cover = runs.open_world(config, run)  # as its first process did
    Recorder(run / "metrics.jsonl").record({"event": "round", "round": 1})
    state = world.strategy.before_round(world.start)
    checkpoint.write(run / "checkpoints", type(state)(state.adapter, 1, state.memory, state.numbers), 2)
    return run, keys.site_keys(run.parent / "site"), cover


def go_on(rig):
    run, line, _ = rig
    identify(1, 1, 0)
    sites = Sites(line)
    sites.run = empty_run(1)
    return sites, lambda: runs.play(run, sites, lambda: {"site-0": line, "site-1": line})


def test_the_next_round_is_sent_before_the_model_is_loaded(rig, monkeypatch):
    sites, play = go_on(rig)
    loaded = []

    def load(config, run):
        loaded.append(len(sites.pushed))
        raise Sent

    monkeypatch.setattr(runs, "load_world", load)
    with pytest.raises(Sent):
        play()
    assert loaded == [2] and not sites.pulls
    told = [message.content["fedpeft.run"] for message in sites.pushed]
    assert [record["base"] for record in told] == [rig[2].base] * 2 and told[0]["labels"] == LABELS


@pytest.mark.parametrize(("change", "said"), [("identity.json", "another base model"), ("told.json", "were told")])
def test_no_answer_is_read_where_the_base_is_another_one(rig, change, said):
    sites, play = go_on(rig)
    file = rig[0] / change
    kept = file.read_text()
    tree = json.loads(kept)
    if change == "told.json":
        tree["base"] = "0" * 64
    else:
        tree["fingerprints"]["base model"] = "another"
    file.write_text(json.dumps(tree))
    try:
        with pytest.raises(InputError, match=said):
            play()
    finally:
        file.write_text(kept)
    assert len(sites.pushed) == 2 and not sites.pulls


def test_a_world_is_loaded_once_and_with_the_strategy_that_it_had():
    loads = []

    def load():
        loads.append(1)
        return SimpleNamespace(local="local", start="start", strategy="another")

    world = LaterWorld("config", "strategy", load)
    assert world.config == "config" and not loads
    assert (world.local, world.start, world.strategy) == ("local", "start", "strategy") and len(loads) == 1
    with pytest.raises(AttributeError):
        _ = world.nothing
