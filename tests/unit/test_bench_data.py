"""The benchmark of data: what it runs on, how memory is looked at, and what its rows say; no figure is asserted."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fedpeft.cli.main import app
from fedpeft.errors import InputError, RunError
from fedpeft.simulations.benchmarks import data, data_memory, data_work


def here(command, environment):
    """The job of a command in this process, which has imported what takes most of the time."""
    began = time.monotonic()
    samples = [(time.monotonic(), data_memory.memory())]
    data_work.main(command[-1])
    return began, [*samples, (time.monotonic(), data_memory.memory())]


def test_a_quick_run_has_rows_a_comparison_and_goals(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "watched", here)

    done = CliRunner().invoke(
        app, ["bench", "data", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "in"), "--quick", "--json"]
    )
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["kind"], row["engine"], row["cache"]) for row in results["rows"]] == [
        (kind, "one", cache) for kind in ("texts", "photos") for cache in ("cold", "warm")
    ]
    assert all(row["first_step_s"] > 0 and row["records_per_s"] > 0 for row in results["rows"])
    assert [(row["kind"], row["engine"]) for row in results["rival"]] == [
        (kind, engine) for kind in ("photos", "unequal") for engine in ("rival", "fedpeft")
    ]
    assert all(row["records_per_cpu_s"] > 0 and row["records"] == 40 for row in results["rival"])
    assert all(0 <= row["accuracy"] <= 1 for row in results["rival"][2:])
    assert len(results["goals"]) == 10 and results["reproduce"].endswith("--quick")
    assert {path.name for path in (tmp_path / "in").iterdir()} == {
        *("texts-40.csv", "texts-32.csv", "photos-40", "photos-32", "unequal-40", "unequal-200", "model"),
    }
    data.show(results)


def test_texts_have_their_tokens_and_photos_their_size(tmp_path):
    texts = data_work.prepare(tmp_path, "texts", 30)
    lines = texts.read_text().splitlines()
    assert len(lines) == 31 and {len(line) for line in lines[1:]} == {data_work.TOKENS + 2}
    photos = data_work.prepare(tmp_path, "photos", 8)
    files = sorted(photos.glob("*/*.jpg"))
    assert len(files) == 8 and {Image.open(file).size for file in files} == {(224, 224)}
    assert len({file.read_bytes() for file in files}) == 8
    before = files[0].stat().st_mtime_ns
    assert data_work.prepare(tmp_path, "photos", 8) == photos and files[0].stat().st_mtime_ns == before


def test_unequal_photos_are_of_many_sizes_and_tinted_by_their_label(tmp_path):
    photos = data_work.prepare(tmp_path, "unequal", 16)
    files = sorted(photos.glob("*/*.jpg"))
    sizes = {Image.open(file).size for file in files}
    assert len(sizes) == 16 and all(160 <= side <= 320 for size in sizes for side in size)
    means = {label: np.asarray(Image.open(file)).mean((0, 1)) for file in files for label in [file.parent.name]}
    assert [int(means[f"label-{label}"].argmax()) for label in range(3)] == [0, 1, 2]


def test_memory_is_that_of_all_processes_and_shared_pages_count_once(tmp_path):
    """80 MB of its own in a child and a grandchild; 50 MB of a file that both have mapped."""
    (tmp_path / "file").write_bytes(b"x" * 50_000_000)
    script = (
        "import mmap, subprocess, sys, time\n"
        "file = open(sys.argv[1], 'rb')\n"
        "pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ); sum(pages[::4096])\n"
        "mine = bytearray(b'y' * 80_000_000)\n"
        "other = subprocess.Popen([sys.executable, *sys.argv[2:]]) if sys.argv[2:] else None\n"
        "other.wait() if other else time.sleep(1.5)\n"
    )
    began, samples = data_memory.watched(
        [sys.executable, "-c", script, str(tmp_path / "file"), "-c", script, str(tmp_path / "file")], {}
    )
    assert began <= samples[0][0]
    most = {key: data_memory.peak(samples, key) - data_memory.peak(samples[:1], key) for key in samples[0][1]}
    assert 160 < most["anonymous"] < 240
    assert 45 < most["shared"] - most["anonymous"] < 90 < most["resident"] - most["anonymous"] < 140
    with pytest.raises(RunError, match="no such thing"):
        data_memory.watched([sys.executable, "-c", "raise SystemExit('no such thing')"], {})


def test_goals_are_of_the_rows_that_there_are():
    rows = [{"kind": "photos", "records": 9, "engine": "one", "cache": "warm", "above_mb": 700.0}]
    rows[0] |= {"first_step_s": 9.0, "read_s": 2.5}
    races = [{"kind": "photos", "engine": "rival", "records": 9, "records_per_cpu_s": 10.0, "cpu_seconds": 5.0}]
    assert [row["met"] for row in data.goals(rows, races)] == [False, True, False]
    both = [*races, {"kind": "photos", "engine": "fedpeft", "records": 9, "records_per_cpu_s": 8.0, "cpu_seconds": 4.0}]
    assert data.goals(rows, both)[3]["measured"] == 1.25 and not data.goals(rows, both)[3]["met"]
    last = data.goals(rows, [*both, *({**row, "kind": "unequal"} for row in both)])[4]  # to a result all seconds count
    assert last["measured"] == 0.8 and last["met"] and "to its result" in last["goal"]


def test_rows_are_of_the_time_up_to_the_end_of_training():
    samples = [
        (float(t), {"resident": total, "shared": total - 5, "anonymous": total - 10})
        for t, total in enumerate((50, 70, 90, 80, 500))
    ]
    noted = {"rounds": [[1.5, 2.0], [2.5, 4.0], [3.0, 5.0]], "end": [3.5, 5.5], "first_step": [1.0, 1.5]}
    base = {"resident": 40.0, "shared": 38.0, "anonymous": 35.0}
    row = data.describe(noted, samples, base, 30, alone=True)
    assert row["peak_mb"] == row["resident_mb"] == 90 and row["above_mb"] == 50 and row["anonymous_above_mb"] == 45
    assert row["growth_mb"] == (80 - 10) - (70 - 10)
    assert row["records_per_s"] == 60 / 1.5 and row["records_per_cpu_s"] == 60 / 3.0
    assert (row["first_step_s"], row["first_step_cpu_s"]) == (1.0, 1.5)
    spread = data.describe({**noted, "first_step": None}, samples, base, 30, alone=False)
    assert spread["peak_mb"] == 85 and spread["above_mb"] == 47
    assert spread["first_step_s"] is None and spread["records_per_cpu_s"] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engines": ("two",)}, "--engines: two given; known are one, workers, ray"),
        ({"engines": ("ray",)}, "--engines: one is among them"),
        ({"texts": 7}, "--texts: 7; 10 clients need 20"),
        ({"repeats": 0}, "--repeats: 0"),
        ({"texts": 0, "photos": 0, "rival": 0, "unequal": 0}, "all 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        data.run(tmp_path, **options)
