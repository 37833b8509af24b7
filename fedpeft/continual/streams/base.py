"""A stream file says its records, its network, and how the records fall into tasks.

A file defines `records(seed)`; the base class cuts the classes into tasks, or a file does so in `manifest`. The seed
chooses the order of classes or domains, and the records where there are more than are used or they are made; the
network is the same for every seed, as a downloaded one is.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedpeft import seeds
from fedpeft.config import Configured, DataConfig, ModelConfig
from fedpeft.continual import stream
from fedpeft.continual.stream import Stream
from fedpeft.data import source
from fedpeft.data.encode import Encoded, encode
from fedpeft.errors import InputError
from fedpeft.models import loading
from fedpeft.models.base import Base

HELD_OUT = 0.2  # share of the training set that validation takes


@dataclass(frozen=True)
class Prepared:
    """A stream, the frozen base for it, and the name endings of the layers to adapt (for `Plastic`); None there means
    the attention's query and value projections."""

    stream: Stream
    base: Base
    layers: list[str] | None


@dataclass(frozen=True)
class Material:
    """Records before they are cut into tasks.

    Attributes:
        domains: domain number of every training and test record, for domain streams.
        domain_names: names by that number.
        label_names: names by label, where classes have any.
    """

    train: Encoded
    test: Encoded
    base: Base
    layers: list[str] | None
    domains: tuple[np.ndarray, np.ndarray] | None = None
    domain_names: list[str] = field(default_factory=list)
    label_names: list[str] = field(default_factory=list)


class StreamSource(Configured):
    """Base of all streams.

    Attributes:
        name: as registered.
        summary: one line.
        scenario: one of `stream.SCENARIOS`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    scenario: str = "class"

    def records(self, seed: int) -> Material:
        """All records and the network."""
        raise NotImplementedError

    def manifest(self, found: Material, seed: int, **more: Any) -> dict[str, Any]:
        """Which records make which task: groups of classes, or one task a domain where there are domains."""
        if found.domains is not None:
            return domain_plan(self.name, found, seed, **more)
        groups = stream.group_classes(_count_classes(found), self.config.tasks, seed)
        labels = found.train.labels.numpy(), found.test.labels.numpy()
        return stream.plan(self.name, self.scenario, *labels, groups, seed, **more)

    def build(self, seed: int, validation: bool = False) -> Prepared:
        """The stream of a seed.

        Args:
            validation: test on a fifth of the training set, and leave the test set alone.
        """
        found = self._material_of(seed, validation)
        more = {"options": asdict(self.config), "validation": validation, "label_names": found.label_names}
        made = stream.build(self.manifest(found, seed, **more), found.train, found.test)
        return Prepared(made, found.base, found.layers)

    def load(self, path: Path) -> Prepared:
        """The stream of a saved manifest; its seed and its options count, not this object's.

        Raises:
            InputError: no manifest, one of another stream, or one of other records than these.
        """
        try:
            saved = json.loads(path.read_text())
            name, seed, validation, options = (saved[key] for key in ("name", "seed", "validation", "options"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not the manifest of a registered stream: {error}") from error
        if name != self.name:
            raise InputError(f"{path}: it is a manifest of the stream {name}, not of {self.name}.")
        found = type(self)(**options)._material_of(seed, validation)
        return Prepared(stream.load(path, found.train, found.test), found.base, found.layers)

    def _material_of(self, seed: int, validation: bool) -> Material:
        found = self.records(seed)
        return held_out(found, seed) if validation else found


def held_out(found: Material, seed: int) -> Material:
    """The same with a fifth of every class (of every domain) of the training set as the test set."""
    labels = found.train.labels.numpy()
    domains = np.zeros_like(labels) if found.domains is None else found.domains[0]
    chosen = np.zeros(len(labels), dtype=bool)
    rng = seeds.numpy_generator(seed, "stream", "validation")
    # Sorted: one generator draws for all, so their order is a part of what the seed means.
    for domain, label in sorted(set(zip(domains.tolist(), labels.tolist(), strict=True))):
        members = rng.permutation(np.flatnonzero((domains == domain) & (labels == label)))
        chosen[members[: round(HELD_OUT * len(members))]] = True
    kept, moved = np.flatnonzero(~chosen), np.flatnonzero(chosen)
    split = None if found.domains is None else (domains[kept], domains[moved])
    return replace(found, train=found.train.view(kept), test=found.train.view(moved), domains=split)


def domain_plan(name: str, found: Material, seed: int, **more: Any) -> dict[str, Any]:
    """One task for each domain, in an order drawn from the seed; every task has the classes of its records."""
    assert found.domains is not None
    train, test = found.domains
    order = seeds.numpy_generator(seed, "domains").permutation(len(found.domain_names)).tolist()
    labels = found.train.labels.numpy()
    tasks = [
        {
            "name": found.domain_names[domain],
            "classes": sorted(set(labels[train == domain].tolist())),
            "train": np.flatnonzero(train == domain).tolist(),
            "test": np.flatnonzero(test == domain).tolist(),
        }
        for domain in order
    ]
    for task in tasks:
        if not task["train"] or not task["test"]:
            raise InputError(
                f"stream {name}: the domain '{task['name']}' has {len(task['train'])} training and "
                f"{len(task['test'])} test records; both sets need some of each domain."
            )
    return {
        "version": stream.VERSION,
        "name": name,
        "scenario": "domain",
        "seed": seed,
        "classes": _count_classes(found),
        **more,
        "tasks": tasks,
    }


def load_labelled(
    data: DataConfig, model: ModelConfig, layers: list[str] | None, seed: int, column: str | None = None
) -> Material:
    """Records of any data set of `data.source`, as the model takes them.

    Args:
        column: natural column whose values are the domains.

    Raises:
        InputError: as `source.load` and `loading.load`; or there is no such column.
    """
    train, test = source.load(data, model.task, seed)
    domains, names = None, []
    if column is not None:
        if column not in train.columns or column not in test.columns:
            raise InputError(
                f"stream.column: '{data.source}' has no column '{column}'. It has: "
                f"{', '.join(train.columns) or 'none'}."
            )
        values = [part.columns[column].astype(str) for part in (train, test)]
        # Of both sets, so that a domain which one of them lacks is refused by its name, and not left out.
        names = sorted(set(values[0].tolist()) | set(values[1].tolist()))
        domains = (np.searchsorted(names, values[0]), np.searchsorted(names, values[1]))
    # With a head of seed 0: the network is one for all seeds of a stream.
    base = loading.load(model, len(train.label_names), 0)
    encoded = [encode(part, base.processor, model.task, model.max_length) for part in (train, test)]
    return Material(encoded[0], encoded[1], base, layers, domains, names, train.label_names)


def per_class(labels: np.ndarray, count: int, seed: int, purpose: str) -> np.ndarray:
    """Numbers of at most `count` records of each class, drawn from the seed, in their order."""
    rng = seeds.numpy_generator(seed, "stream", purpose)
    chosen = [rng.permutation(np.flatnonzero(labels == label))[:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def _count_classes(found: Material) -> int:
    return int(max(found.train.labels.max(), found.test.labels.max())) + 1
