"""Streams of `fedpeft bench tta` by name: NAME:option=value,...; several with commas between.

digits-c/KIND   built in; KIND is a kind of `fedpeft.data.drift`
vader/PART, debian/en, glyphs/text, fashion-mnist       real records (`tta_real`), after `fedpeft data prepare`

>>> open_stream("digits-c/dirichlet:delta=0.1,severity=5").name
'digits-c/dirichlet:delta=0.1'
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.config import option
from fedpeft.data import drift
from fedpeft.data.corruptions import CORRUPTIONS
from fedpeft.data.drift import StreamSpec, TestStream
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from fedpeft.simulations.benchmarks import digits_c, tta_real
from fedpeft.simulations.benchmarks.cells import canonical, named
from fedpeft.simulations.benchmarks.tta_real import ImageOptions, RealImages, RealTexts, TextOptions
from fedpeft.tta.deployed import Deployed

QUICK: dict[str, dict[str, Any]] = {
    "digits-c": {"limit": 96, "corruptions": "gaussian+contrast"},
    "image": {"limit": 64, "train": 512, "corruptions": "gaussian+contrast"},
    "text": {"limit": 32, "train": 128},
}
QUICK_EPOCHS = 8


class Bench(Protocol):
    """A stream family: a plan, a stream and a source model for every seed."""

    name: str
    models: ClassVar[tuple[str, ...]]
    augment: ClassVar[str]  # kind of views that fits the inputs

    def manifest(self, seed: int) -> dict[str, Any]:
        """The full plan of the stream for a seed, as JSON-ready data with hashes."""

    def load(self, plan: dict[str, Any]) -> TestStream:
        """The stream of a manifest.

        Raises:
            InputError: the manifest was made by another version or of other data, or does not fit its hashes.
        """

    def source(self, model: str, seed: int, folder: Path) -> tuple[Deployed, Encoded]:
        """A source model and the records it was trained on; trained parts may be kept in `folder`."""


@dataclass
class DigitsOptions:
    """Options of digits-C; those that name a kind of stream have no effect on other kinds."""

    severity: int = option(5, "of the corruptions", low=1, high=5)
    batch: int = option(64, "rows in a batch; batches end where a domain ends", low=1, high=200)
    corruptions: str | None = option(None, "names with + between, in order; null is all")
    passes: int = option(8, "of recurring", low=1)
    delta: float = option(0.05, "of dirichlet; smaller is burstier", above=0)
    shift: str = option("uniform", "of label_shift", choices=("forward", "uniform", "backward"))
    ratio: float = option(20.0, "of label_shift: most to least frequent class", low=1)
    limit: int | None = option(None, "test images; null is all", low=10)
    imbalance: float = option(1.0, "most to least frequent class of the source model's data", low=1)


@dataclass
class DigitsC:
    """Digits under corruptions; source models take seconds and are made anew."""

    name: str
    kind: str
    options: DigitsOptions
    quick: bool = False
    models: ClassVar[tuple[str, ...]] = digits_c.MODELS
    augment: ClassVar[str] = "small_image"

    def manifest(self, seed: int) -> dict[str, Any]:
        given = dataclasses.asdict(self.options)
        del given["imbalance"]
        names = tuple(self.options.corruptions.split("+")) if self.options.corruptions else None
        for name in names or ():
            if name not in CORRUPTIONS:
                raise InputError(registry.unknown("--stream: corruptions", name, CORRUPTIONS))
        return drift.manifest(StreamSpec(self.kind, seed=seed, **{**given, "corruptions": names}))

    def load(self, plan: dict[str, Any]) -> TestStream:
        return drift.load(plan)

    def source(self, model: str, seed: int, folder: Path) -> tuple[Deployed, Encoded]:
        epochs = QUICK_EPOCHS if self.quick else None
        imbalance = self.options.imbalance
        return digits_c.source_model(model, seed, imbalance, epochs), digits_c.source_data(imbalance)


def open_stream(text: str, quick: bool = False) -> Bench:
    """The stream family of a name, small if `quick`; data are not read yet.

    Raises:
        InputError: an unknown family, kind, part or option, or an option out of bounds.
    """
    given, options = named(text)
    family, _, part = given.partition("/")
    if family == "digits-c":
        if part not in drift.KINDS:
            raise InputError(registry.unknown(f"--stream {given}: kind", part, drift.KINDS))
        digits: DigitsOptions = configs.build(DigitsOptions, {**_small(quick, "digits-c"), **options}, "--stream")
        return DigitsC(canonical(given, digits), part, digits, quick)
    parts = {"vader": tta_real.VADER, "debian": ("en",), "glyphs": ("text",), "fashion-mnist": ("",)}
    if family not in parts:
        raise InputError(
            registry.unknown(
                "--stream",
                given,
                [
                    *(f"digits-c/{kind}" for kind in drift.KINDS),
                    "vader/movie",
                    "debian/en",
                    "glyphs/text",
                    "fashion-mnist",
                ],
            )
        )
    for name in part.split("+"):
        if name not in parts[family]:
            raise InputError(registry.unknown(f"--stream {given}: part", name, parts[family]))
    if family in ("vader", "debian"):
        text_options: TextOptions = configs.build(TextOptions, {**_small(quick, "text"), **options}, "--stream")
        read = tta_real.vader if family == "vader" else tta_real.debian
        return RealTexts(canonical(given, text_options), partial(read, part), text_options, quick)
    image_options: ImageOptions = configs.build(ImageOptions, {**_small(quick, "image"), **options}, "--stream")
    tta_real.corruptions(image_options)
    draw = tta_real.glyphs if family == "glyphs" else tta_real.fashion
    return RealImages(canonical(given, image_options), partial(draw, part, image_options), image_options, quick)


def _small(quick: bool, family: str) -> dict[str, Any]:
    return dict(QUICK[family]) if quick else {}
