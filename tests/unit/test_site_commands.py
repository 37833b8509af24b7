"""`fedpeft site` init, check, status: what cannot work is refused or said before a run needs it."""

from __future__ import annotations

import csv
import json

import pytest

from fedpeft.clients import policy
from fedpeft.deploy import settings
from fedpeft.deploy.site import site
from fedpeft.errors import InputError


@pytest.fixture
def made(tmp_path):
    with (tmp_path / "own.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], ["good", "yes"], ["bad", "no"]])
    site.init(tmp_path / "site", "clinic", "localhost:1", None, str(tmp_path / "own.csv"), "tiny-bert")
    return tmp_path / "site"


def rows(folder):
    """What the checks say that need no coordinator."""
    found = {}
    opened = settings.site(folder)
    for name, look in (("data", site._check_data), ("model", site._check_model)):
        try:
            found[name] = look(opened, {})
        except Exception as error:  # as `site check` takes them
            found[name] = error
    return found


@pytest.mark.parametrize("data", ["missing.csv", "folder/missing.parquet", "digit"])
def test_data_that_are_not_there_are_refused(tmp_path, data):
    with pytest.raises(InputError, match="--data: no file or folder") as raised:
        site.init(tmp_path / "s", "clinic", "localhost:1", None, data, "tiny-vit")
    assert data in str(raised.value) and not (tmp_path / "s").exists()


@pytest.mark.parametrize("server", ["localhost", "localhost:99999", "::1:9092"])
def test_a_server_without_a_port_that_can_be_is_refused(tmp_path, server):
    with pytest.raises(InputError, match="--server"):
        site.init(tmp_path / "s", "clinic", server, None, None, "tiny-vit")
    assert not (tmp_path / "s").exists()


def test_a_policy_that_allows_no_strategy_is_refused(made):
    bounds = made / "policy.yaml"
    bounds.write_text(bounds.read_text().replace("strategies: null ", "strategies: [] "))
    with pytest.raises(InputError, match=r"policy\.strategies: \[\] allows no run"):
        policy.load(bounds)


def test_a_model_folder_that_the_worker_cannot_load_is_not_in_order(made, tmp_path):
    assert "parameters" in rows(made)["model"]
    folder = tmp_path / "model"
    folder.mkdir()
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertForSequenceClassification(BertConfig(vocab_size=32, **sizes)).save_pretrained(folder)
    file = made / "site.yaml"
    file.write_text(file.read_text().replace("model: tiny-bert", f"model: {folder}"))
    found = rows(made)["model"]  # a model that transformers loads, and no tokenizer
    assert isinstance(found, InputError) and str(folder) in str(found)


def test_labels_that_are_not_the_federation_s_are_said_once_a_run_has_told_them(made):
    assert "labels: no, yes" in rows(made)["data"]
    (made / site.LABELS).write_text(json.dumps({"run": "run-1", "labels": ["neg", "yes"]}))
    found = rows(made)["data"]
    assert isinstance(found, InputError) and "labels no are none of run run-1, which has neg, yes" in str(found)
    (made / site.LABELS).write_text(json.dumps({"run": "run-1", "labels": ["maybe", "no", "yes"]}))
    assert "2 records" in rows(made)["data"]


def test_the_status_says_what_is_owed_and_whether_the_site_runs(made):
    assert site.status(made) == {"site": "clinic", "running": False, "state": "never started", "owed": 0}
    (made / "status.json").write_text(json.dumps({"state": "away", "trouble": "nothing listens there"}))
    (made / "owed" / ("0" * 64)).mkdir(parents=True)
    seen = site.status(made)
    assert (seen["state"], seen["trouble"], seen["owed"]) == ("away", "nothing listens there", 1)
