"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747): grey 28x28 images of clothing, 60,000 and 10,000 for test."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.data.recipe import Package, Recipe, find_member, write_parts
from fedpeft.errors import InputError

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def idx(data: bytes) -> np.ndarray:
    """The array in a gzipped IDX file of bytes: 00 00 08, the number of axes, their sizes (big-endian), the values."""
    raw = gzip.decompress(data)
    if raw[:3] != b"\0\0\x08":
        raise InputError("not an IDX file of unsigned bytes.")
    shape = np.frombuffer(raw, dtype=">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def build(files: dict[str, Path], target: Path) -> dict[str, Any]:
    """Write the published training and test images as bytes, with class names for labels."""
    import pandas

    deb = files["dataset-fashion-mnist"]
    frames = []
    for part in ("train", "t10k"):
        images, labels = (idx(find_member(deb, f"/{part}-{what}-ubyte.gz")) for what in ("images-idx3", "labels-idx1"))
        frames.append(
            pandas.DataFrame(
                {"image": [image.tobytes() for image in images], "label": [CLASSES[label] for label in labels]}
            )
        )
    frame = pandas.concat(frames, ignore_index=True)
    counts = write_parts(target, frame, [row >= len(frames[0]) for row in range(len(frame))])
    return {"counts": counts, "classes": frame["label"].nunique(), "image_shape": [*images.shape[1:], 1]}


FASHION_MNIST = Recipe(
    summary="Fashion-MNIST, 60,000 + 10,000 grey 28x28 images, 10 classes",
    kind="image",
    license="MIT",
    sources=(
        Package(
            "debian",
            "dataset-fashion-mnist",
            "0.0~git20200523.55506a9-1",
            "dataset-fashion-mnist_*.deb",
            "39e172fe32dd318e",
        ),
    ),
    build=build,
)
