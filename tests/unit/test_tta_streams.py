"""Streams of digits-C as manifests, the monitor, and the scores of a played stream."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from fedpeft.data import drift
from fedpeft.data.corruptions import CORRUPTIONS, corrupt_image
from fedpeft.data.drift import StreamSpec, TestStream
from fedpeft.errors import InputError
from fedpeft.tta import play
from fedpeft.tta.deployed import deploy
from fedpeft.tta.method import make
from fedpeft.tta.monitor import Monitor
from fedpeft.tta.parts import scores
from support import tta_parts as parts

SMALL = {"corruptions": ("blur", "fog"), "limit": 90}
# What version 1 is; a change of any corruption or kind of stream needs another version.
PINNED = {
    "iid": "2d12f60dc204a5182fb88194",
    "gradual": "f7d6727e1aa13f5a4cfdccb0",
    "mixed": "ee06047601b32f439248641e",
    "dirichlet": "9b4a90d4341f2884a8697478",
    "label_shift": "e6db079f591b058afa792400",
    "recurring": "5d33cfb33c9703d1674d2279",
    "clean_tail": "1a6ae82c25387c971ff6ec89",
}


@pytest.mark.parametrize("kind", drift.KINDS)
def test_a_manifest_is_plain_complete_and_the_same_every_time(kind):
    spec = StreamSpec(kind, batch=20, passes=2, **SMALL)
    plan = drift.manifest(spec)
    assert drift.manifest(spec) == plan
    stream = drift.load(json.loads(json.dumps(plan)))
    assert [part.stop - part.start for part in stream.parts] == plan["batches"]
    assert stream.parts[-1].stop == stream.rows == len(stream.domains) == len(plan["noise"])
    other = drift.manifest(StreamSpec(kind, batch=20, passes=2, seed=1, **SMALL))
    assert other["plan_sha256"] != plan["plan_sha256"] and other["pixels_sha256"] != plan["pixels_sha256"]
    labels = drift._test_set().labels
    assert [int(labels[image]) for image in plan["image"]] == plan["label"]


@pytest.mark.parametrize("kind", drift.KINDS)
def test_default_streams_are_those_of_version_1(kind):
    plan = drift.manifest(StreamSpec(kind, passes=2))
    assert plan["plan_sha256"][:12] + plan["pixels_sha256"][:12] == PINNED[kind]


def test_a_manifest_that_was_changed_is_refused():
    plan = drift.manifest(StreamSpec("iid", **SMALL))
    for key, value, message in (
        ("version", 2, "version 2"),
        ("label", plan["label"][::-1], "does not fit its hash"),
        ("pixels_sha256", "0", "pixels do not fit"),
        ("source_sha256", "0", "other images"),
    ):
        with pytest.raises(InputError, match=message):
            drift.load({**plan, key: value})
    for wrong in (
        {"kind": "sorted"},
        {"shift": "up"},
        {"batch": 0},
        {"batch": 201},
        {"corruptions": ("snow",)},
        {"severity": 6},
    ):
        with pytest.raises(InputError):
            drift.manifest(StreamSpec(**{**SMALL, **wrong}))


def test_what_each_kind_of_stream_is():
    iid = drift.build("iid", batch=64, **SMALL)
    assert list(dict.fromkeys(iid.domains)) == ["blur-5", "fog-5"] and iid.rows == 180
    assert [part.stop - part.start for part in iid.parts] == [64, 26, 64, 26], "no batch holds two domains"
    gradual = list(dict.fromkeys(drift.build("gradual", **SMALL).domains))
    assert gradual == [f"{name}-{level}" for name in ("blur", "fog") for level in range(1, 6)]
    mixed = drift.build("mixed", **SMALL)
    assert len(set(mixed.domains[:40])) == 2 and len(mixed.parts) == 3
    assert drift.build("recurring", passes=3, **SMALL).rows == 540
    tail = drift.build("clean_tail", **SMALL)
    assert tail.domains[-90:] == ["clean"] * 90
    clean = drift._test_set()
    assert float(tail.inputs["pixel_values"][-1].max()) <= 1
    assert any(
        np.allclose(tail.inputs["pixel_values"][-1, 0].numpy(), image[..., 0], atol=1 / 255)
        for image in np.asarray(clean.inputs)[:90]
    )
    assert drift.build("iid", batch=1, **SMALL).parts[5] == slice(5, 6)


def test_dirichlet_streams_come_in_bursts():
    def classes_a_batch(kind: str) -> float:
        stream = drift.build(kind, batch=30, corruptions=("blur",))
        return float(np.mean([len(stream.labels[part].unique()) for part in stream.parts[:-1]]))

    assert classes_a_batch("dirichlet") < 5 < 8 < classes_a_batch("iid")


def test_label_shift_is_a_long_tail_and_its_mirror():
    counts = {
        shift: torch.bincount(drift.build("label_shift", shift=shift, corruptions=("blur",)).labels)
        for shift in ("forward", "uniform", "backward")
    }
    assert counts["forward"][0] > 15 * counts["forward"][9] > 0
    assert counts["backward"][9] > 15 * counts["backward"][0] > 0
    assert counts["uniform"].max() - counts["uniform"].min() <= 3


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_moves_an_image_further(name):
    images = np.asarray(drift._test_set().inputs)[:60, ..., 0].astype(float)
    distance = [
        np.mean(
            [
                np.abs(corrupt_image(image, name, level, np.random.default_rng(row)) - image).mean()
                for row, image in enumerate(images)
            ]
        )
        for level in range(1, 6)
    ]
    assert distance[0] > 0 and all(after > before for before, after in pairwise(distance))
    bad = corrupt_image(images[0], name, 5, np.random.default_rng(0))
    assert bad.min() >= 0 and bad.max() <= 1 and bad.shape == (8, 8)


# Scores ---------------------------------------------------------------------------------------------------------------


def test_measures_by_hand():
    probs = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.9, 0.1]])
    labels = torch.tensor([0, 1, 1, 0])
    found = play.measures(probs, labels)
    assert found["error"] == 0.25 and found["classes"] == 2
    assert math.isclose(found["nll"], -np.log([0.8, 0.4, 0.7, 0.9]).mean(), rel_tol=1e-5)
    assert math.isclose(found["brier"], np.mean([0.08, 0.72, 0.18, 0.02]), rel_tol=1e-5)
    assert math.isclose(found["ece"], (0.2 + 0.6 + 0.3 + 0.1) / 4, rel_tol=1e-5)  # four bins
    p, q = np.array([0.65, 0.35]), np.array([0.5, 0.5])
    assert math.isclose(found["drift"], float((p * np.log(p / q)).sum()), rel_tol=1e-4)
    assert play.worst_window(torch.tensor([0, 0, 1, 1, 0]).bool(), 2) == 1.0
    assert play.worst_window(torch.tensor([0, 1]).bool(), 256) == 0.5
    assert play.by_domain(torch.tensor([1, 0, 1]).bool(), ["a", "b", "a"]) == {"a": 1.0, "b": 0.0}


def test_a_played_stream_is_json_with_cost_and_diagnostics():
    stream = TestStream(
        "hand", parts.images(20), torch.arange(20) % 3, ["x"] * 20, [slice(0, 7), slice(7, 14), slice(14, 20)]
    )
    inputs = stream.inputs["pixel_values"]
    inputs[8] = torch.nan
    result = play.run_stream("tent", stream, parts.conv())
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["cost"]["forwards"] == 3 and result["cost"]["backwards"] == 2 and result["skipped"] == 1
    assert result["cost"]["held"] == 3 * 16, "student and two moments of 16 norm weights"
    assert [entry["reason"] for entry in result["batches"]] == [None, "1 of 7 inputs are not finite", None]
    assert result["order"] == "before" and result["method"] == "tent"
    source = play.run_stream("source", stream, parts.conv())
    assert source["cost"]["held"] == 0 and source["batches"][0]["changed"] == 0.0
    assert play.run_stream("tent", stream, parts.conv(), {"order": "after"})["cost"]["forwards"] == 5


def test_an_oracle_resets_where_the_domain_changes_and_says_so():
    parts_ = [slice(0, 7), slice(7, 14), slice(14, 21)]
    stream = TestStream("hand", parts.images(21), torch.arange(21) % 3, ["a"] * 14 + ["b"] * 7, parts_)
    result = play.run_stream("tent", stream, parts.conv(), {"lr": 0.1}, oracle=True)
    assert result["oracle"] and result["cost"]["resets"] == 1
    alone = make("tent", parts.conv(), {"lr": 0.1})
    first = float(scores.entropy_of(alone.predict({"pixel_values": stream.inputs["pixel_values"][14:]})).mean())
    assert math.isclose(result["batches"][2]["entropy"], first, rel_tol=1e-5)
    assert play.run_stream("tent", stream, parts.conv(), {"lr": 0.1})["cost"]["resets"] == 0


# The monitor ----------------------------------------------------------------------------------------------------------


def test_the_monitor_is_silent_on_source_like_predictions_and_speaks_at_each_sign():
    mean = torch.full((4,), 0.25)
    calm = torch.eye(4).repeat(8, 1) * 0.6 + 0.1
    assert Monitor(mean, 1.0, window=16).observe(calm) == []
    entropy = float(scores.entropy_of(calm).mean())
    sure = torch.eye(4).repeat(8, 1)
    assert Monitor(mean, entropy, window=16).observe(sure) == ["entropy"]
    two = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).repeat(32, 1)
    assert Monitor(mean, 1.0, window=16, class_share=0.5).observe(two) == ["classes"]
    assert Monitor(mean, 1.0, window=16, max_drift=0.05, class_share=0.0).observe(two) == ["drift"]
    waiting = Monitor(mean, entropy, window=64)
    assert waiting.observe(sure) == [] and waiting.observe(sure) == ["entropy"] and len(waiting.recent) == 0
    assert waiting.alarms == [{"batch": 1, "signs": ["entropy"]}]
    other = Monitor(mean, entropy, window=64)
    other.load(waiting.state())
    assert parts.same(other.state(), waiting.state()) and other.alarms


def test_the_monitor_resets_a_method_that_collapses():
    """TENT at an absurd rate; with the reset it stays near the source, and its alarms say when."""
    inputs = parts.images(700, 5)
    net = parts.Net()
    with torch.no_grad():
        net.head.bias.copy_(-net(**inputs).mean(0) + net.head.bias)
    model = deploy(net, head="head")
    labels = make("bn_adapt", model).predict(inputs).argmax(-1)
    stream = TestStream("hand", inputs, labels, ["x"] * 700, [slice(start, start + 10) for start in range(0, 700, 10)])
    errors = {}
    for reset in (False, True):
        method = make("tent", model, {"lr": 0.3})
        monitor = Monitor.on_source(
            method, parts.source(), window=40, class_share=0.0, entropy_share=0.2, max_drift=10.0, reset=reset
        )
        result = play.run_stream(method, stream, model, monitor=monitor)
        errors[reset] = result["error"]
        assert result["alarms"] > 0 and (result["cost"]["resets"] > 0) == reset
        assert result["batches"][monitor.alarms[0]["batch"]]["alarm"] == monitor.alarms[0]["signs"]
    assert errors[True] < errors[False]
