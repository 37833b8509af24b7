"""A single pass over 1-D signals whose classes come in turn, with a share of each scattered over the rest, untold.

Every class belongs to one of `groups` groups. `1 - blur` of its training records come with the group, the others with
groups drawn at random (the blurred share of i-Blurry, Koh et al., arXiv 2110.10031). The stream is then cut into
`parts` of equal length with no regard to groups: after each part there is an evaluation, and no body is told of either.
The test set of a part is that of the classes first seen in it, so that tests of the parts so far are those of all
classes seen so far. Train with `epochs=1`; the metric is `matrix`'s a_auc, with the training records of the parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpeft import seeds
from fedpeft.config import option
from fedpeft.continual import nets, stream
from fedpeft.continual.streams.base import Material, StreamSource
from fedpeft.continual.streams.signals import draw_signals
from fedpeft.errors import InputError

CLASSES = 40


class Glyph1DBlurry(StreamSource):
    """2,400 training signals in one pass, 40 classes, no boundaries."""

    name = "glyph1d_blurry"
    summary = "1-D signals in one pass without boundaries, 30 % of each of 40 classes scattered"
    scenario = "free"

    @dataclass
    class Config:
        groups: int = option(10, "groups that classes come in", low=1, high=CLASSES)
        blur: float = option(0.3, "share of each class that comes with other groups", low=0, high=1)
        parts: int = option(10, "evaluation points, evenly spaced", low=1)
        train: int = option(60, "training records a class", low=2)
        test: int = option(40, "test records a class", low=1)

    def records(self, seed: int) -> Material:
        train, test = (
            draw_signals(CLASSES, count, seed, which)
            for which, count in (("train", self.config.train), ("test", self.config.test))
        )
        return Material(train, test, nets.glyph_net("signals", CLASSES), nets.LAYERS)

    def manifest(self, found: Material, seed: int, **more: Any) -> dict[str, Any]:
        labels, tests = found.train.labels.numpy(), found.test.labels.numpy()
        if self.config.parts > len(labels):
            raise InputError(f"stream.parts={self.config.parts}: there are {len(labels)} training records.")
        groups = stream.group_classes(CLASSES, self.config.groups, seed)
        home, order = scatter_labels(labels, groups, self.config.blur, seed)
        tasks: list[dict[str, Any]] = []
        seen: set[int] = set()
        for number, part in enumerate(np.array_split(order, self.config.parts)):
            classes = sorted(set(labels[part].tolist()))
            tasks.append(
                {
                    "name": f"part-{number}",
                    "classes": classes,
                    "train": part.tolist(),
                    "test": np.flatnonzero(np.isin(tests, sorted(set(classes) - seen))).tolist(),
                }
            )
            seen |= set(classes)
        return {
            "version": stream.VERSION,
            "name": self.name,
            "scenario": self.scenario,
            "seed": seed,
            "classes": CLASSES,
            **more,
            "groups": groups,
            "home": home.tolist(),
            "tasks": tasks,
        }


def scatter_labels(
    labels: np.ndarray, groups: list[list[int]], blur: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The group [N] that each record comes with, and the order [N] in which all come: group after group, each shuffled.

    Exactly round(blur n_c) records of a class c come with groups other than its own.
    """
    rng = seeds.numpy_generator(seed, "stream", "blur")
    own = {label: number for number, group in enumerate(groups) for label in group}
    home = np.array([own[label] for label in labels.tolist()])
    if len(groups) > 1:
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            away = members[: round(blur * len(members))]
            # An offset from 1 on, so that no record that is to be scattered comes with its own group after all.
            home[away] = (own[int(label)] + rng.integers(1, len(groups), len(away))) % len(groups)
    order = np.concatenate([rng.permutation(np.flatnonzero(home == number)) for number in range(len(groups))])
    return home, order.astype(np.int64)
