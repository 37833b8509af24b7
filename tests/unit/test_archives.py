"""Zip and tar archives are read as the folder that was packed; hostile ones are refused, damaged members counted."""

from __future__ import annotations

import io
import json
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


@pytest.mark.parametrize("top", [True, False])
def test_a_file_in_an_archive_is_read_as_the_file(tmp_path, folder, top):
    pictures = Path(shutil.move(folder / "train" / "a", tmp_path / "pictures"))
    names = sorted(path.name for path in pictures.iterdir())
    rows = "".join(f"{name};{'ab'[number % 2]}\n" for number, name in enumerate(names * 2))
    (pictures / "index.csv").write_text("image;label\n" + rows)
    form = {"format": {"delimiter": "semicolon"}}
    whole = load(pictures / "index.csv", **form)
    inside = {"root_dir": tmp_path, "base_dir": "pictures"} if top else {"root_dir": pictures}
    path = shutil.make_archive(str(tmp_path / "packed"), "zip", **inside)
    assert [part.fingerprint for part in load(path, **form)] == [part.fingerprint for part in whole]
    assert [part.fingerprint for part in load(path, test=path, **form)][1] == load(path, test=path, **form)[
        0
    ].fingerprint
    for split in ("train_split", "test_split"):
        with pytest.raises(InputError, match=rf"data\.{split}=val: .*packed\.zip.*index\.csv is a csv or tsv file"):
            load(path, **form, **{split: "val"})
    held = archives.hold({"image": names * 3, "other": ["x"]}, pictures)
    assert len({id(value["bytes"]) for value in held["image"]}) == len(names) and held["other"] == ["x"]


def test_the_format_of_a_file_is_none_of_an_archive_of_pictures(tmp_path, folder):
    path = shutil.make_archive(str(tmp_path / "packed"), "zip", folder)
    form = {"format": {"delimiter": "semicolon"}}
    with pytest.raises(InputError, match=r"data\.format=.*packed\.zip is a folder of pictures"):
        load(path, **form)
    (tmp_path / "index.csv").write_text(
        "image;label\n" + "".join(f"photos/train/{label}/1.png;{label}\n" for label in "ab")
    )
    assert len(load(tmp_path / "index.csv", test=path, **form)[1]) == 4


def test_a_file_that_names_no_file_that_can_be_is_refused_by_record(tmp_path, folder):
    for number, name in enumerate(("x" * 5000 + ".png", "a\0b.png", "train/a/" + "y" * 300)):
        rows = [{"image": f"train/{label}/0.png", "label": label} for label in "ab"] + [{"image": name, "label": "a"}]
        (folder / "index.jsonl").write_text("\n".join(map(json.dumps, rows)))
        path = shutil.make_archive(str(tmp_path / f"{number}"), "zip", folder)
        with pytest.raises(InputError, match=r"index\.jsonl: column image: record 3 is no picture.*there is none"):
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


def test_folders_count_as_members(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST", 20)
    for number, names in enumerate(([f"a{n}/" for n in range(21)], ["a/"] * 21, [f"{n}/b/c/x.png" for n in range(6)])):
        with (
            tarfile.open(tmp_path / f"{number}.tar", "w") as archive,
            zipfile.ZipFile(tmp_path / f"{number}.zip", "w") as z,
        ):
            for name in names:
                member = tarfile.TarInfo(name.rstrip("/"))
                member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
                archive.addfile(member)
                z.writestr(name, "")
        for end in ("tar", "zip"):
            with pytest.raises(InputError, match="more than 2 GB or 20 members"):
                load(tmp_path / f"{number}.{end}")


def header(kind, size, name="a"):
    made = tarfile.TarInfo(name)
    made.type, made.size = kind, size
    return made.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("kind", archives.EXTENDED)
@pytest.mark.parametrize("before", [b"", header(tarfile.REGTYPE, 0, "a/x.png")])
def test_large_headers_are_not_read(tmp_path, monkeypatch, kind, before):
    read = []
    monkeypatch.setattr(tarfile.TarInfo, "_proc_pax", lambda *_: read.append(1))
    monkeypatch.setattr(tarfile.TarInfo, "_proc_gnulong", lambda *_: read.append(1))
    (tmp_path / "x.tar").write_bytes(before + header(kind, archives.HEADER + 1) + b"\0" * 2048)
    with pytest.raises(InputError, match=r"x\.tar: headers of more than 1 MB"):
        load(tmp_path / "x.tar")
    assert not read


def test_many_headers_a_sparse_file_and_headers_upon_headers_are_refused(tmp_path, folder, monkeypatch):
    (tmp_path / "x.tar").write_bytes(header(tarfile.GNUTYPE_SPARSE, 0) + b"\0" * 2048)
    with pytest.raises(InputError, match="the member a is a sparse file"):
        load(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes((header(tarfile.XHDTYPE, 512) + b"\0" * 512) * 3000)
    with pytest.raises(InputError, match=r"x\.tar: not readable as tar"):
        load(tmp_path / "x.tar")
    path = tmp_path / "y.tar"
    with tarfile.open(path, "w") as archive:  # the names' headers: beyond the 100 bytes that a plain one has room for
        for picture in sorted(folder.glob("*/*/*.png")):
            archive.add(picture, f"{'long' * 40}/{picture.relative_to(folder)}")
    assert len(load(path)[0]) == 12
    monkeypatch.setattr(archives, "HEADERS", 2000)
    with pytest.raises(InputError, match=r"y\.tar: headers of more than"):
        load(path)


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
