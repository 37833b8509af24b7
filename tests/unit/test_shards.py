"""Shards of webdataset are read as the records that were written to them."""

from __future__ import annotations

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from fedpeft.config import DataConfig
from fedpeft.data import source
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
