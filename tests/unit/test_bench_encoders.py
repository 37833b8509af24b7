"""`fedpeft bench adapters` and `bench dtype`: quick grids on stand-ins for prepared sets, tuning and tables by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedpeft.cli.main import app
from fedpeft.config import ModelConfig
from fedpeft.continual.streams import cache
from fedpeft.data.records import Records
from fedpeft.errors import InputError
from fedpeft.models import loading
from fedpeft.simulations.benchmarks import adapters, dtype, encoders
from fedpeft.simulations.benchmarks.cells import Progress, silent

LORA = {"adapter.r": 4, "adapter.alpha": 16, "client.lr": 0.02, "run.rounds": 2}


def opinions(count: int, seed: int) -> Records:
    """Words whose first letter is their label, of four kinds of people."""
    draws = np.random.default_rng(seed)
    labels = draws.integers(2, size=count)
    domains = np.array(["amazon", "movie", "nyt", "tweets"])[np.arange(count) % 4]
    inputs = [f"{'ab'[label]}{draws.integers(1000)}" for label in labels]
    return Records(inputs, labels, ["negative", "positive"], {"domain": domains}, "text")


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """VADER and MiniLM are handmade words and tiny-bert, of whose two layers the first is computed once."""
    load = loading.load
    monkeypatch.setenv("FEDPEFT_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(cache, "about", lambda name: {"name": name})
    monkeypatch.setattr(encoders.source, "load", lambda *_: (opinions(320, 0), opinions(160, 1)))
    monkeypatch.setattr(encoders, "LOWER", 1)

    def tiny(config: ModelConfig, labels: int, seed: int):
        own = {"name": "tiny-bert", "pooling": "mean", "dtype": config.dtype, "max_length": config.max_length}
        base = load(ModelConfig(task=config.task, **own), labels, seed)
        for module in base.backbone.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return base

    monkeypatch.setattr(encoders.loading, "load", tiny)
    monkeypatch.setattr(encoders, "TEXTS", {"train": 40, "held": 20, "test": 30})
    return lambda upper=True: encoders.load_setting("texts", upper, False)


def test_sets_are_apart_even_and_the_same_every_time(texts):
    setting = texts()
    assert {name: len(part) for name, part in setting.records.items()} == {"train": 160, "held": 80, "test": 120}
    for part in setting.records.values():
        assert set(np.unique(part.columns["domain"], return_counts=True)[1].tolist()) == {len(part) // 4}
    assert setting.records["held"].inputs == texts().records["held"].inputs
    groups = np.repeat(np.arange(3), 10)
    drawn = encoders.draw_sets(groups, {"train": 6, "held": 2}, ("train", "held"), False)
    assert not set(drawn["train"]) & set(drawn["held"]) and len(drawn["train"]) == 18 and len(drawn["held"]) == 6


@pytest.mark.parametrize("private", [False, True])
def test_over_lower_layers_computed_once_a_run_ends_as_over_the_whole_model(texts, private, tmp_path):
    """Hidden states are kept in half precision, hence the tolerance; the start is another loss by far."""
    found = {}
    for upper, layer in ((True, 0), (False, 1)):
        named = [f"layer.{layer}.attention.self.{name}" for name in ("query", "value")]
        changes = {**encoders.schedule_of("texts", private, False), **LORA, "adapter.target_modules": named}
        found[upper] = encoders.play_run(texts(upper), changes, "test", tmp_path / "run")
    assert found[True]["loss"] == pytest.approx(found[False]["loss"], abs=2e-3)
    assert found[True]["bytes_up"] == found[False]["bytes_up"] == 4 * (2 * 4 * 128 + 2 * 64 + 2)
    start = encoders.play_run(texts(), {**changes, "adapter.target_modules": None, "client.lr": 1e-9}, "test", tmp_path)
    assert abs(start["loss"] - found[True]["loss"]) > (0.02 if private else 0.1)
    assert (found[True]["epsilon"] is not None) == private and not tmp_path.exists()
    assert not private or 2.9 < found[True]["epsilon"] <= encoders.EPSILON


def test_a_run_that_diverges_counts_as_its_start(texts, tmp_path):
    changes = {**encoders.schedule_of("texts", False, False), **LORA, "client.optimizer": "sgd", "client.lr": 1e30}
    row = encoders.play_run(texts(), changes, "test", tmp_path / "run")
    start = encoders.play_run(texts(), {**changes, "client.lr": 1e-9}, "test", tmp_path / "run")
    assert row["diverged"] and not start["diverged"] and row["loss"] == pytest.approx(start["loss"], abs=1e-6)


@pytest.mark.parametrize("command", ["adapters", "dtype"])
def test_a_quick_grid_and_what_is_gone_on_with(command, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "QUICK", 1)
    extra = ["--adapters", "ia3"] if command == "adapters" else []
    arguments = ["bench", command, "--out", str(tmp_path / "out"), "--sets", "texts", "--seeds", "2", "--quick", *extra]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert not done.exception, done.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    words = [*arguments[:3], "DIR", *arguments[4:6], *extra, *arguments[6:9]]
    assert results["reproduce"] == f"fedpeft {' '.join(words)}"
    assert not (tmp_path / "out" / "run").exists()
    if command == "adapters":
        assert [(line["method"], line["private"]) for line in results["table"]] == [
            (name, private) for private in (False, True) for name in ("lora", "ia3")
        ]
        assert results["table"][1]["bytes_up"] < results["table"][0]["bytes_up"]
        assert {row["seed"] for row in results["rows"] if row["judged"] == "held"} == {adapters.TUNED_ON}
        assert (tmp_path / "out" / "adapters.png").is_file()
    else:
        assert all(0 < line["largest"] < 0.1 for line in results["table"] if line["measure"] == "loss")
    monkeypatch.setattr(encoders, "play_run", lambda *_: pytest.fail("a finished cell was run again"))
    again = CliRunner().invoke(app, arguments)
    assert not again.exception and "texts" in again.output, again.output


@pytest.mark.parametrize(
    ("accuracies", "tried", "best"),
    [
        ({0.001: 50, 0.004: 60, 0.016: 55, 0.064: 90}, [0.001, 0.004, 0.016], 0.004),
        ({0.001: 61, 0.004: 60, 0.016: 55, 0.064: 90}, [0.001, 0.004, 0.016], 0.001),
        ({0.001: 90, 0.004: 50, 0.016: 55, 0.064: 57}, [0.004, 0.016, 0.064], 0.064),
        ({0.001: 90, 0.004: 50, 0.016: 50, 0.064: 50}, [0.001, 0.004, 0.016], 0.001),
    ],
)
def test_rates_are_tried_from_the_middle_on_outwards(accuracies, tried, best, monkeypatch, tmp_path):
    """Equal accuracies are told apart by the loss, here the rate."""
    counted: list[int] = []
    progress = Progress(silent, 4)
    work = adapters.Work(tmp_path, None, "texts", "lora", False, False, progress)
    monkeypatch.setattr(progress, "skip", lambda parts=1: counted.append(parts))
    monkeypatch.setattr(
        adapters.Work, "cell", lambda self, rate, seed, judged: {"lr": rate, "accuracy": accuracies[rate], "loss": rate}
    )
    rows = work.tune(adapters.RATES)
    assert [row["lr"] for row in rows] == tried and adapters.find_better(rows)["lr"] == best and counted == [1]


def test_tables_are_paired_differences_with_verdicts():
    def row(method, seed, accuracy, judged="test"):
        common = {"set": "texts", "private": False, "bytes_up": 10.0, "diverged": False, "lr": 0.004}
        return {**common, "method": method, "seed": seed, "accuracy": accuracy, "loss": 1.0, "judged": judged}

    rows = [row("lora", seed, 80.0 + seed) for seed in range(3)] + [row("ia3", 100, 99.0, "held")]
    rows += [row("ia3", seed, 77.0 + seed + (seed == 2)) for seed in range(3)] + [row("lora", 100, 99.0, "held")]
    lora, ia3 = adapters.table(rows)
    assert (lora["accuracy"], lora["deviation"], lora["difference"]) == (81.0, 1.0, None)
    assert ia3["difference"] == pytest.approx(-8 / 3) and ia3["error"] == pytest.approx(1 / 3)
    assert ia3["verdict"] == "does not hold"
    names = ("float32", "bfloat16")
    accuracy, loss = dtype.table(
        [row(name, seed, 80.0 + seed * (name == "bfloat16")) for seed in (0, 1) for name in names]
    )
    assert (accuracy["difference"], accuracy["error"], accuracy["largest"]) == (0.5, 0.5, 1.0)
    assert (loss["difference"], loss["verdict"]) == (0.0, "holds")


def test_forms_send_no_more_than_lora():
    """Of a layer of width D, LoRA sends 16 D values, and what has a rank at least nine tenths of it or its largest."""
    for name, width in (("texts", 384), ("characters", 96)):
        lora = 2 * width * adapters.FORMS["lora"].ranks[name]
        sizes = {
            "ffa_lora": width * adapters.FORMS["ffa_lora"].ranks[name],
            "lora_sb": adapters.FORMS["lora_sb"].ranks[name] ** 2,
            "pissa": 2 * width * adapters.FORMS["pissa"].ranks[name],
            "dora": 2 * width * adapters.FORMS["dora"].ranks[name] + width,
            "miss": width * adapters.FORMS["miss"].ranks[name],
        }
        assert all(0.9 * lora < size <= lora for size in sizes.values()), sizes


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"--sets: 'text' is not known\. Did you mean 'texts'"):
        dtype.run(tmp_path, ("text",))
    with pytest.raises(InputError, match=r"--adapters: 'ia4' is not known\. Did you mean 'ia3'"):
        adapters.run(tmp_path, (), ("ia4",))
    for bench in (adapters.run, dtype.run):
        with pytest.raises(InputError, match=r"seeds=1: .* two seeds"):
            bench(tmp_path, seeds=1)
    monkeypatch.setenv("FEDPEFT_DATA", str(tmp_path))
    for name, needed in (("texts", "vader"), ("characters", "glyphs")):
        with pytest.raises(InputError, match=f"fedpeft data prepare {needed}"):
            encoders.load_setting(name, True, True)


def test_characters_are_of_display_fonts_on_the_stream_s_model(monkeypatch):
    draws = np.random.default_rng(0)

    def part(count: int) -> Records:
        images = draws.integers(0, 256, (36 * count, 32, 32, 1), dtype=np.uint8)
        package = np.array([encoders.glyphs.DISPLAY, "fonts-noto-core"])[np.arange(36 * count) // 36 % 2]
        labels = np.arange(36 * count) % 36
        return Records(images, labels, [f"{label:02d}" for label in range(36)], {"package": package}, "image")

    torch.manual_seed(0)
    weights = {name: value.clone() for name, value in encoders.glyphs._build_vit().state_dict().items()}
    monkeypatch.setattr(encoders.glyphs, "read_characters", lambda: ((part(20), part(10)), weights))
    setting = encoders.load_setting("characters", False, True)
    assert {name: len(one) for name, one in setting.records.items()} == {"train": 180, "held": 36, "test": 72}
    assert all(set(one.columns["package"]) == {encoders.glyphs.DISPLAY} for one in setting.records.values())
    changes = {**encoders.schedule_of("characters", False, True), **LORA, "run.rounds": 1}
    rows = {
        kind: encoders.play_run(setting, {**changes, "model.dtype": kind}, "test", Path("run")) for kind in dtype.DTYPES
    }
    assert rows["float32"]["loss"] != rows["bfloat16"]["loss"] == pytest.approx(rows["float32"]["loss"], rel=0.02)
