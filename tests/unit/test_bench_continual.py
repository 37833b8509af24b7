"""The continual benchmark: cells and their results, resuming, heads that are always there, refusals, the page."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from html import escape

import pytest
from typer.testing import CliRunner

from fedpeft.cli import catalogue
from fedpeft.cli.main import app
from fedpeft.continual import matrix
from fedpeft.continual.body import TrainConfig
from fedpeft.continual.learner import Learner
from fedpeft.continual.model import Plastic
from fedpeft.errors import InputError
from fedpeft.simulations.benchmarks import continual, continual_report
from support.hand_stream import CLASSES, WIDTH, Hand

FAST = "linear,ranpac:features=20"  # and lda, which is always there
FIGURES = continual_report.figures
SET = ["epochs=2", "batch_size=8", "lr=0.01"]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They take longer than the cells."""
    monkeypatch.setattr(continual_report, "figures", lambda results: {})


@pytest.fixture
def hand(monkeypatch):
    """Every stream is the one returned, which can be told its scenario."""
    source = Hand()
    monkeypatch.setattr(continual, "opened", lambda text, quick: ("hand", source))
    return source


@pytest.fixture
def trained(monkeypatch):
    """Body and heads of the learners that were run, in order, with the steps that each made."""
    found: list[list] = []
    run, step = Learner.run, Learner._step

    def running(learner, *arguments):
        found.append([type(learner.body).__name__, list(learner.heads), 0])
        return run(learner, *arguments)

    def stepping(learner, number):
        found[-1][2] += 1
        step(learner, number)

    monkeypatch.setattr(Learner, "run", running)
    monkeypatch.setattr(Learner, "_step", stepping)
    return found


def bench(out, bodies="frozen", heads=FAST, seeds=1, **more):
    return continual.run(out, "hand", bodies, heads, seeds, **{"settings": SET, **more})


def without_cost(row):
    """A row without what is timed, or says how it came about."""
    ledger = [{key: value for key, value in entry.items() if key != "train_cpu_s"} for entry in row["ledger"]]
    return {**{key: value for key, value in row.items() if key not in ("resumed", "shared_with")}, "ledger": ledger}


# Cells ----------------------------------------------------------------------------------------------------------------


def test_every_cell_has_the_matrix_of_its_learner_and_what_follows_from_it(hand, tmp_path):
    results = bench(tmp_path, "frozen,sequential:form=lora,r=2", seeds=2)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results, allow_nan=False))
    rows = results["rows"]
    bodies, heads = ("frozen", "sequential:form=lora,r=2"), ("linear", "ranpac:features=20", "lda")
    assert [(row["seed"], row["body"], row["head"]) for row in rows] == [
        (seed, body, head) for seed in (0, 1) for body in bodies for head in heads
    ]
    train = TrainConfig(epochs=2, batch_size=8, lr=0.01)
    for row in rows:
        made = Hand().build(row["seed"])
        name = row["head"].partition(":")[0]
        head = {"features": 20} if name == "ranpac" else {}
        body = {"form": "lora", "r": 2} if row["body"] != "frozen" else {}
        learner = Learner(
            made.stream,
            Plastic(made.base, made.layers),
            row["body"].partition(":")[0],
            {name: head},
            train,
            row["seed"],
            body,
        ).run()
        assert row["right"] == learner.right[name] and row["refused"] is None
        assert row["tests"] == [20, 20, 20] and row["train"] == asdict(train)
        found = matrix.summary(learner.right[name], [20, 20, 20])
        assert (row["metrics"], row["undefined"]) == (found["values"], found["undefined"])
        kept = 2 * WIDTH * 2 * 4 if body else 0
        assert sum(row["ledger"][-1]["stored_bytes"].values()) == kept and len(row["ledger"]) == 3
        assert row["ledger"][-1]["passes_per_prediction"] == 1 and row["ledger"][-1]["parameters"] == kept // 4
        sizes = {"linear": 4 * CLASSES * (WIDTH + 1), "lda": 8 * (CLASSES + CLASSES * WIDTH + WIDTH * WIDTH)}
        assert row["head_bytes"] == sizes.get(name, row["head_bytes"])
        manifest = json.loads((tmp_path / "manifests" / f"hand-seed{row['seed']}.json").read_text())
        assert manifest == json.loads(json.dumps(made.stream.manifest))
        assert row["manifest_sha256"] == continual._sha256(manifest)
        assert row["initial"] is None and row["undefined"]["fwt"]
    assert rows[3]["body_options"] == {"form": "lora", "r": 2, "alpha": 8.0} and rows[0]["body_options"] == {}
    assert len({row["manifest_sha256"] for row in rows}) == 2, "a stream a seed"
    assert rows[0]["right"] != rows[3]["right"] != rows[9]["right"]


def test_lda_and_ranpac_are_always_there_and_said_to_be(hand, tmp_path, monkeypatch):
    asked, added = continual.all_heads("linear,ncm")
    assert [head.text for head in asked] == ["linear", "ncm", "lda", "ranpac"] and added == ["lda", "ranpac"]
    own, none = continual.all_heads("lda:covariance=total,ranpac:features=9")
    assert [head.text for head in own] == ["lda:covariance=total", "ranpac:features=9"] and none == []
    assert {"lda", "ranpac"} <= {head.text for head in continual.all_heads("")[0]}
    results = bench(tmp_path, heads=FAST)
    assert results["added_heads"] == ["lda"] and [row["head"] for row in results["rows"]][-1] == "lda"
    assert "always in the table: lda" in (tmp_path / "report.html").read_text()


def test_heads_of_one_loss_share_a_training(hand, trained, tmp_path):
    results = bench(tmp_path, "sequential,er", f"{FAST},masked,lda:covariance=total,lda")
    assert [(name, heads) for name, heads, _ in trained] == [
        ("Sequential", ["linear", "ranpac", "lda"]),
        ("Sequential", ["masked"]),
        ("Sequential", ["lda"]),
        ("ER", ["linear", "ranpac", "masked", "lda"]),
        ("ER", ["lda"]),
    ]
    right = {(row["body"], row["head"]): row["right"] for row in results["rows"]}
    assert right["sequential", "linear"] != right["sequential", "masked"], "another loss, another training"
    assert right["er", "linear"] == right["er", "masked"], "replay decides the loss"
    assert results["rows"][0]["shared_with"] == ["ranpac:features=20", "lda:covariance=total"]


# Resume ---------------------------------------------------------------------------------------------------------------


def test_finished_cells_are_read_and_missing_ones_are_run(hand, trained, tmp_path):
    told: list[str] = []
    first = bench(tmp_path, "frozen,sequential", tell=told.append)
    assert hand.made == 1 and len(trained) == 2 and len(told) == 6
    assert bench(tmp_path, "frozen,sequential", tell=told.append) == first
    assert hand.made == 1 and len(trained) == 2 and len(told) == 6, "nothing is made that nothing needs"
    (tmp_path / "cells" / "hand-seed0-sequential-lda.json").unlink()
    again = bench(tmp_path, "frozen,sequential", seeds=2, tell=told.append)
    assert [heads for _, heads, _ in trained[2:]] == [["lda"], *[["linear", "ranpac", "lda"]] * 2]
    assert [line.split(":")[0] for line in told[6:8]] == [
        "6/12 hand seed 0 sequential lda",
        "7/12 hand seed 1 frozen linear",
    ]
    assert list(map(without_cost, again["rows"][:6])) == list(map(without_cost, first["rows"]))


def test_a_training_that_was_cut_off_goes_on_bit_for_bit(hand, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(continual, "CHECKPOINT_EVERY", 4)
    whole = bench(tmp_path / "whole", "sequential,lae")
    steps = [count for _, _, count in trained]
    trained.clear()
    step, left = Learner._step, [steps[0] + 14]  # in the middle of the second body's second task

    def cut(learner, number):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        step(learner, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Learner, "_step", cut)
        bench(tmp_path / "cut", "sequential,lae")
    assert len(list((tmp_path / "cut" / "cells").iterdir())) == 3 and len(list((tmp_path / "cut/state").iterdir())) == 1
    trained.clear()
    rest = bench(tmp_path / "cut", "sequential,lae")
    assert [(name, count) for name, _, count in trained] == [("LAE", steps[1] - 14)], "to the last four steps"
    assert [row["resumed"] for row in rest["rows"]] == 3 * [False] + 3 * [True]
    assert list(map(without_cost, rest["rows"])) == list(map(without_cost, whole["rows"]))
    assert not list((tmp_path / "cut" / "state").iterdir())


def test_cells_of_other_settings_or_another_stream_are_refused(hand, tmp_path):
    bench(tmp_path)
    with pytest.raises(InputError, match="another train"):
        bench(tmp_path, settings=["epochs=1"])
    cell = tmp_path / "cells" / "hand-seed0-frozen-lda.json"
    row = json.loads(cell.read_text())
    cell.write_text(json.dumps({**row, "head_options": {**row["head_options"], "ridge": 3.0}}))
    with pytest.raises(InputError, match="another head_options"):
        bench(tmp_path)
    shutil.rmtree(tmp_path / "cells")
    path = tmp_path / "manifests" / "hand-seed0.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 5'))
    with pytest.raises(InputError, match="another stream now"):
        bench(tmp_path)


# Refusals -------------------------------------------------------------------------------------------------------------


def test_what_does_not_go_together_has_a_row_with_the_reason(hand, tmp_path):
    results = bench(tmp_path, "conpet:batches=2,fsa:form=film,frozen")
    refused = {(row["body"], row["head"]): row["refused"] for row in results["rows"] if row["refused"]}
    assert set(refused) == {
        ("conpet:batches=2", "lda"),
        ("conpet:batches=2", "ranpac:features=20"),
        *(("fsa:form=film", head) for head in ("linear", "lda", "ranpac:features=20")),
    }
    assert "predicts by itself" in refused["conpet:batches=2", "lda"]
    assert "no normalisation layers" in refused["fsa:form=film", "linear"], "known once it has begun"
    page = (tmp_path / "report.html").read_text()
    assert all(escape(reason) in page for reason in refused.values())
    line = continual_report.line(next(row for row in results["summary"] if row["refused"]), ["acc_micro"])
    assert line[:3] == ["conpet:batches=2", "ranpac:features=20", "refused"] and len(line) == 7
    conpet = results["rows"][0]
    assert conpet["refused"] is None and conpet["head_bytes"] == 0, "its experts have their own classifiers"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "digits6"}, "--stream: 'digits6'.*Did you mean 'digits5'"),
        ({"name": "glyph1d:task=3"}, "--stream glyph1d: 'task'.*Did you mean 'tasks'"),
        ({"name": "glyph1d:tasks=50"}, "--stream glyph1d.tasks: 50 is out of range"),
        ({"name": "records:scenario=domain"}, "needs a column"),
        ({"bodies": "cosso"}, "--bodies: 'cosso'.*Did you mean 'coso'"),
        ({"bodies": "frozen,coso:sid=in"}, "--bodies coso: 'sid'.*Did you mean 'side'"),
        ({"bodies": "coso:side=up"}, "--bodies coso.side: 'up'"),
        ({"bodies": "coso:side"}, "key=value"),
        ({"heads": "lde"}, "--heads: 'lde'"),
        ({"heads": "lda:ridge=-1"}, "--heads lda.ridge: -1.0 is out of range"),
        ({"settings": ["epoch=3"]}, "--set: 'epoch'.*Did you mean 'epochs'"),
        ({"settings": ["lr=0"]}, "--set.lr: 0.0"),
        ({"settings": ["lr"]}, "key=value"),
        ({"seeds": 0}, "--seeds: 0"),
    ],
)
def test_what_was_written_wrong_is_named_before_anything_runs(given, message, tmp_path):
    with pytest.raises(InputError, match=message):
        continual.run(tmp_path, **{"name": "glyph1d", **given})
    assert not list(tmp_path.iterdir())


def test_settings_are_those_of_the_stream_then_those_given():
    assert continual.training("glyph1d", [], False) == TrainConfig(epochs=10, lr=4e-3, temperature=3.0)
    assert continual.training("glyph1d", ["epochs=4"], True) == TrainConfig(epochs=4, lr=4e-3, temperature=3.0)
    assert continual.training("records", [], False) == TrainConfig()
    name, source = continual.opened("glyph1d:train=60,tasks=20", False)
    assert name == "glyph1d:tasks=20" and source.config.tasks == 20
    assert continual.opened("glyph1d:tasks=5", True)[0] == "glyph1d:tasks=5,train=8,test=5"


# Scenarios ------------------------------------------------------------------------------------------------------------


def test_accuracy_before_the_first_task_is_measured_where_it_means_something(hand, tmp_path):
    hand.scenario = "domain"
    rows = {row["head"]: row for row in bench(tmp_path, "sequential")["rows"]}
    made = Hand("domain").build(0)
    learner = Learner(made.stream, Plastic(made.base, made.layers), "sequential", {"linear": {}}, TrainConfig(), 0)
    logits = [learner.classifier(learner.model.features(task.test.inputs)) for task in made.stream.tasks]
    right = [
        int((found.argmax(1) == task.test.labels).sum()) for found, task in zip(logits, made.stream.tasks, strict=True)
    ]
    assert rows["linear"]["initial"] == right and sum(right) > 0
    linear = rows["linear"]
    assert linear["metrics"]["fwt"] == pytest.approx((linear["right"][0][1] - right[1]) / linear["tests"][1])
    assert rows["lda"]["initial"] is None and "not measured" in rows["lda"]["undefined"]["fwt"]


def test_a_stream_without_boundaries_has_a_auc_and_refuses_bodies_that_need_them(hand, tmp_path):
    hand.scenario = "free"
    results = bench(tmp_path, "sequential,fsa", settings=["epochs=1", "batch_size=8"])
    ran, refused = results["summary"][:3], results["summary"][3:]
    assert all(row["metrics"]["a_auc"] is not None for row in ran) and ran[0]["metrics"]["bwt"] is None
    assert all("to be told when a task begins" in row["refused"] for row in refused)
    assert results["rows"][0]["records"] == [40, 40, 40] and "forgetting" not in FIGURES(results)
    assert continual_report.heads_of(ran, continual_report.SHORT) == ["acc_micro", "aia_micro", "a_auc"]


def test_validation_holds_out_training_records_and_says_so(hand, tmp_path):
    results = bench(tmp_path, validation=True)
    assert results["rows"][0]["tests"] == [8, 8, 8] and results["rows"][0]["validation"]
    assert "held-out part of the training set" in (tmp_path / "report.html").read_text()
    assert "--validation" in results["reproduce"]
    tested = bench(tmp_path)
    assert tested["rows"][0]["tests"] == [20, 20, 20] and "--validation" not in tested["reproduce"]
    assert "evaluated on the test set" in (tmp_path / "report.html").read_text()


# Report ---------------------------------------------------------------------------------------------------------------


def test_the_page_is_made_of_results_alone(hand, tmp_path, monkeypatch):
    monkeypatch.setattr(continual_report, "figures", FIGURES)
    bench(tmp_path / "run", "frozen,sequential", seeds=2)
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "run" / "results.json", tmp_path / "copy")
    files = continual_report.write(tmp_path / "copy")
    drawn = [f"{name}.{suffix}" for name in ("tasks", "forgetting", "matrices") for suffix in ("png", "svg", "pdf")]
    assert [path.name for path in files] == [*drawn, "report.html"]
    page = files[-1].read_text()
    assert page == (tmp_path / "run" / "report.html").read_text() and page.count("data:image/svg") == 3
    heads = page.partition("<table>")[2].partition("</tr>")[0]
    assert heads.index("against frozen") < heads.index("kB") < heads.index("acc_micro")  # what decides comes first
    assert "http" not in page and "fedpeft bench continual --stream hand" in page and "ranpac:features=20" in page
    with pytest.raises(InputError, match="there are no results"):
        continual_report.write(tmp_path)


def test_a_quick_run_of_the_command_from_end_to_end(tmp_path):
    given = [
        "bench",
        "continual",
        "--stream",
        "glyph1d:tasks=2",
        "--bodies",
        "frozen",
        "--heads",
        "linear,ranpac:features=50",
        "--set",
        "batch_size=16",
        "--seeds",
        "1",
        "--quick",
        "--out",
    ]
    done = CliRunner().invoke(app, [*given, str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    assert results["quick"] and results["train"]["batch_size"] == 16 and results["train"]["epochs"] == 1
    scores = {row["head"]: row["metrics"]["acc_micro"] for row in results["rows"]}
    assert set(scores) == {"linear", "ranpac:features=50", "lda"} and scores["lda"] > 0.5
    shown = CliRunner().invoke(app, [*given, str(tmp_path / "out")])
    assert "REPRODUCE: fedpeft bench continual --stream glyph1d:tasks=2 --bodies frozen" in shown.stdout
    assert not math.isclose(scores["linear"], scores["lda"])


# Catalogue ------------------------------------------------------------------------------------------------------------


def test_bodies_heads_and_streams_are_listed_and_shown():
    tables = {
        name: {row["name"]: row for row in catalogue.entries(name)[name]} for name in ("bodies", "heads", "streams")
    }
    assert {"coso", "frozen"} <= set(tables["bodies"]) and {"lda", "ranpac"} <= set(tables["heads"])
    assert {"digits5", "wordnet"} <= set(tables["streams"]) and tables["bodies"]["factor_coso"]["federates"]
    coso = catalogue.describe("coso")
    assert coso["table"] == "bodies" and "side" in {item["name"] for item in coso["options"]}
    helps = {item["name"]: item["help"] for item in coso["options"]}
    assert "in a federation only" in helps["basis"] and "for one learner only" in helps["r1"]
    assert "P stays for a task" in coso["description"] and not coso["also"]
    assert "no, it penalises" in " ".join(catalogue.describe("olora")["notes"])
    assert "raw" in " ".join(catalogue.describe("er")["notes"])
