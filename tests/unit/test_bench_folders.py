"""Every benchmark's command has a first word, a line a part, and a folder of its own around its work."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedpeft import folders
from fedpeft.cli import bench as cli
from fedpeft.cli.main import app
from fedpeft.errors import InputError, Stopped
from fedpeft.simulations.benchmarks import cells, memory, private

SUMMARY = {"final": {"accuracy": 0.5}, "baseline": {"accuracy": 0.1}, "epsilon_max": 1.0, "bytes_up": 1, "seconds": 1.0}


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """`bench memory` without its runs; the numbers of clients that were asked for."""
    asked: list[int] = []

    class Pool:
        def __init__(self, **options: Any) -> None: ...

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *error: object) -> None: ...

        def submit(self, function: Any, count: int, records: int) -> Pool:
            asked.append(count)
            return self

        def result(self) -> tuple[float, float]:
            return 1.0, 2.0

    monkeypatch.setattr(memory, "ProcessPoolExecutor", Pool)
    return asked


def bench(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_lines_say_how_many_are_done_and_how_long_the_rest_takes(monkeypatch):
    """Ten seconds a part; four that were there already take no time, and do not make the rest seem short."""
    clock = itertools.count(0.0, 10.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    told: list[str] = []
    progress = cells.Progress(told.append, 20)
    progress("one")
    progress.skip(4)
    progress("two")
    assert told == ["1/20 one, 3 min left", "6/20 two, 2 min left"]
    progress.skip(13)
    progress("last")
    assert told[-1] == "20/20 last"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (89, "89 s"), (95, "2 min"), (3600, "60 min"), (7200, "2.0 h")]
)
def test_times_are_written_in_a_fitting_unit(seconds, text):
    assert cells.show_duration(seconds) == text


def test_a_bench_speaks_before_it_works_and_json_has_stdout_for_itself(measured, tmp_path):
    done = bench("memory", "--clients", "2,3,5", "--out", tmp_path / "new", "--json")
    assert done.exit_code == 0, done.output
    lines = done.stderr.splitlines()
    assert lines[0] == "bench memory: loading ..." and [line.split(",")[0] for line in lines[1:]] == [
        "1/3 2 clients",
        "2/3 3 clients",
        "3/3 5 clients",
    ]
    assert [row["clients"] for row in json.loads(done.stdout)["rows"]] == measured == [2, 3, 5]


@pytest.mark.parametrize("name", ["federated", "server", "speed", "memory"])
def test_a_bench_does_not_write_over_other_results(name, measured, tmp_path):
    (tmp_path / "results.json").write_text("mine")
    done = bench(name, "--out", tmp_path)
    assert isinstance(done.exception, InputError) and "not an empty folder" in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"] and measured == []
    assert (tmp_path / "results.json").read_text() == "mine"


@pytest.mark.parametrize("name", ["private", "tta", "continual"])
def test_a_bench_goes_on_with_its_own_results_only(name, tmp_path):
    (tmp_path / "cells").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    done = bench(name, "--out", tmp_path)
    assert isinstance(done.exception, InputError) and "notes.txt is in it" in str(done.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells", "notes.txt"]
    (tmp_path / "notes.txt").unlink()
    with cli._open_folder(name, tmp_path, own=cli.CELLS) as folder:
        assert folder == tmp_path.resolve()


def test_two_processes_do_not_share_a_folder(measured, tmp_path):
    with folders.alone(tmp_path):
        done = bench("memory", "--out", tmp_path)
        assert isinstance(done.exception, InputError) and f"process {os.getpid()}" in str(done.exception)
        assert (tmp_path / folders.LOCK).exists() and measured == []
    assert bench("memory", "--out", tmp_path).exit_code == 0


def test_only_what_this_process_made_is_removed(tmp_path):
    """A wrong option leaves no folder; an empty folder of the user's stays."""
    (tmp_path / "empty").mkdir()
    for out in ("empty", "made/here"):
        assert isinstance(bench("tta", "--stream", "no/such", "--out", tmp_path / out).exception, InputError)
        assert isinstance(bench("memory", "--clients", "few", "--out", tmp_path / out).exception, InputError)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"] and not any((tmp_path / "empty").iterdir())


def test_a_stopped_bench_says_that_finished_cells_are_kept(tmp_path):
    with pytest.raises(Stopped) as stop, cli._open_folder("private", tmp_path / "one", own=cli.CELLS) as out:
        cells.write(out / "cells" / "first.json", {})
        raise Stopped(15)
    assert "the same command goes on" in stop.value.advice and (tmp_path / "one" / "cells" / "first.json").exists()
    with pytest.raises(Stopped) as stop, cli._open_folder("server", tmp_path / "two"):
        raise Stopped(2)
    assert stop.value.advice == "" and not (tmp_path / "two").exists()


def test_private_cells_that_were_there_are_counted_and_not_told_of(tmp_path, monkeypatch):
    def cell(*where: Any) -> dict[str, Any]:
        _, name, epsilon, rate, seed, _ = where
        return {"method": name, "epsilon": epsilon, "lr": rate, "seed": seed, "final": 50.0, "frozen": 1.0}

    monkeypatch.setattr(private, "cell", cell)
    for name in private.METHODS:
        there = private.folder_of(tmp_path / "cells", name, 1.0, 0.25, 0, True)
        there.mkdir(parents=True)
        (there / "summary.json").write_text(json.dumps(SUMMARY))
    told: list[str] = []
    private.run(tmp_path, 2, True, told.append)
    assert len(told) == 12 and told[0].startswith("5/16 FedIT epsilon 1 lr 0.25 seed 1: 50.0 %")
    assert told[-1].startswith("16/16 ") and "left" not in told[-1]
