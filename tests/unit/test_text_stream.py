"""Streams of real records with handmade ones in their place: plans, source models, and text through the methods."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fedpeft.data.drift import plan_hash
from fedpeft.data.records import Records
from fedpeft.errors import InputError
from fedpeft.simulations.benchmarks import tta, tta_real, tta_sources, tta_streams
from fedpeft.simulations.benchmarks.tta_real import Domain, ImageOptions, Material, RealImages, RealTexts, TextOptions
from fedpeft.tta.method import make
from fedpeft.tta.play import run_stream

WORDS = {"good": ("great", "lovely", "superb", "fine"), "bad": ("awful", "dreadful", "poor", "grim")}


def texts(count: int, style: str, seed: int) -> Records:
    """Sentences whose label is in one word; a style changes the letters."""
    draws = np.random.default_rng(seed)
    labels = draws.integers(2, size=count)
    words = [WORDS["good" if label else "bad"][draws.integers(4)] for label in labels]
    made = [f"{word} {draws.integers(1000)}" for word in words]
    inputs = [text.upper() if style == "loud" else text for text in made]
    names = {"item": np.array([f"{place:03d}" for place in draws.permutation(count)])}
    return Records(inputs, labels, ["bad", "good"], names, "text")


def material(parallel: bool = False) -> Material:
    plain, loud = texts(60, "plain", 2), texts(60, "loud", 2 if parallel else 3)
    return Material(
        texts(160, "plain", 1),
        {"plain": plain, "loud": loud},
        [Domain("plain", "plain"), Domain("loud", "loud")],
        parallel,
    )


class Tiny(RealTexts):
    encoder = "tiny-bert"


def bench(parallel: bool = False, quick: bool = False, **options) -> Tiny:
    return Tiny("hand", lambda: material(parallel), TextOptions(**{"limit": 40, "batch": 16, **options}), quick)


def test_a_plan_is_complete_and_the_same_every_time():
    plan = bench().manifest(1)
    assert plan == bench().manifest(1) and plan["plan_sha256"] == plan_hash(plan)
    assert plan["plan_sha256"] != bench().manifest(2)["plan_sha256"]
    stream = bench().load(json.loads(json.dumps(plan)))
    assert stream.domains == ["plain"] * 40 + ["loud"] * 40
    assert [part.stop - part.start for part in stream.parts] == [16, 16, 8] * 2
    assert stream.inputs["input_ids"].shape[0] == 80 and set(stream.inputs) == {"input_ids", "attention_mask"}
    tokenizer, pools = bench().tokenizer, material().pools
    for row in (0, 17, 79):
        pool = pools[stream.domains[row]]
        record = plan["record"][row]
        kept = stream.inputs["input_ids"][row][stream.inputs["attention_mask"][row] == 1]
        assert tokenizer.decode(kept) == pool.inputs[record] and int(stream.labels[row]) == pool.labels[record]
    assert len(set(plan["record"][:40])) == 40, "no record twice in a domain"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 2, "version 2"),
        ("source_sha256", "0", "other records"),
        ("label", None, "does not fit its hash"),
        ("inputs_sha256", "0", "inputs do not fit"),
    ],
)
def test_a_changed_plan_is_refused(key, value, message):
    plan = bench().manifest(0)
    changed = {**plan, key: plan["label"][::-1] if key == "label" else value}
    with pytest.raises(InputError, match=message):
        bench().load(changed)


def test_parallel_pools_show_the_same_items_in_every_domain():
    plan = bench(parallel=True).manifest(0)
    first, second = plan["record"][:40], plan["record"][40:]
    assert sorted(first) == sorted(second) and first != second
    other = bench().manifest(0)["record"]
    assert sorted(other[:40]) != sorted(other[40:])


def test_items_in_common_are_aligned():
    one, two = texts(12, "plain", 5), texts(9, "loud", 6)
    pools = tta_real.in_common({"one": one, "two": two}, "item")
    assert len(pools["one"]) == 9
    assert (
        pools["one"].columns["item"].tolist()
        == pools["two"].columns["item"].tolist()
        == sorted(two.columns["item"].tolist())
    )
    where = one.columns["item"].tolist().index("004")
    assert pools["one"].inputs[4] == one.inputs[where] and pools["one"].labels[4] == one.labels[where]


def test_bursts_are_asked_for():
    def changes(**options):
        labels = np.array(bench(limit=60, **options).manifest(0)["label"])
        return int((labels[1:] != labels[:-1]).sum())

    assert changes(delta=0.05) < 20 < changes()


@pytest.mark.parametrize("kind", ["lora", "head"])
def test_a_source_model_learns_and_is_read_again(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(tta_sources, "TEXT_EPOCHS", 8)  # the tiny encoder knows nothing yet
    monkeypatch.setattr(tta_sources, "TEXT_RATE", 1e-2)
    given = bench()
    model, data = given.source(kind, 0, tmp_path)
    assert len(data) == 160 and not any(model.tensor(name).requires_grad for name in model.slots)
    stream = given.load(given.manifest(0))
    assert run_stream("source", stream, model)["domains"]["plain"] < 0.25
    saved = (tmp_path / f"{kind}-seed0.safetensors").read_bytes()
    again, _ = bench().source(kind, 0, tmp_path)
    assert tta_sources.fingerprint(again) == tta_sources.fingerprint(model)
    assert (tmp_path / f"{kind}-seed0.safetensors").read_bytes() == saved
    other, _ = bench().source(kind, 1, tmp_path)
    assert tta_sources.fingerprint(other) != tta_sources.fingerprint(model)
    assert bool(model.select("lora")) if kind == "lora" else not any(".lora_" in name for name in model.slots)
    with pytest.raises(InputError, match="Allowed: lora, head"):
        given.source("cnn", 0, tmp_path)


def test_the_source_model_trains_on_as_many_records_as_asked(tmp_path):
    assert len(bench(train=50).source("head", 0, tmp_path)[1]) == 50


def test_methods_run_on_text_or_say_why_not(monkeypatch, tmp_path):
    monkeypatch.setattr(tta_streams, "open_stream", lambda name, quick=False: bench(quick=True))
    methods = "bn_adapt,tent,lame,t3a,roid,rotta"
    results = tta.run(tmp_path, "hand", methods, "lora", 1)
    found = {row["method"]: row for row in results["rows"]}
    assert "no batch norms" in found["bn_adapt"]["refused"]
    assert all(row["refused"] is None for name, row in found.items() if name != "bn_adapt")
    assert {name for name, row in found.items() if row["options"].get("augment") == "tokens"} == {
        "aug_average",
        "roid",
        "rotta",
    }
    assert found["tent"]["cost"]["backwards"] == 6 and found["tent"]["cost"]["held"] > 0
    assert found["source"]["segments"] == [["plain", 0], ["loud", 3]]
    assert found["source"]["nll"] != found["aug_average"]["nll"], "tokens were hidden"


def test_labels_change_no_answer_on_text(tmp_path):
    given = bench(quick=True)
    model, data = given.source("head", 0, tmp_path)
    plan = given.manifest(0)
    flipped = {**plan, "label": [1 - label for label in plan["label"]]}
    flipped["plan_sha256"] = plan_hash(flipped)
    streams = [given.load(one) for one in (plan, flipped)]
    for name in ("tent", "lame", "em_prior"):
        one, two = (run_stream(make(name, model, {}, 0, data), stream, model) for stream in streams)
        assert one["batches"] == two["batches"]
        assert abs(one["error"] + two["error"] - 1) < 1e-6


def test_images_are_corrupted_domain_by_domain_and_train_a_network(tmp_path):
    draws = np.random.default_rng(0)
    labels = draws.integers(2, size=240)
    images = np.zeros((240, 8, 8, 1), dtype=np.uint8)
    images[labels == 0, 2:6, :4] = 200
    images[labels == 1, 2:6, 4:] = 200
    records = Records(images, labels, ["left", "right"], {}, "image")
    made = Material(
        records.take(np.arange(160)),
        {"test": records.take(np.arange(160, 240))},
        [Domain("clean", "test"), Domain("contrast", "test", "contrast")],
    )
    given = RealImages("hand", lambda: made, ImageOptions(batch=32, limit=64, severity=5))
    plan = given.manifest(0)
    stream = given.load(plan)
    pixels = stream.inputs["pixel_values"]
    assert pixels.shape == (128, 1, 8, 8) and stream.domains[64] == "contrast"
    for row in (0, 63):
        whole = torch.from_numpy(made.pools["test"].inputs[plan["record"][row]][..., 0] / 255).float()
        assert torch.allclose(pixels[row, 0], whole, atol=1e-6)
    assert float(pixels[64:].amax() - pixels[64:].amin()) < 0.2 < float(pixels[:64].amax())
    model, data = given.source("cnn", 0, tmp_path)
    assert len(data) == 160 and len(model.norms) == 3
    assert run_stream("source", stream, model)["domains"]["clean"] < 0.1
    assert tta_sources.fingerprint(given.source("cnn", 0, tmp_path)[0]) == tta_sources.fingerprint(model)
