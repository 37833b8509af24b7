"""What the config says of a source beside its name: format of a csv, splits, revision; or it is refused."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from PIL import Image

from fedpeft.config import DataConfig
from fedpeft.data import source
from fedpeft.data.cache import Cache
from fedpeft.errors import InputError

TEXT, IMAGE = "sequence-classification", "image-classification"
ROWS = [("häuser", "ä"), ("straße", "ß"), ("über", "ä"), ("öl", "ß")] * 3


def load(path, task=TEXT, cache=None, **keys):
    return source.load(DataConfig(source=str(path), **keys), task, 0, cache)


def written(path, delimiter=",", encoding="utf-8"):
    lines = ["text", *(f"{text} {number}" for number, (text, _) in enumerate(ROWS))]
    labels = ["label", *(label for _, label in ROWS)]
    path.write_bytes("".join(f"{a}{delimiter}{b}\n" for a, b in zip(lines, labels, strict=True)).encode(encoding))
    return path


@pytest.mark.parametrize(
    ("name", "delimiter", "encoding", "form"),
    [
        ("a.csv", ";", "utf-8", {"delimiter": "semicolon"}),
        ("b.csv", "\t", "utf-8", {"delimiter": "tab"}),
        ("c.csv", "~", "windows-1252", {"delimiter": "~", "encoding": "windows-1252"}),
        ("d.tsv", ",", "utf-8-sig", {"delimiter": ",", "encoding": "utf-8"}),
        ("e.tsv", "\t", "utf-16-le", {"encoding": "utf-16-le"}),
    ],
)
def test_a_csv_is_read_by_its_format(tmp_path, name, delimiter, encoding, form):
    plain = load(written(tmp_path / "plain.csv"))
    path = written(tmp_path / name, delimiter, encoding)
    for cache in (None, Cache(tmp_path / "cache", 0)):
        parts = load(path, format=form, cache=cache)
        assert [part.fingerprint for part in parts] == [part.fingerprint for part in plain]
        with pytest.raises(InputError, match=r"data\.format|null character|no text column|iconv"):
            load(path, cache=cache)  # also where the cache has it, of the other format


def test_a_test_set_of_its_own_has_the_format_where_it_is_a_csv(tmp_path):
    path = written(tmp_path / "a.csv", ";")
    train, test = load(path, format={"delimiter": ";"}, test=str(written(tmp_path / "b.csv", ";")))
    assert len(train) == len(test) == len(ROWS)
    rows = [{"text": text, "label": label} for text, label in ROWS]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "b.parquet")
    assert len(load(path, format={"delimiter": ";"}, test=str(tmp_path / "b.parquet"))[1]) == len(ROWS)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"delimeter": ";"}, "delimiter"),
        ({"delimiter": ";;"}, "delimiter=';;'; allowed are semicolon, tab"),
        ({"delimiter": '"'}, "no double quote"),
        ({"delimiter": 7}, "delimiter=7"),
        ({"encoding": "klingon"}, "encoding='klingon' is no encoding"),
        ({"encoding": "base64"}, "encoding='base64' is no encoding"),
        ({"encoding": 8}, "encoding=8 is no encoding"),
    ],
)
def test_a_format_that_is_none_is_refused(tmp_path, form, said):
    with pytest.raises(InputError, match=r"data\.format.*" + said):
        load(written(tmp_path / "a.csv"), format=form)


def saved(path, **counts):
    parts, start = {}, 0
    for name, count in counts.items():
        rows = [{"text": f"{name} {number}", "label": "ab"[number % 2]} for number in range(start, start + count)]
        parts[name], start = datasets.Dataset.from_list(rows), start + count
    datasets.DatasetDict(parts).save_to_disk(path)
    return path


def firsts(part):
    return {text.split()[0] for text in part.inputs}


def test_splits_of_a_saved_data_set_are_named(tmp_path):
    path = saved(tmp_path / "s", train=8, dev=4, extra=6)
    train, test = load(path, train_split="extra", test_split="dev")
    assert (firsts(train), firsts(test), len(train)) == ({"extra"}, {"dev"}, 6)
    assert "train (8)" in str(train.skipped[0])
    train, test = load(path, test_split="dev", test=str(path))
    assert (firsts(train), firsts(test)) == ({"train"}, {"dev"})
    third = saved(tmp_path / "t", train=8, test=2, dev=4)
    assert firsts(load(path, test_split="dev", test=str(third))[1]) == {"dev"}
    assert firsts(source.whole(str(third), "data.test", DataConfig(test=str(third), test_split="dev"), TEXT, True)) == {
        "dev"
    }
    with pytest.raises(InputError, match=r"data\.test_split.*'dve'.*dev"):
        load(path, test_split="dve")
    with pytest.raises(InputError, match=r"data\.test_split.*'dve'"):
        load(path, test_split="dve", test=str(path))
    with pytest.raises(InputError, match=r"data\.test_split=dev is data.train_split too"):
        load(path, train_split="dev", test_split="dev")


def test_folders_of_pictures_are_named(tmp_path):
    draws = np.random.default_rng(0)
    for part, count in {"learn": 3, "val": 2, "test": 1}.items():
        for label in "ab":
            (tmp_path / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = draws.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / label / f"{number}.png")
    train, test = load(tmp_path, IMAGE, train_split="learn")
    assert (len(train), len(test)) == (6, 2)
    train, test = load(tmp_path, IMAGE, train_split="learn", test_split="val")
    assert (len(train), len(test)) == (6, 4)
    assert "test/" in train.skipped[0].examples
    pictures = DataConfig(test=str(tmp_path), test_split="learn")
    assert len(source.whole(str(tmp_path), "data.test", pictures, IMAGE, True)) == 6
    with pytest.raises(InputError, match=r"data\.test_split=dev: .* has no such folder\. It has: learn, test, val"):
        load(tmp_path, IMAGE, train_split="learn", test_split="dev")
    with pytest.raises(InputError, match=r"name the one to learn from with data\.train_split"):
        load(tmp_path, IMAGE, test_split="val")


def test_a_revision_goes_to_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, subset, revision):
        asked.append((name, subset, revision))
        return datasets.Dataset.from_list([{"text": f"t {n}", "label": "ab"[n % 2]} for n in range(8)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load("someone/notes:small", revision="v2")
    assert asked == [("someone/notes", "small", "v2")]


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("digits", {"revision": "main"}, "revision=main: digits is an embedded data set; it is for a data set of"),
        ("digits", {"format": {"delimiter": ";"}}, "format=.*: digits is an embedded data set; it is for a csv"),
        ("a.csv", {"test_split": "val"}, r"data\.test_split=val: .*a\.csv is a csv or tsv file; it is for a saved"),
        ("a.jsonl", {"format": {"encoding": "latin-1"}}, r"a\.jsonl is a file that is no csv or tsv"),
        ("s", {"revision": "main"}, "s is a saved data set of several splits"),
        ("s", {"format": {"delimiter": ";"}}, "s is a saved data set of several splits"),
    ],
)  # fmt: skip
def test_what_a_source_cannot_have_is_refused(tmp_path, name, keys, said):
    written(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "b"}\n')
    saved(tmp_path / "s", train=4, test=2)
    task = IMAGE if name == "digits" else TEXT
    for cache in (None, Cache(tmp_path / "cache", 0)):
        with pytest.raises(InputError, match=said):
            load(name if name == "digits" else tmp_path / name, task, cache, **keys)
