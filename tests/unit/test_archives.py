"""Zip and tar archives are read as the folder that was packed; hostile ones are refused, damaged members counted."""

from __future__ import annotations

import io
import os
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedpeft.config import DataConfig
from fedpeft.data import archives, source
from fedpeft.errors import InputError

IMAGE = "image-classification"


def load(path, **keys):
    return source.load(DataConfig(source=str(path), **keys), IMAGE, 0)


@pytest.fixture
def folder(tmp_path):
    draws = np.random.default_rng(0)
    for part, count in {"train": 6, "val": 2}.items():
        for label in "ab":
            (tmp_path / "photos" / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = draws.integers(0, 256, (8, 8 + number, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / part / label / f"{number}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar"])
@pytest.mark.parametrize("top", [True, False])
def test_an_archive_is_read_as_its_folder(tmp_path, folder, kind, top):
    whole = load(folder)
    inside = {"root_dir": tmp_path, "base_dir": "photos"} if top else {"root_dir": folder}
    path = shutil.make_archive(str(tmp_path / "packed"), kind, **inside)
    shutil.rmtree(folder)
    parts = load(path)
    assert [part.fingerprint for part in parts] == [part.fingerprint for part in whole] and len(parts[1]) == 4
    assert "val/" in str(parts[0].skipped) and str(path) in str(parts[0].skipped)
    assert len(load(path, train_split="val", test_split="train")[1]) == 12


def test_a_csv_names_the_pictures_beside_it_and_none_outside(tmp_path, folder):
    names = sorted(str(path.relative_to(folder)) for path in folder.glob("*/*/*.png"))
    rows = "".join(f"{name},{name.split('/')[1]}\n" for name in names)
    (folder / "index.csv").write_text("image,label\n" + rows)
    whole = load(folder / "index.csv")
    path = shutil.make_archive(str(tmp_path / "packed"), "zip", folder)
    assert [part.fingerprint for part in load(path)] == [part.fingerprint for part in whole]
    shutil.copy(folder / names[0], tmp_path / "secret.png")
    (folder / "index.csv").write_text(f"image,label\n{rows}{tmp_path / 'secret.png'},a\n")
    path = shutil.make_archive(str(tmp_path / "packed"), "zip", folder)
    with pytest.raises(
        InputError, match=r"packed\.zip/index\.csv: column image: record 17 is no picture.*there is none"
    ):
        load(path)


def test_damaged_members_are_counted(tmp_path, folder):
    path = shutil.make_archive(str(tmp_path / "packed"), "zip", folder)
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("train/a/3.png").header_offset + 60
    data = bytearray(Path(path).read_bytes())
    data[place] ^= 255
    Path(path).write_bytes(data)
    train, _ = load(path)
    assert len(train) == 11 and "1 members of the archive are damaged and left out: train/a/3.png" in str(
        train.skipped[0]
    )
    path = shutil.make_archive(str(tmp_path / "packed"), "tar", folder)
    with tarfile.open(path) as archive:
        last = max(archive.getmembers(), key=lambda member: member.offset)
    os.truncate(path, last.offset_data + 3)
    train, test = load(path)
    assert len(train) + len(test) == 15 and "damaged" in str(train.skipped[0])


def hostile(path, name, kind=None):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            member = zipfile.ZipInfo(name)
            member.external_attr = ((stat.S_IFLNK if kind else stat.S_IFREG) | 0o644) << 16
            archive.writestr(member, "/etc/passwd")
        return
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo(name)
        member.size = 0 if kind else 11
        member.type, member.linkname = kind or tarfile.REGTYPE, "/etc/passwd"
        archive.addfile(member, io.BytesIO(b"/etc/passwd"))


@pytest.mark.parametrize("name", ["../a/x.png", "a/../../x.png", "/tmp/a/x.png", "a\\..\\x.png", "C:/a/x.png"])
@pytest.mark.parametrize("end", ["zip", "tar"])
def test_members_outside_are_refused(tmp_path, name, end):
    hostile(tmp_path / f"x.{end}", name)
    with pytest.raises(InputError, match="would lie outside"):
        load(tmp_path / f"x.{end}")


@pytest.mark.parametrize(
    ("end", "kind"), [("zip", "link"), ("tar", tarfile.SYMTYPE), ("tar", tarfile.LNKTYPE), ("tar", tarfile.FIFOTYPE)]
)
def test_links_and_devices_are_refused(tmp_path, end, kind):
    hostile(tmp_path / f"x.{end}", "a/x.png", kind)
    with pytest.raises(InputError, match="is a link or device"):
        load(tmp_path / f"x.{end}")


def test_what_is_too_large_or_no_archive_is_refused(tmp_path, folder, monkeypatch):
    path = shutil.make_archive(str(tmp_path / "packed"), "gztar", folder)
    monkeypatch.setattr(archives, "LARGEST", 3000)
    with pytest.raises(InputError, match=r"packed\.tar\.gz: more than .* Unpack it, and name the folder"):
        load(path)
    for end in ("zip", "tar", "tgz"):
        (tmp_path / f"no.{end}").write_bytes(b"no archive at all")
        with pytest.raises(InputError, match=rf"no\.{end}: not readable as"):
            load(tmp_path / f"no.{end}")
        with pytest.raises(InputError, match=r"data\.source: no file or folder"):
            load(tmp_path / f"there.{end}")


def test_names_that_no_folder_can_hold_are_refused(tmp_path):
    for number, (name, said) in enumerate({"a/" + "x" * 300: "too long", "a/\udce9.png": "not UTF-8"}.items()):
        hostile(tmp_path / f"{number}.tar", name)
        with pytest.raises(InputError, match=said):
            load(tmp_path / f"{number}.tar")
    for number, names in enumerate((["a", "a/b.png"], ["a/b.png", "a"], ["a/b.png", "a/b.png"])):
        with tarfile.open(tmp_path / f"twice{number}.tar", "w") as archive:
            for name in names:
                archive.addfile(tarfile.TarInfo(name))
        with pytest.raises(InputError, match="two members have the name"):
            load(tmp_path / f"twice{number}.tar")
