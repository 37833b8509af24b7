"""Claims that a small stream can show, over three seeds, with half of the measured gap as margin.

Signs are those of paired differences; a gap is the mean of three seeds as measured with these settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from fedpeft import registry
from fedpeft.continual.body import TrainConfig, only
from fedpeft.continual.learner import Learner
from fedpeft.continual.matrix import summary
from fedpeft.continual.model import Plastic
from fedpeft.continual.streams.base import Prepared

SEEDS = (0, 1, 2)
STREAMS: dict[str, dict[str, Any]] = {"digits5": {}, "glyph1d": {"tasks": 10, "train": 40, "test": 20}}
COSO = {"r1": 8, "r2": 16, "eps_th": 0.9, "refresh": 2}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "probe": ("frozen", {}),
    "ft": ("sequential", {}),
    "off": ("coso", {**COSO, "cap": 1e-9}),  # a basis of no directions: no projection
    "out": ("coso", COSO),
    "in": ("coso", {**COSO, "side": "in"}),
    "lae": ("lae", {"frozen_epochs": 6}),
    "lae_unfrozen": ("lae", {"frozen_epochs": 0}),
}
GRADIENT = tuple(RUNS)


@dataclass(frozen=True)
class Found:
    """Percent: last accuracy by head, forgetting of the trained classifier, last accuracy of each view alone."""

    accuracy: dict[str, float]
    forgetting: float
    views: dict[str, float]


@cache
def prepared(stream: str, seed: int) -> Prepared:
    found: Prepared = registry.load("streams", stream)(**STREAMS[stream]).build(seed)
    return found


@cache
def run(stream: str, seed: int, name: str) -> Found:
    given = prepared(stream, seed)
    heads: dict[str, dict[str, Any]] = {"linear": {}, "lda": {}}
    if name == "probe":
        heads |= {"ncm": {}, "ranpac": {"features": 500}}
    body, options = RUNS[name]
    made = Learner(given.stream, Plastic(given.base, given.layers), body, heads,
                   TrainConfig(epochs=10, batch_size=32, lr=4e-3, head_lr=5e-3, temperature=3.0), seed, options).run()
    tests = [len(task.test) for task in given.stream.tasks]
    values = {head: summary(right, tests)["values"] for head, right in made.right.items()}
    return Found({head: 100 * found["acc_micro"] for head, found in values.items()},
                 100 * values["linear"]["forgetting_ge0"], dict(alone(made)))


@torch.no_grad()
def alone(made: Learner) -> Iterator[tuple[str, float]]:
    """Last accuracy of each view with the classifier, without the others."""
    for name, change in made.body.views().items():
        right = total = 0
        for task in made.stream.tasks:
            logits = only(made.classifier(made.model.features(task.test.inputs, change)), made.body.seen)
            right, total = right + int((logits.argmax(-1) == task.test.labels).sum()), total + len(task.test)
        yield name, 100 * right / total


def gaps(stream: str, better: str, worse: str, head: str = "linear") -> list[float]:
    return [run(stream, seed, better).accuracy[head] - run(stream, seed, worse).accuracy[head] for seed in SEEDS]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    import time
    for stream in STREAMS:
        for seed in SEEDS:
            for name in RUNS:
                begun = time.process_time()
                print(stream, seed, name, run(stream, seed, name), round(time.process_time() - begun, 1), flush=True)
