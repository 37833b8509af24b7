"""A function of another package is a data set: the one of the docs, as a package that is installed."""

from __future__ import annotations

import json
import re
import sqlite3
import sys
from pathlib import Path

import pandas
import pytest

import fedpeft
from fedpeft import registry
from fedpeft.cli import catalogue
from fedpeft.config import DataConfig
from fedpeft.data import source
from fedpeft.errors import InputError
from fedpeft.simulations import run as runs

TEXT = "sequence-classification"
DOCS = Path(fedpeft.__file__).parents[1] / "docs" / "commands.md"
WORDS = {"heart": ["pulse", "valve", "aorta"], "bones": ["knee", "hip", "spine"]}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install(code)` puts a package `clinic` where Python finds it, as pip does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(code):
        (tmp_path / "clinic").mkdir()
        (tmp_path / "clinic" / "__init__.py").touch()
        (tmp_path / "clinic" / "letters.py").write_text(code)
        about = tmp_path / "clinic-1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: clinic\nVersion: 1\n")
        (about / "entry_points.txt").write_text("[fedpeft.datasets]\nclinic_letters = clinic.letters:load\n")
        registry.entries_of_others.cache_clear()
        registry.table.cache_clear()

    yield put
    for name in ("clinic", "clinic.letters"):
        sys.modules.pop(name, None)
    registry.entries_of_others.cache_clear()
    registry.table.cache_clear()


@pytest.fixture
def database(tmp_path):
    rows = [
        (f"the {word} of {n}", ward, f"dr {n % 3}") for ward, words in WORDS.items() for word in words for n in range(8)
    ]
    with sqlite3.connect(tmp_path / "clinic.db") as opened:
        opened.execute("create table letters (id integer primary key, text, ward, doctor)")
        opened.executemany("insert into letters (text, ward, doctor) values (?, ?, ?)", rows)
    frame = pandas.DataFrame(rows, columns=["text", "label", "doctor"])
    frame.to_csv(tmp_path / "letters.csv", index=False)
    return tmp_path / "letters.csv"


def example():
    return re.search(r"<!-- this function is .*?-->\n```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[1]


def test_the_function_of_the_docs_gives_the_records_of_the_same_csv(install, database):
    install(example())
    found, expected = (source.load(DataConfig(source=name), TEXT, 0) for name in ("clinic_letters", str(database)))
    assert [part.fingerprint for part in found] == [part.fingerprint for part in expected]
    assert "clinic_letters" in registry.names("datasets") and registry.summary("datasets", "clinic_letters") in (
        "Letters with the ward that they are for.",
    )
    shown = catalogue.describe("clinic_letters")
    assert shown["options"] == [] and "Letters of the clinic" in shown["description"]


def test_a_federation_of_it_is_split_by_a_column_and_resumes_unless_its_records_are_others(
    install, database, interrupted, tmp_path
):
    install(example())
    keys = {
        "model.name": "tiny-bert",
        "model.task": TEXT,
        "data.source": "clinic_letters",
        "run.rounds": 2,
        "data.limit": None,
    }
    keys |= {"data.partition": "column", "data.partition.column": "doctor", "data.clients": 3}
    interrupted("run", keys, at=1)
    owners = json.loads((tmp_path / "run" / "split.json").read_text())["owners"]
    assert sorted(owners.values()) == ["dr 0", "dr 1", "dr 2"]
    with sqlite3.connect(tmp_path / "clinic.db") as opened:
        opened.execute("update letters set text = 'another' where id = 5")
        opened.commit()
        with pytest.raises(InputError, match=r"data\.source=clinic_letters: its training records are not those when"):
            runs.resume(tmp_path / "run")
        opened.execute("update letters set text = ? where id = 5", ("the pulse of 4",))
    assert runs.resume(tmp_path / "run")["rounds"] == 2


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return open('clinic.cfg')", "its function failed with FileNotFoundError: .*clinic.cfg"),
        ("raise KeyError", "its function failed with KeyError: without a word"),
        ("return [1, 2]", "returns a list; expected a pandas.DataFrame, a datasets.Dataset"),
        ("import pandas; return pandas.DataFrame({'text': []})", "returns no records"),
        ("import datasets; return datasets.DatasetDict()", "returns no records"),
        ("import datasets; return datasets.DatasetDict({'train': [1]})", "returns a DatasetDict of list; expected a"),
        ("import datasets; return datasets.DatasetDict({'train': 1})", "returns a DatasetDict of int; expected a"),
    ],
)
def test_a_function_that_gives_no_records_is_named(install, body, said):
    install(f"def load():\n    {body}\n")
    with pytest.raises(InputError, match=f"^data.source=clinic_letters: .*{said}"):
        source.load(DataConfig(source="clinic_letters"), TEXT, 0)


def test_it_may_have_a_test_set_and_splits_are_named_as_everywhere(install):
    made = "{'train': datasets.Dataset.from_dict({'text': list('abcdef'), 'label': [0, 1] * 3}), 'dev': of('xy')}"
    install(
        "import datasets\ndef of(texts):\n"
        "    return datasets.Dataset.from_dict({'text': list(texts), 'label': [0, 1]})\n"
        f"def load():\n    return datasets.DatasetDict({made})\n"
    )
    train, test = source.load(DataConfig(source="clinic_letters", test_split="dev"), TEXT, 0)
    assert (list(train.inputs), list(test.inputs)) == (list("abcdef"), list("xy"))
    with pytest.raises(InputError, match=r"data\.test_split: 'devv' is not known. Did you mean 'dev'"):
        source.load(DataConfig(source="clinic_letters", test_split="devv"), TEXT, 0)


def test_a_name_that_is_taken_is_said(install, tmp_path, caplog):
    install("def load():\n    pass\n")
    points = tmp_path / "clinic-1.dist-info" / "entry_points.txt"
    points.write_text("[fedpeft.datasets]\ndigits = clinic.letters:load\n")
    registry.entries_of_others.cache_clear()
    registry.table.cache_clear()
    assert registry.table("datasets")["digits"] == "fedpeft.data.digits:Digits"
    assert "digits = clinic.letters:load (entry point of fedpeft.datasets) is not used" in caplog.text
