"""`fedpeft bench private`: its grid, one real grid of tiny cells, what an interruption leaves, claims by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from fedpeft import config as configs
from fedpeft.cli.main import app
from fedpeft.errors import InputError
from fedpeft.record import report
from fedpeft.simulations import run as runs
from fedpeft.simulations.benchmarks import private

SMALL = {
    "data.limit": 60,
    "data.clients": 2,
    "client.batch_size": 8,
    "client.local_steps": 1,
    "run.rounds": 1,
    "privacy.accountant": "rdp",
}


# The grid -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cells(monkeypatch) -> list[tuple[Any, ...]]:
    """Cells asked for, of which none is run: accuracies are written down beforehand."""
    points = {"FedIT": 50.0, "FFA": 60.0, "FFA orthonormal": 71.0, "FedSVD": 70.0}
    asked: list[tuple[Any, ...]] = []

    def cell(folder: Path, name: str, epsilon: float, rate: float, seed: int, quick: bool) -> dict[str, Any]:
        asked.append((name, epsilon, rate, seed))
        bonus = seed if name == "FedSVD" else 0.0
        return {
            "method": name,
            "epsilon": epsilon,
            "lr": rate,
            "seed": seed,
            "final": points[name] + epsilon + bonus,
            "frozen": 10.0,
            "epsilon_spent": epsilon,
            "bytes_up": 1,
            "seconds": 1.0,
        }

    monkeypatch.setattr(private, "cell", cell)
    return asked


@pytest.mark.parametrize(
    ("quick", "epsilons", "rates"), [(False, (1.0, 3.0, 6.0), (0.125, 0.25, 0.5)), (True, (1.0, 6.0), (0.25,))]
)
def test_every_rule_runs_at_every_epsilon_rate_and_seed(quick, epsilons, rates, cells, tmp_path):
    results = private.run(tmp_path, seeds=2, quick=quick)
    wanted = set(itertools.product(("FedIT", "FFA", "FFA orthonormal", "FedSVD"), epsilons, rates, (0, 1)))
    assert len(cells) == len(wanted) and set(cells) == wanted
    assert len(results["claims"]) == 4 * len(epsilons) * len(rates)
    assert results["reproduce"] == f"fedpeft bench private --out DIR --seeds 2{' --quick' if quick else ''}"
    assert (results["quick"], results["seeds"], results["config"]) == (quick, 2, "fedsvd_dp")
    assert {"fedpeft", "torch", "python"} == set(results["versions"])
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_claims_are_paired_differences_with_verdicts(cells, tmp_path):
    """FedSVD has 70 and 71 at the two seeds; the others do not vary, so the standard error is 1 / 2 or 0."""
    claims = private.run(tmp_path, seeds=2, quick=True)["claims"]
    assert {claim["epsilon"] for claim in claims} == {1.0, 6.0} and {claim["lr"] for claim in claims} == {0.25}
    for epsilon in (1.0, 6.0):
        found = {
            claim["claim"]: (claim["difference"], claim["error"], claim["seeds"], claim["verdict"])
            for claim in claims
            if claim["epsilon"] == epsilon
        }
        assert found == {
            "FedSVD > FFA": (pytest.approx(10.5), pytest.approx(0.5), 2, "holds"),
            "FedSVD > FedIT": (pytest.approx(20.5), pytest.approx(0.5), 2, "holds"),
            "FFA > FedIT": (pytest.approx(10.0), 0.0, 2, "holds"),
            "FedSVD = FFA orthonormal": (pytest.approx(-0.5), pytest.approx(0.5), 2, "holds"),
        }


def test_the_table_has_a_row_a_rule_and_a_column_a_cell(cells, tmp_path, monkeypatch):
    from fedpeft.cli import console

    monkeypatch.setattr(console.out, "width", 200)
    with console.out.capture() as captured:
        private.show(private.run(tmp_path, seeds=2, quick=True))
    text = captured.get()
    row = next(line for line in text.splitlines() if "FedSVD" in line and "±" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["FedSVD", "71.5 ± 0.7", "76.5 ± 0.7"]
    assert "epsilon 6, lr 0.25: FedSVD > FFA: +10.50 ± 0.50 points, holds" in text and "frozen model 10.0 %" in text


def test_one_seed_gives_no_difference(cells, tmp_path):
    with pytest.raises(InputError, match=r"seeds=1: .* two seeds"):
        private.run(tmp_path, seeds=1)
    assert cells == [] and not any(tmp_path.iterdir())
    done = CliRunner().invoke(app, ["bench", "private", "--out", str(tmp_path), "--seeds", "1"])
    assert done.exit_code == 2 and "--seeds" in done.stderr and cells == []


def test_the_command_passes_its_options_on(cells, tmp_path):
    done = CliRunner().invoke(app, ["bench", "private", "--out", str(tmp_path), "--seeds", "2", "--quick", "--json"])
    assert done.exit_code == 0 and len(cells) == 16
    assert json.loads(done.stdout) == json.loads((tmp_path / "results.json").read_text())


# Real cells -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A benchmark that has run: every rule at one epsilon and rate, two seeds, the shipped config made small."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "small.yaml").write_text(configs.to_yaml(configs.load(private.CONFIG, SMALL)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(private, "CONFIG", str(folder / "small.yaml"))
        patch.setattr(private, "EPSILONS", (6.0,))
        patch.setattr(private, "RATES", (0.25,))
        patch.setattr(report, "write", lambda run: [])
        yield folder / "out", private.run(folder / "out", seeds=2)


def test_each_cell_is_the_run_that_its_row_names(small):
    out, results = small
    assert len(results["rows"]) == 8
    for row in results["rows"]:
        folder = out / "cells" / f"{row['method'].replace(' ', '_')}-epsilon6-lr0.25-seed{row['seed']}"
        config = yaml.safe_load((folder / "resolved.yaml").read_text())
        strategy, given = config["strategy"], (config["privacy"]["epsilon"], config["client"]["lr"])
        assert (*given, config["run"]["seed"]) == (6.0, 0.25, row["seed"])
        assert strategy["name"] == {"FedIT": "fedit", "FedSVD": "fedsvd"}.get(row["method"], "ffa_lora")
        assert (strategy.get("init") == "orthonormal") == (row["method"] == "FFA orthonormal")
        summary = json.loads((folder / "summary.json").read_text())
        assert row["final"] == 100 * summary["final"]["accuracy"]
        assert row["frozen"] == 100 * summary["baseline"]["accuracy"]
        assert 0 < row["epsilon_spent"] == summary["epsilon_max"] <= 6.0
        assert row["bytes_up"] == summary["bytes_up"] > 0 and summary["rounds"] == 1


def test_rules_of_a_seed_share_its_start(small):
    """Paired: the frozen model scores the same for every rule; FedIT uploads more than rules that freeze A."""
    rows = {(row["method"], row["seed"]): row for row in small[1]["rows"]}
    for seed in (0, 1):
        own = [rows[name, seed] for name in private.METHODS]
        assert len({row["frozen"] for row in own}) == 1
        assert rows["FedIT", seed]["bytes_up"] > rows["FFA", seed]["bytes_up"]
    folders = sorted((small[0] / "cells").iterdir())
    one, two = (
        [json.loads((folder / "split.json").read_text())["clients"] for folder in folders[seed::2]] for seed in (0, 1)
    )
    assert one == [one[0]] * 4 and two == [two[0]] * 4 and one[0] != two[0]


def test_finished_cells_are_not_run_again(small, monkeypatch):
    out, results = small
    monkeypatch.setattr(runs, "simulate", lambda *arguments: pytest.fail("a finished cell was run again"))
    (out / "results.json").unlink()
    assert private.run(out, seeds=2) == results
    assert json.loads((out / "results.json").read_text()) == results


def test_a_cell_that_was_cut_off_is_run_anew_and_gives_the_same(small, monkeypatch):
    """Alone: the others stay. What the interrupted run left in its folder does not matter."""
    out, results = small
    folder, simulate, ran = out / "cells" / "FedSVD-epsilon6-lr0.25-seed1", runs.simulate, []
    monkeypatch.setattr(runs, "simulate", lambda *arguments: ran.append(arguments[2]) or simulate(*arguments))
    (folder / "summary.json").unlink()
    (folder / "metrics.jsonl").write_text("torn")
    again = private.run(out, seeds=2)
    assert ran == [folder]
    for before, after in zip(results["rows"], again["rows"], strict=True):
        assert {**after, "seconds": None} == {**before, "seconds": None}


def test_quick_cells_are_shorter_and_kept_apart(small, tmp_path, monkeypatch):
    asked, ended = [], (small[0] / "cells" / "FedIT-epsilon6-lr0.25-seed0" / "summary.json").read_text()

    def simulate(source: str, changes: dict[str, Any], out: Path) -> None:
        asked.append((source, changes, out.name))
        out.mkdir(parents=True)
        (out / "summary.json").write_text(ended)

    monkeypatch.setattr(runs, "simulate", simulate)
    rows = [private.cell(tmp_path, "FFA", 1.0, 0.5, 3, quick) for quick in (False, True, True)]
    assert rows[0] == rows[1] == rows[2]
    (_, whole, one), (source, short, two) = asked
    assert one == "FFA-epsilon1-lr0.5-seed3" and two == f"{one}-quick" and source == private.CONFIG
    assert "run.rounds" not in whole and short == {**whole, "run.rounds": 2}
    assert whole["privacy.epsilon"] == 1.0 and whole["client.lr"] == 0.5 and whole["run.seed"] == 3
