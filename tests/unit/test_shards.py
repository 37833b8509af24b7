"""Shards of webdataset are read as the records that were written to them."""

from __future__ import annotations

import io
import json
import shutil
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image

from fedpeft.config import DataConfig
from fedpeft.data import shards, source, tables
from fedpeft.errors import InputError

IMAGE, TEXT = "image-classification", "sequence-classification"


def load(path, task=IMAGE, **keys):
    return source.load(DataConfig(source=str(path), **keys), task, 0)


def picture(seed, form="png"):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def pack(path, members):
    """A tar as webdataset writes it: no folders, a record's files beside each other."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def record(number, **more):
    return {f"{number:06d}.png": picture(number), **{f"{number:06d}.{end}": data for end, data in more.items()}}


@pytest.fixture
def plain(tmp_path):
    """The same twelve records as a csv with its pictures, for comparison."""
    folder = tmp_path / "plain"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.png").write_bytes(picture(number))
    rows = "".join(f"{number}.png,{'no' if number % 3 else 'yes'}\n" for number in range(12))
    (folder / "index.csv").write_text("image,label\n" + rows)
    return [part.fingerprint for part in load(folder / "index.csv")]


def named(number):
    return record(number, json=json.dumps({"label": "no" if number % 3 else "yes"}).encode())


def test_shards_are_one_table_in_the_order_of_their_names(tmp_path, plain):
    numbers = {"b-000001.tar": range(5, 12), "a-000000.tar": range(5)}
    for name, those in numbers.items():
        pack(tmp_path / "shards" / name, {end: data for number in those for end, data in named(number).items()})
    (tmp_path / "shards" / ".index").write_text("a hidden file")
    assert [part.fingerprint for part in load(tmp_path / "shards")] == plain
    one = pack(tmp_path / "one" / "one.tar", {end: data for n in reversed(range(12)) for end, data in named(n).items()})
    assert [part.fingerprint for part in load(one)] == plain
    shutil.unpack_archive(one, tmp_path / "unpacked")
    assert [part.fingerprint for part in load(tmp_path / "unpacked")] == plain


def test_classes_are_numbers_and_what_is_not_read_is_said(tmp_path):
    members = {}
    for number in range(12):
        members |= record(number, cls=f"{number % 11}\n".encode(), txt=b"a text")
        members |= {f"{number:06d}.seg.npy": b"..."}
    path = pack(tmp_path / "s" / "a.tar", members)
    data = source.load(DataConfig(source=str(path)), IMAGE, 0)[0]
    assert data.label_names == [str(number) for number in range(11)]  # 2 before 10, as numbers stand
    assert "12 files of other endings" in str(data.skipped[0]) and "000000.seg.npy" in str(data.skipped[0])


def test_texts_have_classes_too(tmp_path):
    texts = {
        f"{number}.{end}": data
        for number in range(8)
        for end, data in (("txt", f"the text {number}".encode()), ("cls", b"%d" % (number % 2)))
    }
    data = load(pack(tmp_path / "s" / "a.tar", texts), TEXT)
    assert sum(len(part) for part in data) == 8


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"cls": b"cat"}, "000000.cls: not readable as cls: expected the number of a class, found 'cat'"),
        ({"cls": b"-1"}, "expected the number of a class"),
        ({"cls": b"\xff"}, "000000.cls: not readable as cls"),
        ({"json": b"[1]"}, "000000.json: not readable as json: expected an object"),
        ({"json": b"{"}, "000000.json: not readable as json"),
        ({"json": b"[" * 100_000}, "000000.json: not readable as json"),
        ({"json": b'{"label": 1, "label": 0}'}, "the key 'label' is there twice"),
        ({"cls": b"1", "json": b'{"label": 2}'}, "000000.json is the column 'label' of its record a second time"),
        ({"cls": b"1", "jpg": picture(0, "jpeg")}, "is the column 'image' of its record a second time"),
    ],
)
def test_a_file_that_is_not_what_its_ending_says_is_named(tmp_path, more, said):
    path = pack(tmp_path / "s" / "a.tar", {**record(0, **more), **record(1, cls=b"1"), **record(2, cls=b"0")})
    with pytest.raises(InputError, match=r"^[^:]*a\.tar\b") as raised:
        load(path)
    assert said in str(raised.value) and "fedpeft-" not in str(raised.value)


def test_what_shards_cannot_have_is_refused(tmp_path):
    path = pack(tmp_path / "s" / "a.tar", {**record(0, cls=b"1"), **record(1, cls=b"0")})
    with pytest.raises(InputError, match=r"data\.train_split=train: .* is a shard"):
        load(path, train_split="train")
    (tmp_path / "s" / "b.tar").write_bytes(b"no tar")
    with pytest.raises(InputError, match=r"b\.tar: not readable as tar"):
        load(tmp_path / "s")
    (tmp_path / "s" / "b.tar").unlink()
    folders = {f"{part}/{label}/{n}.png": picture(n) for part in ("train", "test") for label in "ab" for n in range(3)}
    pack(tmp_path / "s" / "b.tar", folders)
    with pytest.raises(InputError, match=r"b\.tar has a test set in it"):
        load(tmp_path / "s")


def test_captions_in_folders_of_labels_are_no_shard(tmp_path):
    """LABEL/NAME stays what it is; the texts beside are left out and said."""
    for label in "ab":
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "photos" / label / f"{number}.png").write_bytes(picture(number))
            (tmp_path / "photos" / label / f"{number}.txt").write_text("a caption")
    data = load(tmp_path / "photos")[0]
    assert data.label_names == ["a", "b"] and "8 files of other endings" in str(data.skipped[0])


def saved(path, names, inside):
    """A tar of a saved data set of four texts, whose labels are numbers of these names."""
    kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names) if names else None}
    columns = {"text": [f"{path.stem}{n}" for n in range(4)], "label": [n % 2 for n in range(4)]}
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds) if names else None)
    made.save_to_disk(str(inside))
    return pack(path, {file.name: file.read_bytes() for file in inside.iterdir()})


def test_names_of_classes_are_those_of_all_shards(tmp_path):
    for name in "ab":
        saved(tmp_path / "s" / f"{name}.tar", ["no", "yes"], tmp_path / name)
    data = source.whole(str(tmp_path / "s"), "data.source", DataConfig(source=str(tmp_path / "s")), TEXT)
    assert data.label_names == ["no", "yes"] and data.labels.tolist() == [0, 1] * 4
    saved(tmp_path / "s" / "c.tar", ["yes", "no"], tmp_path / "c")
    with pytest.raises(
        InputError, match=r"column label are of the classes no, yes in a\.tar, and .* yes, no in c\.tar"
    ):
        load(tmp_path / "s", TEXT)
    saved(tmp_path / "s" / "c.tar", None, tmp_path / "plain")
    with pytest.raises(InputError, match=r"no, yes in a\.tar, and of no named classes in c\.tar"):
        load(tmp_path / "s", TEXT)


def placed(root, members):
    for name, content in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


LABELLED = {f"{label}/{number}.png": picture(number) for label in "ab" for number in range(4)}


@pytest.mark.parametrize(
    "stray",
    [
        {"logo.png": b"a logo", "logo.txt": b"by me"},
        {"cover.png": b"a cover", "cover.json": b"{}"},
        {"thesis.cls": b"\\NeedsTeXFormat"},
        {"a/thesis.cls": b"1"},
        {".git/x.cls": b"1", ".git/x.txt": b"x"},
        {"a/.0.cls": b"1"},
        {"__MACOSX/a/0.png": b"", "__MACOSX/a/0.cls": b"1"},
        {"a.cls/0.png": picture(9)},
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_stray_file_makes_no_shard_of_folders_of_labels(tmp_path, stray, packed):
    members = {**LABELLED, **stray}
    path = pack(tmp_path / "s.tar", members) if packed else placed(tmp_path / "s", members)
    table = tables.local(str(path)).train
    assert table.columns["label"][:4] == ["a"] * 4 and set(table.columns["label"]) <= {"a", "a.cls", "b"}
    assert len(table.columns["label"]) == 8 + ("a.cls/0.png" in stray)
    assert table.skipped or "a.cls/0.png" in stray  # what is left out is said


def test_the_file_of_a_table_is_read_before_what_lies_beside_its_pictures(tmp_path):
    rows = "".join(f"{number}.png,{'ab'[number % 2]}\n" for number in range(4))
    for more in ("json", "cls", "txt"):
        members = {f"{n}.{end}": data for n in range(4) for end, data in (("png", picture(n)), (more, b'{"label": 7}'))}
        path = pack(tmp_path / f"{more}.tar", {"index.csv": b"image,label\n" + rows.encode(), **members})
        table = tables.local(str(path)).train
        assert table.columns["label"] == list("abab") and table.where.endswith("index.csv")


def test_endings_are_found_in_capitals_and_hidden_files_are_no_part_of_a_shard(tmp_path):
    members = {"1.PNG": picture(1), "1.CLS": b"3", "a/2.PNG": picture(2), "a/2.CLS": b"4", ".x/3.cls": b"5"}
    table = tables.local(str(placed(tmp_path / "s", {**members, "a/.2.txt": b"x", "4.cls/note": b""}))).train
    assert table.columns["label"] == [3, 4] and list(table.columns) == ["label", "image"]
    assert [entry.examples for entry in table.skipped] == [("4.cls/note",)]


def test_names_with_more_dots_are_no_records_and_say_how_they_are_to_be(tmp_path):
    members = {f"img.{n}.{end}": b"1" for n in range(3) for end in ("png", "cls")}
    pack(tmp_path / "s" / "a.tar", record(0, cls=b"1"))
    path = pack(tmp_path / "s" / "b.tar", members)
    for given in (path, path.parent, placed(tmp_path / "unpacked", members)):
        with pytest.raises(InputError, match=r"no record in img\.0\.cls, img\.0\.png, .* up to its first dot"):
            load(given)


def test_a_byte_order_mark_is_no_part_of_what_a_shard_says(tmp_path):
    mark = "\ufeff".encode()
    members = {"0.txt": mark + b"text", "0.cls": mark + b"1", "1.txt": b"more", "1.json": mark + b'{"label": 0}'}
    assert tables.local(str(placed(tmp_path / "s", members))).train.columns == {
        "label": [1, 0],
        "text": ["text", "more"],
    }


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    placed(tmp_path / "s", LABELLED)

    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", closed)
    with pytest.raises(InputError, match=r"s: the folder cannot be read: Permission denied"):
        shards.are_in(tmp_path / "s")
