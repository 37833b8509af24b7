"""`fedpeft bench unlearn`: one real grid of quick cells, none run twice, and the table by hand."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from fedpeft.cli.main import app
from fedpeft.errors import InputError
from fedpeft.record import report
from fedpeft.simulations.benchmarks import unlearn


def test_a_quick_grid_and_what_is_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write", lambda run: [])
    arguments = ["bench", "unlearn", "--out", str(tmp_path), "--sets", "digits", "--seeds", "1", "--quick"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert not done.exception, done.output
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["reproduce"] == "fedpeft bench unlearn --out DIR --sets digits --seeds 1 --quick"
    models = ["as trained", "retrained", "loku", "negation"]
    assert [line["model"] for line in results["table"]] == models
    assert results["table"][1]["distance"][0] < 1e-6 < results["table"][0]["distance"][0]
    assert (tmp_path / "unlearn.png").is_file() and not (tmp_path / "runs").exists()
    monkeypatch.setattr(unlearn, "cell", lambda *_: pytest.fail("a finished cell was run again"))
    again = CliRunner().invoke(app, arguments)
    assert not again.exception, again.output


def test_the_table_is_mean_and_deviation_over_seeds():
    def row(seed, way, model, value):
        numbers = dict.fromkeys(unlearn.COLUMNS.values(), value)
        cost = {"seconds": 2.0 + seed, "record_passes": 10}
        rows = {"trained": numbers, model: dict.fromkeys(numbers, value / 2)}
        return {"set": "digits", "method": way, "seed": seed, "rows": rows, "cost": cost}

    made = [row(seed, "retrain", "retrained", 0.2 + 0.2 * seed) for seed in range(2)]
    made += [row(seed, "loku", "unlearned", 0.4) for seed in range(2)]
    trained, retrained, loku = unlearn.table(made)
    assert trained["attack_auc"] == pytest.approx([0.3, 0.02**0.5])
    assert retrained["distance"][0] == pytest.approx(0.15) and loku["agreement"] == pytest.approx([0.2, 0.0])
    assert (trained["seconds"], loku["seconds"]) == (None, 2.5)


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"--sets: 'digit' is not known\. Did you mean 'digits'"):
        unlearn.run(tmp_path, ("digit",))
    monkeypatch.setenv("FEDPEFT_DATA", str(tmp_path))
    with pytest.raises(InputError, match="needs `fedpeft data prepare minilm`"):
        unlearn.run(tmp_path, ("vader",))
