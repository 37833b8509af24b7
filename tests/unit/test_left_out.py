"""A run's data: what clients get of it, whose it is, and what is left out, in the log, the summary and the report."""

import json

import numpy as np
import pytest

from fedpeft import config as configs
from fedpeft.data.records import Records
from fedpeft.errors import InputError
from fedpeft.models import embedded
from fedpeft.run.world import client_split, load_world
from fedpeft.simulations.run import simulate

LANGUAGE = {
    "model.name": "tiny-llama",
    "model.task": "causal-lm",
    "model.max_length": 12,
    "data.clients": 2,
    "data.partition": "column",
    "data.partition.column": "site",
    "run.rounds": 1,
    "run.baselines": False,
    "client.local_steps": 2,
    "client.local_epochs": None,
    "client.batch_size": 4,
    "client.lr": 0.01,
}


@pytest.fixture
def endless(monkeypatch):
    """The byte tokenizer with no end token: a text of one byte has nothing to predict."""
    made = embedded.byte_tokenizer

    def without():
        tokenizer = made()
        tokenizer.eos_token = None
        return tokenizer

    monkeypatch.setattr(embedded, "byte_tokenizer", without)


def letters(path, texts, sites):
    path.write_text(
        "".join(json.dumps({"text": text, "site": site}) + "\n" for text, site in zip(texts, sites, strict=True))
    )
    return str(path)


def here(config, tmp_path, name):
    (tmp_path / name).mkdir()
    return load_world(configs.load({}, config), tmp_path / name)


def test_texts_with_nothing_to_predict_are_no_ones_records(endless, tmp_path, caplog):
    texts, sites = [f"letter {i}" for i in range(12)], ["N", "S", "N"] * 4
    test = letters(tmp_path / "test.jsonl", ["a letter", "x", "another"], ["N"] * 3)
    plain = here(
        {**LANGUAGE, "data.source": letters(tmp_path / "a.jsonl", texts, sites), "data.test": test}, tmp_path, "plain"
    )
    more = letters(tmp_path / "b.jsonl", ["q", *texts, *"rst"], ["S", *sites, "N", "S", "N"])
    mixed = here({**LANGUAGE, "data.source": more, "data.test": test}, tmp_path, "mixed")
    assert "4 of 16 training texts have nothing to predict" in caplog.text
    large, small = plain.local.train_data
    for client in (large, small):
        one, two = plain.local.train_data[client], mixed.local.train_data[client]
        assert sorted(map(tuple, one.labels.tolist())) == sorted(map(tuple, two.labels.tolist()))
    assert len(mixed.local.train_data[large]) == 8 and len(mixed.local.train_data[small]) == 4
    counts = {(entry.count, entry.total) for entry in mixed.skipped}
    assert {(4, 16), (1, 3), (16, 16), (3, 3)} <= counts
    with pytest.raises(InputError, match=r"none of the 2 texts of .* has a token to predict"):
        here(
            {
                **LANGUAGE,
                "data.source": letters(tmp_path / "c.jsonl", [*texts, "q", "r"], ["N"] * 12 + ["S"] * 2),
                "data.test": test,
            },
            tmp_path,
            "none",
        )
    with pytest.raises(
        InputError,
        match=r"none of 3 texts has a token to predict \(.*3 of 3 test texts have nothing to predict.*nothing to eval",
    ):
        here(
            {
                **LANGUAGE,
                "data.source": letters(tmp_path / "d.jsonl", texts, sites),
                "data.test": letters(tmp_path / "e.jsonl", "xyz", "NNN"),
            },
            tmp_path,
            "nothing",
        )


def test_a_run_says_once_what_it_leaves_out_and_whose_a_client_is(tmp_path, caplog):
    texts = [f"letter {i}" + " and so on" * (i % 4 == 0) for i in range(24)]
    source, test = (letters(tmp_path / name, texts, [2**53, 2**53 + 1, None] * 8) for name in ("a.jsonl", "b.jsonl"))
    summary = simulate({}, {**LANGUAGE, "data.source": source, "data.test": test}, tmp_path / "run")
    said = [(entry["count"], entry["total"], entry["where"]) for entry in summary["skipped"]]
    cut = (6, 24, "model.max_length=12")
    assert said == [cut, cut, (8, 24, "data.partition.column=site")]
    for entry in summary["skipped"]:
        assert caplog.text.count(entry["what"]) == 1
    tree = json.loads((tmp_path / "run" / "split.json").read_text())
    assert list(tree["owners"].values()) == [str(2**53), str(2**53 + 1)]
    assert summary["owner"] == tree["owners"]
    start = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert start["skipped"] == summary["skipped"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Left out or cut" in page and "8 of 24" in page


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_owners_keep_their_client_over_a_sequence_of_tasks(tmp_path, tasks):
    site = np.array(["N"] * 12 + ["S"] * 9 + ["W"] * 3, dtype=object)
    labels = np.array([0] * 10 + [1, 2] + [1] * 4 + [2] * 4 + [0] + [1] * 3)
    train = Records([f"letter {i}" for i in range(24)], labels, ["a", "b", "c"], {"site": site}, "text")
    config = configs.load("continual", {"continual.tasks": tasks, "run.rounds": 2 * tasks, "data.clients": 2})
    config.data.partition.name, config.data.partition.options = "column", {"column": "site", "min_examples": 1}
    parts = client_split(config, train, tmp_path)
    assert [set(site[part]) for part in parts.values()] == [{"N"}, {"S"}]
    assert [len(part) for part in parts.values()] == [12, 9]
