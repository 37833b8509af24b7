"""Records without labels: all of them are read, in an order that can be told from the answers, or none."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile

import datasets
import numpy as np
import pytest
from PIL import Image

from fedpeft.config import DataConfig
from fedpeft.data import source, tables
from fedpeft.data.unanswered import read_unanswered
from fedpeft.errors import InputError

IMAGE, TEXT = "image-classification", "sequence-classification"


def read(path, task=IMAGE, form=None, **splits):
    return read_unanswered(path, DataConfig(source="x"), task, ["a", "b"], form, splits)


def picture(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def placed(root, names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number))
    return root


def packed(path, folder):
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob("*")):
            tar.add(file, str(file.relative_to(folder)), recursive=False)
    return path


def files(records):
    return records.columns["file"].tolist()


def test_pictures_without_labels_are_read_by_their_names(tmp_path, caplog):
    folder = placed(tmp_path / "new", ["2.png", "1.PNG", "10.jpg"])
    (folder / "notes.md").write_text("of last week")
    (folder / "empty").mkdir()
    records = read(folder)
    assert files(records) == ["1.PNG", "10.jpg", "2.png"]
    for each, name in zip(records.inputs, files(records), strict=True):
        assert (np.asarray(each) == Image.open(folder / name)).all()
    assert "1 files of other endings" in caplog.text and "notes.md" in caplog.text
    (tmp_path / "tars").mkdir()
    for name in "ab":
        packed(tmp_path / "tars" / f"{name}.tar", folder)
    names = [f"{name}.tar/{file}" for name in "ab" for file in ("1.PNG", "10.jpg", "2.png")]
    assert files(read(tmp_path / "tars")) == names
    assert files(read(tmp_path / "tars" / "a.tar")) == ["1.PNG", "10.jpg", "2.png"]
    with pytest.raises(InputError, match="sub-folder per label"):  # training needs labels still
        source.load(DataConfig(source=str(folder)), IMAGE, 0)


def test_pictures_in_folders_shards_and_tables_have_their_names(tmp_path):
    folder = placed(tmp_path / "labels", ["b/1.png", "a/1.png"])
    assert files(read(folder)) == ["a/1.png", "b/1.png"]
    assert files(read(packed(tmp_path / "l.tar", folder))) == ["a/1.png", "b/1.png"]
    shard = placed(tmp_path / "shard", ["2.png", "1.png"])
    (shard / "1.cls").write_text("0")
    assert files(read(shard)) == files(read(packed(tmp_path / "s.tar", shard))) == ["1.png", "2.png"]
    (shard / "index.csv").write_text("image\n2.png\n1.png\n2.png\n")
    assert files(read(shard / "index.csv")) == ["2.png", "1.png", "2.png"]
    table = datasets.Dataset.from_dict({"image": [{"bytes": picture(0), "path": None}]})
    table.to_parquet(str(tmp_path / "bytes.parquet"))
    assert dict(read(tmp_path / "bytes.parquet").columns) == {}


def test_of_several_sets_one_is_named(tmp_path, caplog):
    folder = placed(tmp_path / "new", [f"{part}/{label}/{part}.png" for part in ("train", "val") for label in "ab"])
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", folder)
    for path in (folder, tmp_path / "packed.zip"):
        with pytest.raises(InputError, match=r"has a training set, .*train, and a test set, .*val\. Name one of them"):
            read(path)
        for key in ("train_split", "test_split"):
            assert [name.split("/")[-1] for name in files(read(path, **{key: "val"}))] == ["val.png"] * 2
        with pytest.raises(InputError, match=r"data\.test_split=dev: .* has no such folder"):
            read(path, test_split="dev")
    assert archive and files(read(folder / "train")) == ["a/train.png", "b/train.png"]
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("old", "new")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(InputError, match=r"no split named train; it has old, new\. Name one with data\.train_split"):
        read(tmp_path / "saved", TEXT)
    caplog.clear()
    assert list(read(tmp_path / "saved", TEXT, train_split="new").inputs) == ["new"]
    assert "1 other splits are not used: old (1)" in caplog.text
    with pytest.raises(InputError, match=r"data\.train_split=new and data\.test_split=old: one set of records"):
        read(tmp_path / "saved", TEXT, train_split="new", test_split="old")
    (tmp_path / "a.csv").write_text("text\nx\n")
    with pytest.raises(InputError, match=r"data\.train_split=new: .*a\.csv is a csv"):
        read(tmp_path / "a.csv", TEXT, train_split="new")


def test_damaged_members_of_an_archive_have_no_answer(tmp_path):
    path = tmp_path / "new.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(3):
            archive.writestr(f"{number}.png", picture(number))
    data = bytearray(path.read_bytes())
    data[data.find(picture(1)) + 60] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(
        InputError, match=r"1 members of the archive are damaged .*: 1\.png\. They would have no answer"
    ):
        read(path)


def test_half_a_character_in_a_word_is_named(tmp_path):
    (tmp_path / "new.jsonl").write_text(json.dumps({"tokens": ["a"]}) + "\n" + json.dumps({"tokens": ["a", "b\ud800"]}))
    with pytest.raises(InputError, match=r"column tokens: record 2 has half of a character \(\\ud800\)"):
        read(tmp_path / "new.jsonl", "token-classification")


def test_a_data_set_without_columns_is_named(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: datasets.Dataset.from_dict({}))
    with pytest.raises(InputError, match="none: a data set without columns"):
        tables.hub("none")
