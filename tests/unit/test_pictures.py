"""Pictures of every mode, from every kind of source: their greys, colours, transparency and orientation are kept."""

from __future__ import annotations

import io
import json

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessor

from fedpeft.config import DataConfig
from fedpeft.data import pictures, source
from fedpeft.data.encode import encode
from fedpeft.errors import InputError

SIDE = 12
RAMP = np.tile(np.linspace(0, 255, SIDE).astype(np.uint8), (SIDE, 1))


def saved(picture, kind="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def column(*values, tmp_path=None):
    return pictures.read_column(list(values), "d.csv: column image", tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_greys(kind):
    read = column(saved(Image.fromarray(RAMP.astype(np.uint16) * 257), kind))
    assert read.dtype == np.uint8 and np.array_equal(read[0, ..., 0], RAMP)


def test_fractions_stay_fractions_and_whole_pictures_beside_them_become_fractions():
    fractions = saved(Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF")
    read = column(fractions, saved(Image.fromarray(RAMP)))
    assert read.dtype == np.float32
    np.testing.assert_allclose(read[0], read[1], atol=1e-6)
    np.testing.assert_allclose(read[0, ..., 0], RAMP / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("picture", "kind", "said"),
    [
        (Image.fromarray(RAMP.astype(np.int32) * 200), "TIFF", "mode I "),
        (Image.fromarray(RAMP.astype(np.float32)), "TIFF", "from 0 to 255; allowed are 0 to 1"),
        (Image.fromarray((RAMP / 128 - 1).astype(np.float32)), "TIFF", "from -1 to"),
        (Image.new("LAB", (8, 8)), "TIFF", "mode LAB"),
    ],
)
def test_what_has_no_fixed_white_is_refused_by_record_and_mode(picture, kind, said):
    good = saved(Image.fromarray(RAMP))
    with pytest.raises(InputError, match=f"column image: record 2 .*{said}"):
        column(good, saved(picture, kind))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (RAMP // 255, "above 1 "),
        (RAMP // 17, "above 15 "),
        ((RAMP.astype(np.uint16) * 16), "above 16 "),
    ],
)
def test_ranges_that_are_almost_black_are_refused(values, said):
    with pytest.raises(InputError, match=f"{said}.*Bring them to 0 to 255"):
        column(saved(Image.fromarray(values)), saved(Image.fromarray(values)))
    column(saved(Image.fromarray(values)), saved(Image.fromarray(RAMP)))  # one dark picture among others is a picture
    column(saved(Image.new("L", (4, 4))))  # and so is a black one
    assert column(saved(Image.fromarray(RAMP > 99)))[0].max() == 255  # one bit has its white


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_shows_on_white(mode):
    alpha = np.zeros((SIDE, SIDE), np.uint8)
    alpha[3:9, 3:9] = 255
    ground = [Image.new("L", (SIDE, SIDE))] * (len(mode) - 1)
    read = column(saved(Image.merge(mode, [*ground, Image.fromarray(alpha)])))[0]
    assert read.shape == (SIDE, SIDE, 1 if mode == "LA" else 3)
    assert np.array_equal(read[..., 0], 255 - alpha)


def test_half_transparent_is_half_white_and_palettes_have_their_colours():
    read = column(saved(Image.new("RGBA", (4, 4), (200, 0, 0, 128))))[0]
    assert np.abs(read[0, 0].astype(int) - [227, 127, 127]).max() <= 1
    palette = Image.new("RGB", (4, 4), (10, 200, 30)).quantize()
    assert column(saved(palette))[0, 0, 0].tolist() == [10, 200, 30]
    clear = Image.new("P", (4, 4))
    clear.putpalette([0, 0, 0, 250, 0, 0])
    clear.putpixel((1, 1), 1)
    read = column(saved(clear, transparency=0))[0]
    assert read[0, 0].tolist() == [255] * 3 and read[1, 1].tolist() == [250, 0, 0]


def test_a_shape_that_white_swallows_is_refused():
    alpha = Image.fromarray(RAMP)
    with pytest.raises(InputError, match="cannot be seen"):
        column(saved(Image.merge("LA", [Image.new("L", alpha.size, 255), alpha])))


def oriented(turn=6):
    exif = Image.Exif()
    exif[0x0112] = turn
    return saved(Image.fromarray(np.stack([RAMP[:8]] * 3, axis=-1)), "JPEG", exif=exif, quality=100)


def test_every_kind_of_source_reads_what_datasets_reads(tmp_path):
    names = []
    for index in range(6):
        (tmp_path / "set" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        name = tmp_path / "set" / "ab"[index % 2] / f"{index}.jpg"
        name.write_bytes(oriented(1 + index))
        names.append(str(name))
    labels = [name.split("/")[-2] for name in names]
    (tmp_path / "d.csv").write_text("image,label\n" + "".join(f"{n},{k}\n" for n, k in zip(names, labels, strict=True)))
    made = datasets.Dataset.from_dict({"image": names, "label": labels}).cast_column("image", datasets.Image())
    made.save_to_disk(tmp_path / "disk")
    made.to_parquet(tmp_path / "d.parquet")
    expected = {label: [np.asarray(row["image"]) for row in made if row["label"] == label] for label in "ab"}
    for where in ("set", "d.csv", "disk", "d.parquet"):
        found = source.whole(str(tmp_path / where), "data.source", DataConfig(), "image-classification")
        for label in "ab":
            mine = [found.inputs[i] for i in range(len(found)) if found.label_names[found.labels[i]] == label]
            assert [array.shape for array in mine] == [array.shape for array in expected[label]], where
            assert all(np.array_equal(x, y) for x, y in zip(mine, expected[label], strict=True)), where


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (saved(Image.new("1", (15000, 12000))), "exceeds limit"),
        (b"no picture", "cannot identify"),
        (saved(Image.fromarray(RAMP))[:60], ""),
        (None, "there is none"),
        ({"bytes": None, "path": None}, "there is none"),
        (float("nan"), "there is none"),
        ("https://example.org/a.png", "is a URL"),
        ("nowhere.png", "nowhere.png"),
        (7, ""),
        ([[1, 2], [3]], ""),
        ([[300, 0]], "0 to 255"),
        ([["a"]], "expected numbers"),
        (np.zeros((2, 2, 2)), "shape"),
        (saved(Image.new("L", (2, 2)), "TIFF", save_all=True, append_images=[Image.new("L", (2, 2))]), "2 frames"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_record(value, said, tmp_path):
    with pytest.raises(InputError, match=f"record 2 is no picture.*{said}"):
        column(saved(Image.fromarray(RAMP)), value, tmp_path=tmp_path)


def test_photos_of_any_size_go_through_the_processor(tmp_path):
    rows = []
    for index in range(8):
        Image.new("RGB", (20 + 3 * index, 30), (index * 20, 90, 0)).save(tmp_path / f"{index}.png")
        rows.append(f"{index}.png,{'ab'[index % 2]}")
    (tmp_path / "d.csv").write_text("image,label\n" + "\n".join(rows))
    records = source.whole(str(tmp_path / "d.csv"), "data.source", DataConfig(), "image-classification")
    assert len(records.fingerprint) == 64 and len({array.shape for array in records.inputs}) == 8
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    pixels = encode(records, processor, "image-classification", 8).inputs["pixel_values"]
    alone = [
        processor(records.inputs[i], return_tensors="pt", input_data_format="channels_last")["pixel_values"][0]
        for i in range(8)
    ]
    assert pixels.shape == (8, 3, 16, 16) and all((x == y).all() for x, y in zip(pixels, alone, strict=True))
    with pytest.raises(InputError, match="differ in size: record 1 is 20x30, record 2 is 23x30"):
        encode(records, None, "image-classification", 8)
    with pytest.raises(InputError, match="processor does not bring"):
        encode(records, ViTImageProcessor(do_resize=False), "image-classification", 8)
    assert records.take(np.array([3, 1])).inputs[1].shape == (30, 23, 3)
    other = source.Records([*records.inputs[:7], records.inputs[0]], records.labels, records.label_names, {}, "image")
    assert other.fingerprint != records.fingerprint


def test_arrays_in_json_are_read_as_they_were(tmp_path):
    lines = [
        json.dumps({"image": (RAMP / 255).tolist() if index else RAMP.tolist(), "label": "ab"[index % 2]})
        for index in range(4)
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    read = source.whole(str(tmp_path / "d.jsonl"), "data.source", DataConfig(), "image-classification").inputs
    np.testing.assert_allclose(read[..., 0], np.stack([RAMP / 255] * 4), atol=1e-6)
