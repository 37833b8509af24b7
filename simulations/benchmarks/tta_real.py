"""Streams of real records for `fedpeft bench tta`: versioned manifests like those of digits-C (`fedpeft.data.drift`).

    vader/PART      sentiment, trained on PART (movie, or movie+nyt, ...); then the other kinds of text
    debian/en       archive sections of English descriptions; then the same items in six languages
    glyphs/text     characters, trained on text fonts; then display fonts, clean and corrupted
    fashion-mnist   garments; then corrupted

The first domain is held-out records like those trained on. Records of a stream are the data set's test split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from fedpeft import registry, seeds
from fedpeft.config import DataConfig, ModelConfig, option
from fedpeft.data.corruptions import CLEAN, CORRUPTIONS, corrupt_image
from fedpeft.data.drift import TestStream, order_in_bursts, plan_hash
from fedpeft.data.encode import Encoded, encode
from fedpeft.data.records import Records
from fedpeft.data.source import load, whole
from fedpeft.errors import InputError
from fedpeft.models import loading
from fedpeft.simulations.benchmarks import tta_sources
from fedpeft.tta.deployed import Deployed

VERSION = 1
IMAGES, TEXTS = "image-classification", "sequence-classification"
VADER = ("movie", "amazon", "tweets", "nyt")
LANGUAGES = ("da", "it", "fr", "de", "ja", "ru")
DISPLAY = "fonts-aenigma"  # the package of display fonts; the other four are of text fonts


@dataclass
class RealOptions:
    """Options of all streams of real data."""

    batch: int = option(64, "rows in a batch; batches end where a domain ends", low=1, high=200)
    limit: int | None = option(512, "records of a domain; null is all", low=2)
    delta: float | None = option(None, "labels in bursts, Dirichlet delta; null shuffles", above=0)
    train: int | None = option(None, "records that the source model trains on; null is all", low=2)


@dataclass
class ImageOptions(RealOptions):
    """Options of image streams, of which each corruption is a domain."""

    severity: int = option(3, "of the corruptions", low=1, high=5)
    corruptions: str | None = option(None, "names with + between, in order; null is all")


@dataclass
class TextOptions(RealOptions):
    """Options of text streams; batches are half as large as those of images."""

    batch: int = option(32, "rows in a batch; batches end where a domain ends", low=1, high=200)
    tokens: int = option(40, "longest text in tokens", low=4)


@dataclass(frozen=True)
class Domain:
    """A stretch of a stream: which records, under which corruption."""

    name: str
    pool: str
    corruption: str = CLEAN


@dataclass(frozen=True)
class Material:
    """What a stream is made of.

    Attributes:
        train: for the source model.
        pools: test records by name.
        parallel: pools hold the same items in the same order, so each domain draws the same ones.
    """

    train: Records
    pools: dict[str, Records]
    domains: list[Domain]
    parallel: bool = False

    @property
    def fingerprint(self) -> str:
        """SHA-256 over training records and all pools, with their names."""
        whole = [self.train.fingerprint, *(f"{name}:{pool.fingerprint}" for name, pool in self.pools.items())]
        return hashlib.sha256("\n".join(whole).encode()).hexdigest()


@dataclass
class Real:
    """One of these streams; its data are read when they are needed."""

    name: str
    read: Callable[[], Material]
    options: Any
    quick: bool = False

    @cached_property
    def material(self) -> Material:
        """The data, read at first use."""
        return self.read()

    def manifest(self, seed: int) -> dict[str, Any]:
        """The full plan of the stream for a seed, and the hashes of plan and inputs."""
        material, options = self.material, self.options
        columns: dict[str, list[int]] = {"domain": [], "record": [], "label": []}
        batches: list[int] = []
        for number, domain in enumerate(material.domains):
            pool = material.pools[domain.pool]
            draws = seeds.numpy_generator(seed, "real", "items", "" if material.parallel else domain.pool)
            chosen = draws.permutation(len(pool))[: options.limit]
            order = chosen[seeds.numpy_generator(seed, "real", "order", domain.name).permutation(len(chosen))]
            if options.delta is not None:
                order = order_in_bursts(
                    order, pool.labels, options.delta, seeds.numpy_generator(seed, "real", "labels", domain.name)
                )
            columns["domain"] += [number] * len(order)
            columns["record"] += order.tolist()
            columns["label"] += pool.labels[order].tolist()
            batches += [min(options.batch, len(order) - start) for start in range(0, len(order), options.batch)]
        noise = seeds.numpy_generator(seed, "real", "noise").integers(2**32, size=len(columns["label"]))
        plan: dict[str, Any] = {
            "version": VERSION,
            "source": self.name,
            "source_sha256": material.fingerprint,
            "seed": seed,
            "spec": asdict(options),
            "domains": [asdict(domain) for domain in material.domains],
            **columns,
            "noise": noise.tolist(),
            "batches": batches,
        }
        plan["plan_sha256"] = plan_hash(plan)
        plan["inputs_sha256"] = _hash(self.inputs(plan))
        return plan

    def load(self, plan: dict[str, Any]) -> TestStream:
        """The stream of a manifest.

        Raises:
            InputError: another version, other data, or a plan or inputs that do not fit their hash.
        """
        if plan.get("version") != VERSION:
            raise InputError(f"manifest: version {plan.get('version')} is not known; this is version {VERSION}.")
        if plan["source_sha256"] != self.material.fingerprint:
            raise InputError(f"manifest: it was made from other records than the {self.name} prepared here.")
        if plan["plan_sha256"] != plan_hash(plan):
            raise InputError("manifest: the plan does not fit its hash; it was changed after it was made.")
        made = self.inputs(plan)
        if plan["inputs_sha256"] != _hash(made):
            raise InputError("manifest: the inputs do not fit their hash: corruptions or tokenizer are others.")
        ends = np.cumsum(plan["batches"]).tolist()
        return TestStream(
            self.name,
            made,
            torch.tensor(plan["label"]),
            [plan["domains"][number]["name"] for number in plan["domain"]],
            [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)],
        )

    def trained_on(self, seed: int) -> Records:
        """Records of the source model: a draw of `train` of them."""
        train = self.material.train
        draws = seeds.numpy_generator(seed, "real", "train").permutation(len(train))
        return train.take(np.sort(draws[: self.options.train]))

    def inputs(self, plan: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What a model takes, each [rows, ...]."""
        raise NotImplementedError

    def source(self, model: str, seed: int, folder: Path) -> tuple[Deployed, Encoded]:
        """A source model and the records it was trained on; trained parts are kept in `folder`."""
        raise NotImplementedError


class RealImages(Real):
    """A stream of images [rows, 1, H, W] in [0, 1]; corruptions are drawn anew from the plan's noise."""

    models: ClassVar[tuple[str, ...]] = ("cnn",)
    augment: ClassVar[str] = "image"

    def inputs(self, plan: dict[str, Any]) -> dict[str, torch.Tensor]:
        pools = {name: np.asarray(pool.inputs)[..., 0] / 255 for name, pool in self.material.pools.items()}
        made = []
        for number, record, noise in zip(plan["domain"], plan["record"], plan["noise"], strict=True):
            domain = plan["domains"][number]
            made.append(
                corrupt_image(
                    pools[domain["pool"]][record],
                    domain["corruption"],
                    plan["spec"]["severity"],
                    np.random.default_rng(noise),
                )
            )
        pixels = np.round(np.stack(made) * 255).astype(np.uint8)  # as in a file: the same bits everywhere
        return {"pixel_values": torch.from_numpy(pixels.astype(np.float32) / 255)[:, None]}

    def source(self, model: str, seed: int, folder: Path) -> tuple[Deployed, Encoded]:
        if model not in self.models:
            raise InputError(registry.unknown("--models", model, self.models))
        records = self.trained_on(seed)
        data, epochs = encode(records, None, IMAGES, 1), 1 if self.quick else tta_sources.IMAGE_EPOCHS
        path = folder / f"{model}-seed{seed}.safetensors"
        return tta_sources.image_model(data, len(records.label_names), seed, path, epochs), data


class RealTexts(Real):
    """A stream of texts for a sentence encoder, of which a LoRA and the head are trained, or the head alone."""

    models: ClassVar[tuple[str, ...]] = ("lora", "head")
    augment: ClassVar[str] = "tokens"
    encoder: ClassVar[str] = "minilm"

    @cached_property
    def tokenizer(self) -> Any:
        """The encoder's tokenizer, read at first use."""
        config = ModelConfig(name=self.encoder, task=TEXTS, pooling="mean", max_length=self.options.tokens)
        return loading.load(config, 2, 0).processor

    def encoded(self, records: Records) -> Encoded:
        """Token ids and masks of the records, cut to `tokens`."""
        return encode(records, self.tokenizer, TEXTS, self.options.tokens)

    def inputs(self, plan: dict[str, Any]) -> dict[str, torch.Tensor]:
        pools = self.material.pools
        texts = [
            str(pools[plan["domains"][number]["pool"]].inputs[record])
            for number, record in zip(plan["domain"], plan["record"], strict=True)
        ]
        return self.encoded(Records(texts, np.array(plan["label"]), [], {}, "text")).inputs

    def source(self, model: str, seed: int, folder: Path) -> tuple[Deployed, Encoded]:
        records = self.trained_on(seed)
        data, epochs = self.encoded(records), 1 if self.quick else tta_sources.TEXT_EPOCHS
        path = folder / f"{model}-seed{seed}.safetensors"
        deployed = tta_sources.text_model(
            model, self.encoder, data, len(records.label_names), seed, path, self.options.tokens, epochs
        )
        return deployed, data


# What they are made of ------------------------------------------------------------------------------------------------


def vader(part: str) -> Material:
    """Sentiment of texts: trained on the domains in `part` (+ between them), then those and the others."""
    train, test = load(DataConfig(source="vader"), TEXTS, 0)
    own = part.split("+")
    pools = {name: test.take(np.flatnonzero(test.columns["domain"] == name)) for name in order(own)}
    return Material(
        train.take(np.flatnonzero(np.isin(train.columns["domain"], own))), pools, [Domain(name, name) for name in pools]
    )


def order(own: list[str]) -> list[str]:
    """Domains trained on, then the others."""
    return [*own, *(name for name in VADER if name not in own)]


def debian(part: str) -> Material:
    """Sections of package descriptions: trained on English, then the same packages in one language after another."""
    train, test = load(DataConfig(source="debian"), TEXTS, 0)
    pools = {"en": test}
    for language in LANGUAGES:
        config = DataConfig(source=f"debian/{language}", labels=train.label_names)
        pools[language] = whole(config.source, "--stream", config, TEXTS, test=True)
    return Material(train, in_common(pools, "source"), [Domain(name, name) for name in pools], parallel=True)


def in_common(pools: dict[str, Records], column: str) -> dict[str, Records]:
    """The items that all pools have, by `column`, in the same order."""
    first, *others = ([str(value) for value in pool.columns[column]] for pool in pools.values())
    items = sorted(set(first).intersection(*others))
    places = [{str(value): place for place, value in enumerate(pool.columns[column])} for pool in pools.values()]
    return {
        name: pool.take(np.array([place[item] for item in items]))
        for (name, pool), place in zip(pools.items(), places, strict=True)
    }


def glyphs(part: str, options: ImageOptions) -> Material:
    """Letters: trained on text fonts, then unseen fonts of that kind, display fonts, and these under corruptions."""
    train, test = load(DataConfig(source="glyphs"), IMAGES, 0)
    pools = {
        "text": test.take(np.flatnonzero(test.columns["package"] != DISPLAY)),
        "display": test.take(np.flatnonzero(test.columns["package"] == DISPLAY)),
    }
    corrupted = [Domain(f"display {name}", "display", name) for name in corruptions(options)]
    return Material(
        train.take(np.flatnonzero(train.columns["package"] != DISPLAY)),
        pools,
        [Domain("text", "text"), Domain("display", "display"), *corrupted],
    )


def fashion(part: str, options: ImageOptions) -> Material:
    """Pictures of clothes: trained on clean ones, then clean and corrupted test images."""
    train, test = load(DataConfig(source="fashion-mnist"), IMAGES, 0)
    corrupted = [Domain(name, "test", name) for name in corruptions(options)]
    return Material(train, {"test": test}, [Domain(CLEAN, "test"), *corrupted])


def corruptions(options: ImageOptions) -> list[str]:
    """Names of the corruptions in the order in which they come.

    Raises:
        InputError: there is no such corruption.
    """
    names = list(CORRUPTIONS) if options.corruptions is None else options.corruptions.split("+")
    for name in names:
        if name not in CORRUPTIONS:
            raise InputError(registry.unknown("--stream: corruptions", name, CORRUPTIONS))
    return names


def _hash(inputs: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in inputs.items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
