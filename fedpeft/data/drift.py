"""Drifting test streams as versioned manifests: which image, corruption, severity, noise seed and label at each place.

A manifest is JSON-ready and complete: the same one gives the same pixels everywhere, checked by hash (pixels are
rounded to 1/255 first). A `TestStream` is what comes of it; methods are given its inputs only.

    >>> plan = manifest(StreamSpec("iid", corruptions=("blur", "fog"), batch=100, limit=150))
    >>> stream = load(plan)
    >>> len(stream), stream.rows, stream.domains[0], [len(stream.labels[part]) for part in stream.parts]
    (4, 300, 'blur-5', [100, 50, 100, 50])
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft import registry, seeds
from fedpeft.data.corruptions import CLEAN, CORRUPTIONS, corrupt_image
from fedpeft.data.digits import Digits
from fedpeft.data.records import Records
from fedpeft.errors import InputError

VERSION = 1
TRAIN = 1000  # records of digits that source models train on; the other 797 make the streams
KINDS = {
    "iid": "each corruption once, images shuffled",
    "gradual": "severities 1 2 3 4 5 4 3 2 1 of each corruption, images dealt over them",
    "mixed": "all corruptions shuffled together",
    "dirichlet": "each corruption once, labels in bursts (Dirichlet `delta` over time slots)",
    "label_shift": "as iid, classes thinned to a long tail (`shift`, `ratio`)",
    "recurring": "iid `passes` times over, in the same order of corruptions",
    "clean_tail": "iid, then the clean images: what was forgotten",
}
COLUMNS = ("image", "corruption", "severity", "noise", "label")


@dataclass(frozen=True)
class StreamSpec:
    """What a stream of digits-C is made from.

    Attributes:
        batch: rows in a batch; batches end where a domain ends (not in `mixed`).
        corruptions: in order; None is all.
        delta: of `dirichlet`; smaller is burstier.
        shift: of `label_shift`: forward (class 0 most frequent), uniform, or backward.
        ratio: of `label_shift`: most to least frequent class.
        limit: use only so many test images.
    """

    kind: str = "iid"
    severity: int = 5
    batch: int = 64
    seed: int = 0
    corruptions: tuple[str, ...] | None = None
    passes: int = 8
    delta: float = 0.05
    shift: str = "uniform"
    ratio: float = 20.0
    limit: int | None = None


@dataclass(frozen=True)
class TestStream:
    """A materialised stream.

    Attributes:
        inputs: what a model takes, each [rows, ...].
        labels: int64 [rows]; for scoring only.
        domains: name of each row's domain; for scoring only.
        parts: the batches, as slices.
    """

    name: str
    inputs: dict[str, Tensor]
    labels: Tensor
    domains: list[str]
    parts: list[slice]

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def rows(self) -> int:
        """Number of rows in all batches together."""
        return len(self.labels)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Inputs only."""
        for part in self.parts:
            yield {name: value[part] for name, value in self.inputs.items()}


def manifest(spec: StreamSpec) -> dict[str, Any]:
    """The full plan of a stream, and the hashes of plan and pixels.

    Raises:
        InputError: an unknown kind, shift or corruption, or a batch outside 1 to 200.
    """
    if spec.kind not in KINDS:
        raise InputError(registry.unknown("stream", spec.kind, KINDS))
    if spec.shift not in ("forward", "uniform", "backward"):
        raise InputError(registry.unknown("shift", spec.shift, ("forward", "uniform", "backward")))
    if not 1 <= spec.batch <= 200:
        raise InputError(f"batch: {spec.batch} is out of range; allowed: 1 to 200.")
    names = list(spec.corruptions or CORRUPTIONS)
    labels = _test_set().labels[: spec.limit]
    domains = [(images, name, severity) for images, name, severity in _plan_domains(spec, names, labels)]
    items = [
        (int(image), name, severity if name != CLEAN else 0) for images, name, severity in domains for image in images
    ]
    ends = np.cumsum([len(images) for images, _, _ in domains])
    if spec.kind == "mixed":
        items = [items[place] for place in seeds.numpy_generator(spec.seed, "drift", "mixed").permutation(len(items))]
        ends = np.array([len(items)])
    noise = seeds.numpy_generator(spec.seed, "drift", "noise").integers(2**32, size=len(items))
    batches = [
        min(spec.batch, int(end) - start)
        for first, end in zip([0, *ends[:-1]], ends, strict=True)
        for start in range(int(first), int(end), spec.batch)
    ]
    plan: dict[str, Any] = {
        "version": VERSION,
        "source": "digits",
        "source_sha256": _test_set().fingerprint,
        "spec": asdict(spec),
        "image": [item[0] for item in items],
        "corruption": [item[1] for item in items],
        "severity": [item[2] for item in items],
        "noise": noise.tolist(),
        "label": [int(labels[item[0]]) for item in items],
        "batches": batches,
    }
    plan["spec"]["corruptions"] = names
    plan["plan_sha256"] = plan_hash(plan)
    plan["pixels_sha256"] = hashlib.sha256(_render_pixels(plan).tobytes()).hexdigest()
    return plan


def load(plan: dict[str, Any]) -> TestStream:
    """The stream of a manifest.

    Raises:
        InputError: another version, another data set, or a plan or pixels that do not fit their hash.
    """
    if plan.get("version") != VERSION:
        raise InputError(f"manifest: version {plan.get('version')} is not known; this is version {VERSION}.")
    if plan["source_sha256"] != _test_set().fingerprint:
        raise InputError("manifest: it was made from other images than this installation's digits.")
    if plan["plan_sha256"] != plan_hash(plan):
        raise InputError("manifest: the plan does not fit its hash; it was changed after it was made.")
    pixels = _render_pixels(plan)
    if plan["pixels_sha256"] != hashlib.sha256(pixels.tobytes()).hexdigest():
        raise InputError("manifest: the pixels do not fit their hash: the corruptions are others than they were.")
    ends = np.cumsum(plan["batches"]).tolist()
    domains = [
        name if name == CLEAN else f"{name}-{severity}"
        for name, severity in zip(plan["corruption"], plan["severity"], strict=True)
    ]
    return TestStream(
        plan["spec"]["kind"],
        {"pixel_values": torch.from_numpy(pixels.astype(np.float32) / 255)[:, None]},
        torch.tensor(plan["label"]),
        domains,
        [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)],
    )


def build(kind: str = "iid", **options: Any) -> TestStream:
    """The stream of a `StreamSpec`."""
    return load(manifest(StreamSpec(kind, **options)))


def _plan_domains(spec: StreamSpec, names: list[str], labels: np.ndarray) -> Iterator[tuple[np.ndarray, str, int]]:
    """Image numbers, corruption and severity of each domain, in order."""

    def shuffled(*path: str | int) -> np.ndarray:
        return seeds.numpy_generator(spec.seed, "drift", spec.kind, *path).permutation(len(labels))

    for turn in range(spec.passes if spec.kind == "recurring" else 1):
        for name in names:
            order = shuffled(turn, name)
            if spec.kind == "gradual":
                for step, part in enumerate(np.array_split(order, 9)):
                    yield part, name, 1 + min(step, 8 - step)
                continue
            draws = seeds.numpy_generator(spec.seed, "drift", spec.kind, turn, name, "labels")
            if spec.kind == "dirichlet":
                order = order_in_bursts(order, labels, spec.delta, draws)
            if spec.kind == "label_shift":
                order = order[thin_classes(labels[order], spec.shift, spec.ratio)]
            yield order, name, spec.severity
    if spec.kind == "clean_tail":
        yield shuffled(CLEAN), CLEAN, 0


def order_in_bursts(order: np.ndarray, labels: np.ndarray, delta: float, draws: np.random.Generator) -> np.ndarray:
    """The same images with labels in bursts: each class is dealt over as many time slots as there are classes; within a
    slot class follows class, in random order."""
    classes = np.unique(labels)
    slots: list[list[np.ndarray]] = [[] for _ in classes]
    for label in classes:
        members = order[labels[order] == label]
        cuts = np.round(np.cumsum(draws.dirichlet(np.full(len(classes), delta)))[:-1] * len(members)).astype(int)
        for slot, part in zip(slots, np.split(members, cuts), strict=True):
            slot.append(part)
    return np.concatenate([slot[place] for slot in slots for place in draws.permutation(len(slot))])


def thin_classes(labels: np.ndarray, shift: str, ratio: float) -> np.ndarray:
    """Places [M] that leave class k about the share ratio^(-k / (K-1)) of its records (mirrored for backward)."""
    classes = int(labels.max()) + 1
    share = ratio ** (-np.arange(classes) / max(1, classes - 1))
    if shift == "uniform":
        share = np.full(classes, share.mean())
    if shift == "backward":
        share = share[::-1]
    kept = [np.flatnonzero(labels == label) for label in range(classes)]
    return np.sort(
        np.concatenate(
            [places[: max(1, round(share[label] * len(places)))] for label, places in enumerate(kept) if len(places)]
        )
    )


def _render_pixels(plan: dict[str, Any]) -> np.ndarray:
    """uint8 [rows, H, W]."""
    images = np.asarray(_test_set().inputs)[..., 0]
    rows = zip(*(plan[name] for name in COLUMNS[:4]), strict=True)
    made = [
        corrupt_image(images[image], name, severity, np.random.default_rng(noise))
        for image, name, severity, noise in rows
    ]
    # Whole numbers, as last bits of floats differ between processors and the hash would too.
    return np.round(np.stack(made) * 255).astype(np.uint8)


def plan_hash(plan: dict[str, Any]) -> str:
    """sha256 of all that a manifest says, the hashes of plan and inputs left out."""
    body = {key: value for key, value in plan.items() if not key.endswith("_sha256") or key == "source_sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@cache
def split_digits() -> tuple[Records, Records]:
    """1,000 digits to train on and 797 to stream, about 80 of a class: more than a batch of 64 in one burst."""
    from sklearn.model_selection import train_test_split

    train, test = Digits().load()
    kept, moved = train_test_split(np.arange(len(train)), train_size=TRAIN, stratify=train.labels, random_state=0)
    more = train.take(np.sort(moved))
    test = replace(
        test,
        inputs=np.concatenate([np.asarray(test.inputs), np.asarray(more.inputs)]),
        labels=np.concatenate([test.labels, more.labels]),
    )
    return train.take(np.sort(kept)), test


def _test_set() -> Records:
    return split_digits()[1]
