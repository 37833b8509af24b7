"""Photos in files: decoded when a batch asks, damaged ones counted, changed for training alone."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import CLIPImageProcessor, ViTImageProcessor

from fedpeft.clients.policy import Policy, Refused
from fedpeft.config import DataConfig, to_tree
from fedpeft.config import load as load_config
from fedpeft.data import images, photos, pictures, source
from fedpeft.data.augment import augment
from fedpeft.data.cache import Cache
from fedpeft.data.encode import encode
from fedpeft.deploy.envelope import own_config
from fedpeft.deploy.settings import Site, SiteData, SiteSettings
from fedpeft.deploy.site.worker import load_data
from fedpeft.errors import InputError

TASK = "image-classification"
PROCESSOR = ViTImageProcessor(size={"height": 8, "width": 8})


@pytest.fixture
def folder(tmp_path):
    """Twelve photos of two labels and of unequal size, some grey, some turned."""
    draws = np.random.default_rng(0)
    for number in range(12):
        place = tmp_path / "set" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = draws.integers(0, 256, (20 + number, 16, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels[..., 0] if number % 5 == 0 else pixels)
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 3 else 1
        picture.save(place / f"{number:02}.{'png' if number % 3 == 2 else 'jpg'}", exif=exif)
    return tmp_path / "set"


def whole(folder, cache=None, **options):
    return source.whole(str(folder), "data.source", DataConfig(**options), TASK, cache=cache)


def test_what_a_batch_decodes_is_what_reading_all_gives(folder, monkeypatch):
    records = whole(folder)
    values = [str(path) for label in "ab" for path in sorted((folder / label).iterdir())]
    wanted = pictures.read_column(values, "photos", folder)
    assert all(np.array_equal(mine, other) for mine, other in zip(records.inputs, wanted, strict=True))
    form = records.inputs.form
    assert (form.channels, form.fractions, form.size) == (3, False, None)
    assert (
        photos.look((folder / "b" / "03.jpg").read_bytes(), True).size
        == wanted[values.index(str(folder / "b" / "03.jpg"))].shape[:2]
    )
    kept = encode(records, PROCESSOR, TASK, 1)
    assert kept.stored.ready is not None
    monkeypatch.setattr(images, "FEW", 0)
    data = encode(records, PROCESSOR, TASK, 1)
    assert data.stored.ready is None
    rows = np.array([5, 0, 5, 11])
    pixels, labels = data.batch(rows)
    assert torch.equal(pixels["pixel_values"], kept.batch(rows)[0]["pixel_values"])
    assert labels.tolist() == records.labels[rows].tolist() and pixels["pixel_values"].shape == (4, 3, 8, 8)
    assert data.view(np.arange(0)).inputs["pixel_values"].shape == (0, 3, 8, 8)


def test_sharing_and_fingerprints_decode_nothing(folder, monkeypatch):
    records = whole(folder)
    data = encode(records, PROCESSOR, TASK, 1)
    monkeypatch.setattr(pictures, "read", None)
    part = records.take(np.array([3, 1]))
    assert len(records.fingerprint) == 64 and part.fingerprint != records.fingerprint
    assert data.view(np.array([2, 4])).labels.tolist() == records.labels[[2, 4]].tolist()
    (folder / "a" / "00.jpg").write_bytes((folder / "b" / "01.jpg").read_bytes())
    monkeypatch.undo()
    assert whole(folder).fingerprint != records.fingerprint


def test_damaged_files_are_counted_and_said_and_the_others_are_read(folder, caplog, tmp_path):
    good = whole(folder)
    data = (folder / "a" / "06.jpg").read_bytes()
    (folder / "a" / "99.jpg").write_bytes(data[: len(data) // 2])
    (folder / "b" / "98.png").write_bytes((folder / "b" / "05.png").read_bytes()[:200])
    (folder / "b" / "97.png").write_bytes(b"no picture")
    for cache in (None, Cache(tmp_path / "cache", 0), Cache(tmp_path / "cache", 0)):
        caplog.clear()
        records = whole(folder, cache)
        assert records.fingerprint == good.fingerprint and records.labels.tolist() == good.labels.tolist()
        assert [(note.count, note.total) for note in records.skipped] == [(3, 15)]
        assert "3 of 15 pictures are damaged and left out: record 7 (99.jpg: " in caplog.text
        assert "(97.png: no picture of a kind that Pillow knows), record 15 (98.png: " in caplog.text
    for path in folder.rglob("*.*"):
        path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="none of 15 pictures can be decoded: record 1 "):
        whole(folder)


def exif_beside(turn, tag, kind, value):
    """The EXIF of a camera, and an entry whose type is not that of its tag."""
    entries = [struct.pack("<HHI4s", tag, kind, 1, value), struct.pack("<HHIHH", 0x0112, 3, 1, turn, 0)]
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + b"".join(sorted(entries)) + struct.pack("<I", 0)


@pytest.mark.parametrize("turn", range(1, 10))
@pytest.mark.parametrize(("tag", "kind"), [(0x100, 2), (0x11A, 1), (0x110, 11), (0x128, 4)])
def test_a_photo_is_turned_by_its_orientation_whatever_else_its_exif_holds(tmp_path, turn, tag, kind):
    pixels = np.random.default_rng(turn).integers(0, 256, (24, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif_beside(turn, tag, kind, b"abc\x7f"))
    Image.fromarray(pixels).save(tmp_path / "b.jpg")
    as_stored = pictures.read(str(tmp_path / "b.jpg"))
    ways = [lambda a: a, np.fliplr, lambda a: a[::-1, ::-1], np.flipud, lambda a: a.transpose(1, 0, 2)]
    ways += [lambda a: np.rot90(a, -1), lambda a: a[::-1, ::-1].transpose(1, 0, 2), np.rot90, lambda a: a]
    wanted = ways[turn - 1](as_stored)
    assert np.array_equal(pictures.read(str(tmp_path / "a.jpg")), wanted)
    assert photos.look((tmp_path / "a.jpg").read_bytes(), True).size == wanted.shape[:2]


def test_a_picture_of_a_kind_that_is_not_read_is_still_refused(folder, tmp_path):
    Image.new("LAB", (8, 8)).save(folder / "a" / "x.tif")
    with pytest.raises(InputError, match="record 7 is no picture that can be read: mode LAB"):
        whole(folder)
    (folder / "a" / "x.tif").unlink()
    (tmp_path / "d.csv").write_text("image,label\nset/a/00.jpg,a\nset/a/nowhere.jpg,b\n")
    with pytest.raises(InputError, match=r"record 2 is no picture that can be read: .*nowhere\.jpg"):
        whole(tmp_path / "d.csv")


def test_almost_black_columns_are_refused_also_undecoded(tmp_path):
    for label in "ab":
        (tmp_path / "set" / label).mkdir(parents=True)
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) // 5).save(tmp_path / "set" / label / "x.png")
    with pytest.raises(InputError, match="above 12 where 255 is white"):
        whole(tmp_path / "set")


def test_changed_pictures_hang_on_seed_and_record_alone(folder):
    records = whole(folder, augment=["crop", "flip", "colour"])
    plain = encode(records, PROCESSOR, TASK, 1)
    data = plain.augmented(7)
    first = data.batch(np.arange(12))[0]["pixel_values"]
    order = np.array([11, 3, 3, 0])
    assert torch.equal(data.view(order).batch(np.arange(4))[0]["pixel_values"], first[order])
    assert all((one != other).any() for one, other in zip(first, plain.inputs["pixel_values"], strict=True))
    other = plain.augmented(8).batch(np.arange(12))[0]["pixel_values"]
    assert all((one != two).any() for one, two in zip(first, other, strict=True))
    assert torch.equal(plain.batch(order)[0]["pixel_values"], plain.inputs["pixel_values"][order])  # evaluation


def test_a_site_changes_its_pictures_as_the_coordinator_says(folder):
    tree = to_tree(load_config({}, {"data.augment": ["crop", "flip"], "data.holdout": 0.25, "run.seed": 3}))
    (folder.parent / "policy.yaml").write_text("unbounded: [max_epsilon, max_rounds, records]")
    site = Site(folder.parent, SiteSettings(data=SiteData(source=str(folder))))
    config = own_config(yaml.safe_dump(tree), site, Policy())
    assert config.data.augment == ["crop", "flip"] and config.data.source == str(folder)
    trained, held = load_data(config, "clinic", PROCESSOR)
    assert len(trained) == 9 and len(held) == 3
    pixels, plain = trained.augmented(7).inputs["pixel_values"], trained.inputs["pixel_values"]
    assert all((one != other).any() for one, other in zip(pixels, plain, strict=True))
    with pytest.raises(Refused, match=r"data\.augment: 'turn' is not known"):
        own_config(yaml.safe_dump({"data": {"augment": ["turn"]}}), site, Policy())


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_each_change_is_what_it_says(dtype):
    ramp = np.tile(np.arange(30, dtype=np.float32)[:, None, None] * 8, (1, 24, 3)) * [1.0, 0.5, 0.25]
    image = ramp.astype(np.uint8) if dtype == np.uint8 else (ramp / 255).astype(np.float32)
    seen = [augment(image, ["flip"], np.random.default_rng(seed)) for seed in range(40)]
    mirrored = image[:, ::-1]
    assert all(np.allclose(other, image, atol=1) or np.allclose(other, mirrored, atol=1) for other in seen)
    sided = image.copy()
    sided[:, :5] = 0
    flips = [
        not np.allclose(augment(sided, ["flip"], np.random.default_rng(seed)), sided, atol=1e-3) for seed in range(40)
    ]
    assert 8 < sum(flips) < 32
    parts = 0
    for seed in range(20):
        crop = augment(image, ["crop"], np.random.default_rng(seed))
        assert crop.shape == image.shape and crop.dtype == dtype
        rounding = 0 if dtype == np.uint8 else 1e-6  # of a mean of equal values
        assert image.min() - rounding <= crop.min() and crop.max() <= image.max() + rounding
        steps = np.diff(crop[:, 0, 0].astype(float))
        assert (steps >= -1e-6).all()  # the same way up
        parts += np.ptp(crop[..., 0]) < np.ptp(image[..., 0])
        colour = augment(image, ["colour"], np.random.default_rng(seed)).astype(float)
        assert not np.allclose(colour, image) and (np.diff(colour[:, 0].mean(-1)) >= -1).all()
    assert parts > 12  # some have all rows, and a part of the columns
    assert np.array_equal(augment(image, [], np.random.default_rng(0)), image)


def test_augmentation_is_for_pictures_and_by_known_names(tmp_path):
    with pytest.raises(InputError, match=r"data\.augment: 'flipp' is not known. Did you mean 'flip'"):
        load_config({}, {"data.augment": ["flipp"]})
    (tmp_path / "a.csv").write_text("text,label\na,x\nb,y\n")
    with pytest.raises(InputError, match=r"data\.augment=\['flip'\] is for pictures"):
        source.whole(str(tmp_path / "a.csv"), "data.source", DataConfig(augment=["flip"]), "sequence-classification")


@pytest.mark.parametrize(("mode", "pixels"), [("F", np.linspace(0, 1, 64)), ("L", np.arange(64) * 4)])
def test_pictures_have_the_type_and_the_largest_value_of_an_array(tmp_path, mode, pixels):
    picture = Image.fromarray(pixels.reshape(8, 8).astype(np.float32 if mode == "F" else np.uint8))
    for name in ("a.tif", "b.tif"):
        picture.save(tmp_path / name)
    opened, _, _ = photos.open_column(["a.tif", "b.tif"], "x", tmp_path)
    array = np.asarray(opened)
    assert opened.dtype == array.dtype == (np.float32 if mode == "F" else np.uint8)
    assert opened.max() == array.max() > 0.9


# Through a processor --------------------------------------------------------------------------------------------------


class Doubled(ViTImageProcessor):
    """One that does something else to the numbers."""

    def normalize(self, *arguments, **options):
        return 2 * super().normalize(*arguments, **options)


PROCESSORS = {
    "resized": PROCESSOR,
    "enlarged": ViTImageProcessor(
        size={"height": 30, "width": 41}, image_mean=[0.1, 0.2, 0.3], image_std=[0.3, 0.2, 0.9]
    ),
    "cropped": CLIPImageProcessor(size={"shortest_edge": 12}, crop_size={"height": 10, "width": 16}),
    "plain": ViTImageProcessor(size={"height": 8, "width": 8}, do_normalize=False),
    "bytes": ViTImageProcessor(size={"height": 8, "width": 8}, do_normalize=False, do_rescale=False),
    "its own": Doubled(size={"height": 8, "width": 8}),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pictures_are_processed_bit_for_bit_as_each_alone(name, channels, monkeypatch):
    draws, processor = np.random.default_rng(1), PROCESSORS[name]
    sizes = [(20, 16), (16, 20), (20, 16), (9, 14), (20, 16), (16, 20)]
    several = [draws.integers(0, 256, (*size, channels), dtype=np.uint8) for size in sizes]
    wanted = torch.cat(
        [
            processor([image.repeat(3 // channels, axis=2)], return_tensors="pt", input_data_format="channels_last")[
                "pixel_values"
            ].float()
            for image in several
        ]
    )
    assert (images.values_of(processor, 3) is None) == (name == "its own")
    for together in (2**25, 1500 * channels, 1):  # all, some, each by itself
        monkeypatch.setattr(images, "TOGETHER", together)
        assert torch.equal(images.encode_images(several, processor), wanted)
    assert torch.equal(images.encode_images(np.stack(several[::2][:1] * 3), processor), wanted[[0, 0, 0]])


def test_pictures_of_one_size_are_one_call(monkeypatch):
    calls = []

    class Counting(Doubled):
        def preprocess(self, given, *arguments, **options):
            calls.append(len(given))
            return super().preprocess(given, *arguments, **options)

    processor = Counting(size={"height": 8, "width": 8})
    images.encode_images([np.zeros((size, 9, 3), dtype=np.uint8) for size in (9, 12, 9, 9)], processor)
    assert sorted(calls) == [1, 3]


def test_a_processor_that_pads_is_left_to_itself():
    padding = ViTImageProcessor(size={"height": 8, "width": 8}, do_pad=True, pad_size={"height": 9, "width": 9})
    assert images.values_of(padding, 3) is None
    assert images.encode_images([np.full((4, 4, 3), 255, dtype=np.uint8)], padding)[0, 0, 8, 8] == 0
