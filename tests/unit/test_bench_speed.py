"""The speed benchmark: engines get the same work and agree before they are timed, and rows say what was measured."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedpeft.errors import InputError, RunError
from fedpeft.simulations.benchmarks import memory, speed, speed_limit, whole_run
from fedpeft.simulations.benchmarks.speed_engines import ENGINES, Ours, adapted, make
from fedpeft.simulations.benchmarks.speed_work import work

CPU = torch.device("cpu")
HERE = ["peft", "sequential", "cohort", "cohort-dp", "opacus", "opacus-ghost"]


@pytest.fixture(scope="module")
def start():
    return adapted("tiny", CPU, torch.float32).state().tensors


def test_engines_agree_in_float64():
    assert speed.check(HERE, CPU) < 1e-12


@pytest.mark.parametrize("broken", ["lost step", "not private", "other client", "untrained"])
def test_nothing_is_timed_when_an_engine_is_wrong(broken, monkeypatch):
    def cohort(self, given):
        if broken == "lost step":
            given = work(given.start, 5, 2, 12, 3, sigma=0.0, clip=0.3)
        ends = right(Ours(self.name, CPU, torch.float64, tokens=self.tokens), given)
        if broken == "other client":
            ends[0], ends[1] = ends[1], ends[0]
        return [given.start] * 5 if broken == "untrained" else ends

    right, init = Ours.__call__, Ours.__init__

    def remember(self, name, *arguments, **options):
        self.name = name
        init(self, name, *arguments, **options)

    monkeypatch.setattr(Ours, "__init__", remember)
    if broken == "not private":
        monkeypatch.setitem(ENGINES, "cohort-dp", (Ours, {}, True))
    else:
        made = type("Broken", (Ours,), {"__call__": cohort})
        monkeypatch.setitem(ENGINES, "cohort", (made, {}, False))
    with pytest.raises(RunError, match=r"nothing was timed"):
        speed.check(["cohort-dp" if broken == "not private" else "cohort"], CPU)


def test_engines_take_the_same_number_of_records(start):
    """Fixed batches, and Poisson draws that differ in size, but hold as many in all, to one percent."""
    given = work(start, 8, 2, 8, 3)
    for dp in (False, True):
        sizes = [len(index) for client in range(8) for index in given.drawn(client, dp)]
        assert len(sizes) == 24 and sum(sizes) == 48
        assert (len(set(sizes)) > 1) == dp
    again = [np.concatenate(given.drawn(client, True)).tolist() for client in range(8)]
    assert again == [np.concatenate(given.drawn(client, True)).tolist() for client in range(8)]
    assert len({tuple(draw) for draw in again}) == 8


def test_our_private_engine_takes_the_draws_that_opacus_gets(start, monkeypatch):
    from fedpeft.privacy.plan import Plan

    given, taken, sample = work(start, 2, 2, 8, 3), [], Plan.sample
    wanted = [given.drawn(client, True) for client in range(2)]
    monkeypatch.setattr(Plan, "sample", lambda *a: taken.append(sample(*a)) or taken[-1])
    Ours("tiny", CPU, torch.float32, dp=True)(given)
    assert sorted(map(list, taken)) == sorted(list(index) for own in wanted for index in own)


def test_times_of_a_race(start, monkeypatch):
    """Every engine runs the case once a repeat, in turn first; a ratio is the median of the repeats' ratios."""
    ran = []
    built = {name: lambda given, name=name: ran.append((name, len(given.data))) for name in ("peft", "cohort")}
    speed.race(built, SimpleNamespace(start=start, data=[0] * 5, config=None, plan=None, seed=0), 2, CPU)
    assert ran[:2] == [("peft", 2), ("cohort", 2)]
    assert [name for name, count in ran if count == 5] == ["peft", "cohort", "cohort", "peft"]
    times = {"peft": [(4.0, 2.0), (6.0, 3.0), (8.0, 4.0)], "cohort": [(2.0, 2.0), (2.0, 1.0), (1.0, 2.0)]}
    first, second = speed.summarise(times, {"peft": 1.0, "cohort": None}, "peft")
    assert (first["seconds"], first["cpu_seconds"], first["ratio_to_sequential"]) == (6.0, 3.0, 1.0)
    assert (second["seconds"], second["ratio_to_sequential"], second["cpu_ratio_to_sequential"]) == (2.0, 3.0, 2.0)
    assert speed.summarise({"cohort": times["cohort"]}, {"cohort": None}, "peft")[0]["ratio_to_sequential"] is None


def test_results_table_and_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "_child", lambda name, case, device: 7.5)
    monkeypatch.setattr(speed, "check", lambda names, device: 1e-16)
    results = speed.run(tmp_path, quick=True)
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == results["rows"]
    assert [row["engine"] for row in results["rows"]] == HERE * 2
    assert [row["dp"] for row in results["rows"][:6]] == [False] * 3 + [True] * 3
    row = results["rows"][2]
    assert (row["model"], row["clients"], row["batch"], row["seq"], row["peak_mb"]) == ("tiny", 3, 1, 16, 7.5)
    assert row["seconds"] > 0 and row["cpu_ratio_to_sequential"] > 0
    assert "--engines peft,sequential,cohort" in results["reproduce"] and results["reproduce"].endswith("--quick")
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"
    speed.show(results)
    assert "cohort" in capsys.readouterr().out
    assert all(row["products_seconds"] > 0 for row in results["rows"])
    (table,) = tmp_path.glob("*.md")  # named after this machine, and no other's
    assert table.stem == re.sub(r"[^a-z0-9]+", "-", speed_limit.machine_name(CPU).lower()).strip("-")
    text = table.read_text()
    assert results["machine"] in text and results["reproduce"] in text and text.count("| tiny |") == len(HERE) * 2


def test_the_bare_products_are_those_that_the_base_makes_while_it_trains(start):
    """The tiny BERT: 2 blocks of width 32 and 64, 16 tokens; LoRA on query and value: block 0 has no slope before."""
    one = work(start, 1, 1, 16, 1)
    found = speed_limit.products_of(make("peft", "tiny", CPU), one)
    assert {tuple(product)[:4]: count for product, count in found.items()} == {
        (16, 32, 32, False): 3,  # query, key and value of block 0
        (16, 32, 32, True): 5,  # its output, and all four of block 1
        (16, 64, 32, True): 2,
        (16, 32, 64, True): 2,
        (1, 32, 32, True): 1,  # the pooler
    }
    together = speed_limit.products_of(make("cohort", "tiny", CPU), work(start, 3, 1, 16, 1))
    assert together[speed_limit.Product(48, 32, 32, False, torch.float32)] == 3  # three clients in one pass
    flops = [sum(count * p.rows * p.outputs * p.width for p, count in each.items()) for each in (found, together)]
    assert flops[1] < 3 * flops[0]  # what only the first token needs is not made for the others


def test_a_share_is_of_the_products_in_the_row():
    assert speed_limit.share({"cpu_seconds": 4.0, "products_seconds": 3.0}) == "75"
    assert speed_limit.share({"cpu_seconds": 4.0}) == ""
    product = speed_limit.Product(64, 32, 32, True, torch.float32)
    assert (
        0
        < speed_limit.bare_seconds(Counter({product: 1}), CPU)
        < speed_limit.bare_seconds(Counter({product: 10_000}), CPU)
    )


def test_memory_is_that_of_a_fresh_process_and_above_the_model():
    """What this process has held does not count, nor do the libraries: activations of 256 x 64 tokens do."""
    held = torch.ones(100_000_000)
    case = {"model": "tiny", "clients": 1, "batch": 256, "seq": 64}
    least = 256 * 64 * 2 * 13 * 32 * 4 / 1e6
    assert least < speed._child("peft", case, "cpu") < 200
    del held


def test_bad_options(tmp_path):
    for options, told in (
        ({"engines": ("cohort", "flute")}, "flute"),
        ({"models": ("gpt",)}, "roberta-base"),
        ({"models": ()}, "none"),
        ({"batch": (0,)}, "at least 1"),
        ({"clients": ()}, "clients"),
        ({"engines": ("graphs",), "device": "cpu"}, "CUDA"),
    ):
        with pytest.raises(InputError, match=told):
            speed.run(tmp_path, **options)
    with pytest.raises(InputError, match="from 1"):
        memory.run(tmp_path, ())


def test_pfl_is_asked_for_by_name_or_when_it_is_installed(tmp_path, monkeypatch, unpainted):
    asked = []
    monkeypatch.setattr(speed.whole_run, "prepare", lambda *_: None)
    monkeypatch.setattr(
        speed.whole_run,
        "measure",
        lambda engine, *_: asked.append(engine) or {"seconds": 1.0, "cpu_seconds": 1.0, "peak_mb": 1.0},
    )
    monkeypatch.setattr(speed, "make", lambda *_: lambda work: [])
    monkeypatch.setattr(speed.speed_limit, "products_of", lambda *_: Counter())
    monkeypatch.setattr(speed, "check", lambda *_: 0.0)
    monkeypatch.setattr(speed, "_child", lambda *_: 1.0)
    monkeypatch.setattr(speed, "_installed", lambda package: package != "pfl")
    monkeypatch.setattr(speed.rates, "choose", lambda found: "float32")  # whichever is faster here
    with pytest.raises(InputError, match="pip install --no-deps pfl"):
        speed.run(tmp_path, engines=("simulate", "pfl"))
    options = {"models": ("tiny",), "clients": (1,), "batch": (1,), "repeats": 1, "seq": 4}
    speed.run(tmp_path, **options)
    assert asked == ["simulate", "flower"]
    monkeypatch.setattr(speed, "_installed", lambda package: True)
    speed.run(tmp_path, **options)
    assert asked[2:] == ["simulate", "flower", "pfl"]
    monkeypatch.setattr(speed.rates, "choose", lambda found: "bfloat16")
    assert {"simulate-auto", "cohort-bf16", "peft-bf16"} < set(speed.usable_engines(torch.device("cpu")))


def test_whole_runs_are_of_the_same_job(tmp_path):
    whole_run.prepare(tmp_path, "tiny", 3, 16)
    sizes = (tmp_path, 3, 2, 16, 5, 10, "cpu")
    our, their, pfl = (
        whole_run.ours(sizes[0], "auto", *sizes[1:]),
        whole_run.stock("flower", *sizes),
        whole_run.stock("pfl", *sizes),
    )
    config, job, other = (json.loads(Path(path).read_text()) for path in (our[4], their[3], pfl[3]))
    assert {**job, "out": ""} == {**other, "out": ""} and "flower_loop" in their[2] and "pfl_loop" in pfl[2]
    assert our[1:4] == ["-m", "fedpeft.cli.main", "simulate"]
    assert (config["model"]["name"], config["data"]["source"]) == (job["model"], job["train"])
    assert (config["client"]["local_steps"], config["run"]["rounds"]) == (job["steps"], job["rounds"]) == (5, 10)
    assert config["client"]["batch_size"] == job["batch"] == 2 and config["data"]["clients"] == job["clients"]
    from fedpeft import config as configs

    assert configs.load(our[4]).model.dtype == "auto"
    lines = (tmp_path / "train.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * whole_run.RECORDS and len(lines[1].partition(",")[0]) == 16


def test_a_whole_run_is_measured_with_all_its_processes():
    """The work is done by a grandchild whose parent never waits for it."""
    burn = "import time; b = bytearray(300_000_000); t = time.process_time()\nwhile time.process_time() < t + 2: pass"
    script = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {burn!r}]).wait()"
    outer = f"import signal, subprocess, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); exec({script!r})"
    measured = whole_run.watched([sys.executable, "-c", outer], {})
    assert 1.0 < measured["cpu_seconds"] < 10 and measured["seconds"] > 2 and 300 < measured["peak_mb"] < 600


def test_a_failed_whole_run_is_an_error():
    with pytest.raises(RunError, match="no such thing"):
        whole_run.watched([sys.executable, "-c", "raise SystemExit('no such thing')"], {})


def test_the_command_passes_its_options_on(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from fedpeft.cli.main import app

    given = []
    monkeypatch.setattr(speed, "run", lambda *a, tell, **options: given.append(options) or {"rows": []})
    options = ["--models", "S,minilm", "--clients", "8, 64", "--batch", "1", "--engines", "peft,flower"]
    done = CliRunner().invoke(app, ["bench", "speed", "--out", str(tmp_path), *options, "--repeats", "2", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout) == {"rows": []}
    assert given == [
        {
            "models": ("S", "minilm"),
            "clients": (8, 64),
            "batch": (1,),
            "engines": ("peft", "flower"),
            "repeats": 2,
            "seq": 64,
            "steps": 2,
            "quick": False,
            "device": "auto",
        }
    ]
    done = CliRunner().invoke(app, ["bench", "memory", "--out", str(tmp_path), "--clients", "few"])
    assert isinstance(done.exception, InputError)
