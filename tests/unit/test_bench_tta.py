"""The test-time benchmark: cells, their results, refusals, resuming; streams and methods by name."""

from __future__ import annotations

import json
import math
import shutil
from html import escape

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fedpeft.cli.main import app
from fedpeft.data import drift
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from fedpeft.simulations.benchmarks import tta, tta_report, tta_streams
from fedpeft.simulations.benchmarks.cells import entries, named
from fedpeft.simulations.benchmarks.tta_streams import open_stream
from fedpeft.tta.deployed import deploy

SMALL = drift.StreamSpec("iid", corruptions=("blur", "fog"), limit=60, batch=25)
METHODS = "bn_adapt,tent,lame:base=bn_adapt"


class Net(nn.Module):
    """A linear classifier of images, with a batch norm or a layer norm before it."""

    def __init__(self, norm: nn.Module, seed: int) -> None:
        super().__init__()
        self.norm, self.head = norm, nn.Linear(64, 10)
        draws = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(10, 64, generator=draws))
            self.head.bias.zero_()

    def forward(self, pixel_values):
        return self.head(self.norm(pixel_values.flatten(1)))


class Hand:
    """A stream family whose models cost nothing; `shift` moves the labels of its streams."""

    name, models, augment = "hand", ("norms", "layers"), "small_image"

    def __init__(self, shift: int = 0) -> None:
        self.shift, self.made = shift, 0

    def manifest(self, seed):
        return drift.manifest(drift.replace(SMALL, seed=seed))

    def load(self, plan):
        stream = drift.load(plan)
        return drift.replace(stream, labels=(stream.labels + self.shift) % 10)

    def source(self, model, seed, folder):
        self.made += 1
        net = Net(nn.BatchNorm1d(64) if model == "norms" else nn.LayerNorm(64), seed)
        inputs = {"pixel_values": torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(1))}
        return deploy(net, head="head"), Encoded(inputs, torch.arange(30) % 10 % 9)


@pytest.fixture
def hand(monkeypatch, unpainted):
    """Every stream is a new `Hand`; the ones made, in order."""
    made: list[Hand] = []

    def opened(text, quick=False):
        made.append(Hand())
        return made[-1]

    monkeypatch.setattr(tta_streams, "open_stream", opened)
    return made


@pytest.fixture
def played(monkeypatch):
    """Full results of the streams that were played, in order."""
    found: list[dict] = []

    def spied(*arguments, **options):
        found.append(play(*arguments, **options))
        return dict(found[-1])

    play = tta.run_stream
    monkeypatch.setattr(tta, "run_stream", spied)
    return found


# Names ----------------------------------------------------------------------------------------------------------------


def test_lists_keep_options_with_their_entry():
    assert entries("a, b:x=1,y=2 ,c") == ["a", "b:x=1,y=2", "c"] and entries("") == []
    assert entries("lame:base=bn_adapt,lambda=2,tent:lr=0.1") == ["lame:base=bn_adapt,lambda=2", "tent:lr=0.1"]
    assert named("b:x=1,y=0.5,z=null") == ("b", {"x": "1", "y": "0.5", "z": "null"}) and named("a") == ("a", {})


def test_every_kind_of_built_in_stream_has_a_name_and_its_plan_is_that_of_drift():
    for kind in drift.KINDS:
        assert open_stream(f"digits-c/{kind}").name == f"digits-c/{kind}"
    bench = open_stream("digits-c/dirichlet:batch=16,delta=0.1,limit=40,corruptions=blur+fog,severity=5")
    assert bench.name == "digits-c/dirichlet:batch=16,corruptions=blur+fog,delta=0.1,limit=40"
    spec = drift.StreamSpec("dirichlet", seed=3, batch=16, delta=0.1, limit=40, corruptions=("blur", "fog"))
    assert bench.manifest(3) == drift.manifest(spec) and open_stream(bench.name).name == bench.name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits-d/iid", "digits-c/iid"),
        ("digits-c/gradul", "Did you mean 'gradual'"),
        ("digits-c", "kind"),
        ("digits-c/iid:batch=300", "batch: 300 is out of range"),
        ("digits-c/iid:tokens=3", "tokens"),
        ("vader/books", "Allowed: movie"),
        ("glyphs/text:corruptions=rain", "rain"),
        ("vader/movie:severity=2", "severity"),
        ("digits-c/iid:batch", "key=value"),
    ],
)
def test_a_wrong_stream_is_refused_by_name(name, message):
    with pytest.raises(InputError, match=message):
        open_stream(name)


def test_data_that_are_not_prepared_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPEFT_DATA", str(tmp_path))
    for name in ("vader", "debian", "glyphs", "fashion-mnist"):
        part = {"vader": "/movie", "debian": "/en", "glyphs": "/text"}.get(name, "")
        with pytest.raises(InputError, match=f"Run: fedpeft data prepare {name}"):
            tta.run(tmp_path / "out", name + part)


@pytest.mark.parametrize(
    ("methods", "message"),
    [("tant", "Did you mean 'tent'"), ("tent:lrr=1", "Did you mean 'lr'"), ("tent:lr=-1", "lr: -1.0 is out of range")],
)
def test_a_wrong_method_is_refused_before_anything_runs(methods, message, hand, tmp_path):
    with pytest.raises(InputError, match=message):
        tta.run(tmp_path, "hand", methods)
    assert not list(tmp_path.iterdir())


def test_baselines_always_run_and_models_must_exist(hand, tmp_path):
    assert tta.asked_methods("tent,source", False) == [*tta.BASELINES, "tent"]
    assert set(tta.asked_methods("", False)) >= {"cotta", "petal", "lame", "itta"}
    with pytest.raises(InputError, match="Allowed: norms, layers"):
        tta.run(tmp_path, "hand", models="vit")


# Cells ----------------------------------------------------------------------------------------------------------------


def test_results_hold_every_cell_with_scores_cost_and_plan(hand, played, tmp_path):
    results = tta.run(tmp_path, "hand", METHODS, "norms", 2)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results, allow_nan=False))
    rows = results["rows"]
    assert [(row["method"], row["seed"]) for row in rows] == [
        (name, seed) for seed in (0, 1) for name in (*tta.BASELINES, "bn_adapt", "tent", "lame:base=bn_adapt")
    ]
    sizes = [25, 25, 10, 25, 25, 10]
    for row, result in zip(rows, played, strict=True):
        assert row["refused"] is None and row["stream"] == "hand" and row["model"] == "norms"
        assert math.isclose(row["error"], np.average(row["curve"], weights=sizes), rel_tol=1e-5)
        assert math.isclose(row["error"], np.mean(list(row["domains"].values())), rel_tol=1e-5)
        assert all(row[key] == result[key] for key in ("error", "nll", "brier", "ece", "worst_window", "curve"))
        assert row["segments"] == [["blur-5", 0], ["fog-5", 3]] and row["parameters"] == 2 * 64 + 650
        plan = json.loads((tmp_path / "manifests" / f"hand-seed{row['seed']}.json").read_text())
        assert row["plan_sha256"] == plan["plan_sha256"] == Hand().manifest(row["seed"])["plan_sha256"]
    tent, average = (next(row for row in rows if row["method"] == name) for name in ("tent", "aug_average"))
    assert tent["cost"]["forwards"] == tent["cost"]["backwards"] == 6 and tent["cost"]["held"] == 3 * 128
    assert average["cost"]["forwards"] == 24 and average["options"] == {"augment": "small_image"}
    assert rows[6]["options"] == {"base": "bn_adapt"} and tent["options"] == {}
    assert len({row["model_sha256"] for row in rows}) == 2, "a source model a seed"
    errors = {row["method"]: row["error"] for row in rows[:7]}
    assert len(set(errors.values())) > 3, errors


def test_a_method_that_cannot_run_has_a_row_with_the_reason(hand, tmp_path):
    results = tta.run(tmp_path, "hand", "bn_adapt,tent:adapt=lora,itta,tent", "layers", 1)
    refused = {row["method"]: row["refused"] for row in results["rows"] if row["refused"]}
    assert set(refused) == {"bn_adapt", "tent:adapt=lora", "itta"}
    assert "no batch norms" in refused["bn_adapt"] and "matches none" in refused["tent:adapt=lora"]
    assert "no list of blocks" in refused["itta"]
    page = (tmp_path / "report.html").read_text()
    assert all(escape(reason) in page for reason in refused.values())
    lines = {row["method"]: tta_report.line(row) for row in results["summary"]}
    assert lines["bn_adapt"][-1].startswith("refused: the model has no batch norms")
    assert len(results["rows"]) == 8 and "refused" not in lines["tent"][-1]
    assert "no reset" in lines["rdumb"][-1]


def test_finished_cells_are_read_and_missing_ones_are_run(hand, played, tmp_path):
    told: list[str] = []
    first = tta.run(tmp_path, "hand", METHODS, "norms", 1, tell=told.append)
    assert len(told) == len(played) == 7 and hand[0].made == 1
    assert tta.run(tmp_path, "hand", METHODS, "norms", 1, tell=told.append) == first
    assert len(told) == len(played) == 7 and hand[1].made == 0, "nothing was made that nothing needs"
    gone = tmp_path / "cells" / "hand-norms-tent-seed0.json"
    gone.unlink()
    again = tta.run(tmp_path, "hand", METHODS, "norms", 2, tell=told.append)
    assert [line.split(":")[0] for line in told[7:9]] == [
        "6/14 hand norms seed 0 tent",
        "8/14 hand norms seed 1 source",
    ]
    assert len(told) == len(played) == 7 + 1 + 7
    rows = [{key: value for key, value in row.items() if key != "cost"} for row in again["rows"][:7]]
    assert rows == [{key: value for key, value in row.items() if key != "cost"} for row in first["rows"]]


def test_cells_and_manifests_of_another_plan_are_refused(hand, tmp_path):
    tta.run(tmp_path, "hand", "tent", "norms", 1)
    path = tmp_path / "manifests" / "hand-seed0.json"
    plan = json.loads(path.read_text())
    path.write_text(json.dumps({**plan, "label": plan["label"][::-1]}))
    with pytest.raises(InputError, match="the plan does not fit its hash"):
        tta.run(tmp_path, "hand", "tent", "norms", 1)
    path.write_text(json.dumps(drift.manifest(drift.replace(SMALL, seed=9))))
    with pytest.raises(InputError, match="another plan_sha256"):
        tta.run(tmp_path, "hand", "tent", "norms", 1)
    path.write_text(json.dumps(plan))
    cell = tmp_path / "cells" / "hand-norms-tent-seed0.json"
    cell.write_text(json.dumps({**json.loads(cell.read_text()), "options": {"lr": 1.0}}))
    with pytest.raises(InputError, match="another options"):
        tta.run(tmp_path, "hand", "tent", "norms", 1)


def test_labels_reach_the_scores_and_not_the_methods(played, monkeypatch, tmp_path):
    for shift in (0, 3):
        monkeypatch.setattr(tta_streams, "open_stream", lambda text, quick=False, shift=shift: Hand(shift))
        tta.run(tmp_path / str(shift), "hand", f"{METHODS},rotta,eata", "norms", 1)
    count = len(played) // 2
    assert count == 9
    for one, two in zip(played[:count], played[count:], strict=True):
        assert one["batches"] == two["batches"], "entropies, classes and changed labels of every batch"
        assert one["nll"] != two["nll"]


# Report ---------------------------------------------------------------------------------------------------------------


def row(method, seed, error, **more):
    base = {
        "stream": "s",
        "model": "m",
        "method": method,
        "seed": seed,
        "refused": None,
        "error": error,
        "nll": 1.0,
        "brier": 0.5,
        "ece": 0.1,
        "worst_window": 0.6,
        "domains": {"a": error, "b": error},
        "parameters": 10,
        "cost": {"forwards": 8, "rows": 80, "backwards": 2, "resets": 0, "held": 5, "cpu_seconds": 3.0},
        "rows": 40,
        "curve": [0.0, 1.0, 0.5, 0.5],
        "segments": [["a", 0], ["b", 2]],
        "skipped": 1,
    }
    return {**base, **more}


def test_means_and_paired_differences_by_hand():
    rows = [
        row("source", 0, 0.5),
        row("source", 1, 0.7),
        row("x", 0, 0.4),
        row("x", 1, 0.4),
        {"stream": "s", "model": "m", "method": "y", "seed": 0, "refused": "no"},
    ]
    source, x, y = tta_report.summary(rows)
    assert math.isclose(source["error"], 0.6) and math.isclose(source["error_sd"], math.sqrt(0.02))
    assert math.isclose(x["difference"], -0.2) and math.isclose(x["difference_error"], 0.1)
    assert (x["forwards"], x["backwards"], x["rows"], x["copies"], x["skipped"]) == (2.0, 0.5, 2.0, 0.5, 0.25)
    assert y["refused"] == "no" and y["seeds"] == 0
    assert tta_report.lead([source, x, y]) == tta_report.sentence([source, x, y])
    worse = tta_report.summary([*rows[:2], row("x", 0, 0.6), row("x", 1, 0.81)])
    assert "two standard errors: x" in tta_report.sentence(worse)
    assert tta_report.summary(rows[:1])[0]["error_sd"] is None
    assert tta_report.line(x)[:3] == ["x", "40.0 ± 0.0", "-20.0 ± 10.0"] and "25 %" in tta_report.note(x)


def test_who_is_level_with_the_best_is_said():
    def errors(method, *values):
        return [row(method, seed, value) for seed, value in enumerate(values)]

    rows = [*errors("source", 0.5, 0.52, 0.51), *errors("x", 0.4, 0.41, 0.42), *errors("y", 0.42, 0.41, 0.41)]
    found = tta_report.summary([*rows, *errors("z", 0.44, 0.45, 0.46)])
    assert [row.get("level") for row in found] == [None, ["y"], None, None]  # z is behind in each seed by as much
    wanted = "Lowest error: x, 41.0 %; within two standard errors of it: y; without adaptation 51.0 %."
    assert tta_report.sentence(found) == wanted
    one = tta_report.summary([row("source", 0, 0.5), row("x", 0, 0.4), row("y", 0, 0.4), row("z", 0, 0.41)])
    assert one[1]["level"] == ["y"]  # one seed has no error: only what is equal is level


def test_the_curve_is_averaged_within_a_domain(monkeypatch):
    monkeypatch.setattr(tta_report, "WINDOW", 20)  # two batches of ten rows
    given = row("x", 0, 0.5, curve=[0.0, 1.0, 0.5, 0.25, 0.75, 0.25], rows=60, segments=[["a", 0], ["b", 3]])
    assert tta_report.smooth(given) == [0.0, 0.5, 0.75, 0.25, 0.5, 0.5]


def test_the_page_is_made_of_results_alone(hand, tmp_path):
    tta.run(tmp_path / "run", "hand", "tent,bn_adapt", "norms,layers", 1)
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "run" / "results.json", tmp_path / "copy")
    files = tta_report.write(tmp_path / "copy")
    drawn = [
        f"{name}.{suffix}"
        for number in (0, 1)
        for name in (f"stream-{number}", f"cost-{number}")
        for suffix in ("png", "svg", "pdf")
    ]
    assert [path.name for path in files] == [*drawn, "report.html"]
    page = files[-1].read_text()
    assert page == (tmp_path / "run" / "report.html").read_text() and page.count("data:image/svg") == 4
    assert '<p class="lead">Lowest error. hand, norms: ' in page and "; hand, layers: " in page
    assert "http" not in page and "Nothing was tuned on a test stream" in page and "hand, layers" in page
    with pytest.raises(InputError, match="there are no results"):
        tta_report.write(tmp_path)


def test_a_quick_run_of_the_command_from_end_to_end(tmp_path):
    given = ["bench", "tta", "--stream", "digits-c/iid", "--models", "cnn", "--seeds", "1", "--quick", "--out"]
    done = CliRunner().invoke(app, [*given, str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    error = {row["method"]: row["error"] for row in results["rows"]}
    assert set(error) == {*tta.BASELINES, *tta.QUICK} and results["quick"]
    assert error["bn_adapt"] < error["source"] - 0.1, "batch statistics help under noise and low contrast"
    assert error["lame"] != error["source"]
    shown = CliRunner().invoke(app, [*given, str(tmp_path / "out")])
    assert "aug_average" in shown.stdout and "REPRODUCE: fedpeft bench tta" in shown.stdout
    wrong = CliRunner().invoke(app, ["bench", "tta", "--stream", "digits", "--out", str(tmp_path / "other")])
    assert wrong.exit_code != 0 and "digits-c/iid" in str(wrong.exception) + wrong.output
