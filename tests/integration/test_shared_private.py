"""An adapter that says itself what of it is shared: the rest stays with each client, from round to round."""

from __future__ import annotations

import json

import pytest
import torch

from fedpeft import config as configs
from fedpeft.adapters import folder
from fedpeft.errors import InputError
from fedpeft.record.metrics import read
from fedpeft.run.trained import open_trained
from fedpeft.simulations.run import simulate
from support.methods import TINY

NAMES = ["apple", "river"]


@pytest.fixture(scope="module")
def runs(bert_folder, tmp_path_factory):
    """Two clients that call the same texts by opposite names, trained by one LoRA and by a shared and a private one."""
    place = tmp_path_factory.mktemp("apart")
    rows = [
        {"text": f"{NAMES[number % 2]} {number}", "label": NAMES[(number + who) % 2], "owner": f"site-{who}"}
        for who in range(2)
        for number in range(24)
    ]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {
        "model": {"name": str(bert_folder), "task": "sequence-classification"},
        "data": {
            "source": str(place / "rows.jsonl"),
            "partition": {"name": "column", "column": "owner"},
            "holdout": 0.25,
            "test_fraction": 0.1,
            "clients": None,
        },
        "client": {"local_steps": 30, "local_epochs": None, "lr": 0.02, "batch_size": 8},
    }
    for name in ("lora", "shared_private"):
        simulate({}, {**TINY, **given, "adapter": name, "run.rounds": 3}, place / name)
    return place


def rounds_of(run):
    return [event for event in read(run / "metrics.jsonl") if event["event"] == "round"]


def test_clients_that_disagree_have_each_their_own(runs):
    found = {name: rounds_of(runs / name)[-1]["client_accuracy"] for name in ("lora", "shared_private")}
    assert found["shared_private"] > found["lora"] + 0.2


def test_what_is_private_is_not_sent_and_is_in_each_clients_folder(runs):
    run = runs / "shared_private"
    shared = folder.load(run / "adapter")
    own = [folder.load(path) for path in sorted((run / "adapter" / "clients").iterdir())]
    assert len(own) == 2
    for site in shared.lora_sites():
        assert {state.rank(site) for state in (shared, *own)} == {8}  # two of rank 4
        parts = [state[f"{site}/B"].split(4, dim=1) for state in (shared, *own)]
        assert not parts[0][1].any() and torch.equal(parts[1][0], parts[2][0]) and torch.equal(parts[0][0], parts[1][0])
        assert parts[0][0].any() and parts[1][1].any() and not torch.equal(parts[1][1], parts[2][1])
    sent = {name: [event["bytes_up"] for event in rounds_of(runs / name)] for name in ("lora", "shared_private")}
    assert sent["lora"] == sent["shared_private"]
    with pytest.raises(InputError, match="every client has a model of its own"):
        open_trained(run)
    assert open_trained(run / "adapter" / "clients" / "site-0").names == NAMES


def test_it_wants_records_held_out_as_there_is_no_single_model():
    with pytest.raises(InputError, match=r"leaves P, Q with each client.*Set data\.holdout"):
        configs.load({"adapter": "shared_private"})
