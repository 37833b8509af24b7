"""Claims that a small stream can show, over three seeds, with half of the measured gap as margin.

Differences are paired by seed: each has the claimed sign, and their mean is above half of the gap that was first
measured (the numbers that are halved below). A process makes each run once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from fedpeft import registry
from fedpeft.continual.body import TrainConfig, only_classes
from fedpeft.continual.learner import Learner
from fedpeft.continual.matrix import summary
from fedpeft.continual.model import Plastic
from fedpeft.continual.streams.base import Prepared

pytestmark = pytest.mark.claims  # how each mechanism works is in the tests of its body: test_coso_*, test_lae_*, ...
SEEDS = (0, 1, 2)
STREAMS: dict[str, dict[str, Any]] = {"digits5": {}, "glyph1d": {"tasks": 20, "train": 30, "test": 20}}
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


@dataclass(frozen=True)
class Found:
    """Percent: last accuracy by head, forgetting of the trained classifier, and last accuracy of each view alone."""

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
    made = Learner(
        given.stream,
        Plastic(given.base, given.layers),
        body,
        heads,
        TrainConfig(epochs=10, batch_size=32, lr=4e-3, head_lr=5e-3, temperature=3.0),
        seed,
        options,
    ).run()
    tests = [len(task.test) for task in given.stream.tasks]
    values = {head: summary(right, tests)["values"] for head, right in made.right.items()}
    return Found(
        {head: 100 * found["acc_micro"] for head, found in values.items()},
        100 * values["linear"]["forgetting_ge0"],
        alone(made),
    )


@torch.no_grad()
def alone(made: Learner) -> dict[str, float]:
    """Last accuracy of the trained classifier on each view's features, without the other view."""
    found = {}
    for name, change in made.body.views().items():
        answers = [
            only_classes(made.classifier(made.model.features(task.test.inputs, change)), made.body.seen).argmax(-1)
            == task.test.labels
            for task in made.stream.tasks
        ]
        found[name] = 100 * float(torch.cat(answers).double().mean())
    return found


def gaps(stream: str, better: str, worse: str, head: str = "linear") -> list[float]:
    return [run(stream, seed, better).accuracy[head] - run(stream, seed, worse).accuracy[head] for seed in SEEDS]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stream", STREAMS)
def test_every_run_is_above_chance_but_that_of_fine_tuning(stream, seed):
    """And each seed's runs are done here, so that no single test below takes them all."""
    chance = 100 / prepared(stream, seed).stream.classes
    assert all(run(stream, seed, name).accuracy["linear"] > 1.5 * chance for name in RUNS)


@pytest.mark.parametrize("stream, margin", [("digits5", 18.5 / 2), ("glyph1d", 28.7 / 2)])
def test_projecting_inputs_beats_not_projecting(stream, margin):
    found = gaps(stream, "in", "off")
    assert min(found) > 0 and mean(found) > margin, found


def test_projecting_outputs_beats_not_projecting_on_digits():
    """By their mean (4.5 points when it was measured) and all seeds but one, whose gain another rounding may take away.

    On signals the gain is within a point or two of nothing for some seeds; less forgetting is sure on both.
    """
    found = gaps("digits5", "out", "off")
    assert sorted(found)[1] > 0 and mean(found) > 0, found


@pytest.mark.parametrize("stream", STREAMS)
def test_projection_forgets_less_and_inputs_least(stream):
    for seed in SEEDS:
        inputs, outputs, off = (run(stream, seed, name).forgetting for name in ("in", "out", "off"))
        assert inputs + 5 < outputs + 2.5 < off, (seed, inputs, outputs, off)


@pytest.mark.parametrize("stream", STREAMS)
def test_fine_tuning_is_below_a_probe_and_forgets_most_of_it(stream):
    assert min(gaps(stream, "probe", "ft")) > 8
    assert mean([run(stream, seed, "ft").forgetting for seed in SEEDS]) > 60


@pytest.mark.parametrize("head", ["lda", "ranpac"])
@pytest.mark.parametrize("stream", STREAMS)
def test_a_closed_form_head_on_the_base_beats_every_classifier_trained_by_gradients(stream, head):
    for seed in SEEDS:
        fitted = run(stream, seed, "probe").accuracy[head]
        trained = {name: run(stream, seed, name).accuracy["linear"] for name in RUNS}
        assert fitted > max(trained.values()) + 5, (seed, fitted, trained)


@pytest.mark.parametrize("stream", STREAMS)
def test_nearest_means_beat_the_probe_on_the_same_features(stream):
    for seed in SEEDS:
        found = run(stream, seed, "probe").accuracy
        assert found["ncm"] > found["linear"] + 5, (seed, found)


@pytest.mark.parametrize("stream, margin", [("digits5", 15.5 / 2), ("glyph1d", 44.3 / 2)])
def test_the_frozen_phase_decides_what_lae_keeps(stream, margin):
    found = gaps(stream, "lae", "lae_unfrozen")
    assert min(found) > 0 and mean(found) > margin, found


def test_without_the_frozen_phase_the_offline_expert_is_the_better_one_on_signals():
    """A slow average forgets less than what moves freely. On digits neither is ahead for every seed."""
    views = [run("glyph1d", seed, "lae_unfrozen").views for seed in SEEDS]
    found = [view["offline"] - view["online"] for view in views]
    assert min(found) > 0 and mean(found) > (21 - 16) / 2, found


@pytest.mark.parametrize("stream", STREAMS)
def test_body_and_head_are_separable(stream):
    """One LDA head, kept up as sums, on features of four bodies: what moves less leaves old means valid for longer."""
    frozen, inputs, off, ft = (
        mean([run(stream, seed, name).accuracy["lda"] for seed in SEEDS]) for name in ("probe", "in", "off", "ft")
    )
    assert frozen > inputs > off + (78 - 32) / 2
    assert off > ft + (32 - 15) / 2
