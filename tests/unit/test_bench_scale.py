"""The scaling benchmark: its fits, its verdicts, and its smallest points."""

import json
import math

import pytest

from fedpeft.errors import InputError
from fedpeft.simulations.benchmarks import scale, scale_work


def quadratic(axis, value, quick):
    return {"round s": value**2 / 1000, "peak MB": 100.0}


def test_a_quantity_that_grows_faster_than_its_size_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "measure_apart", quadratic)
    found = scale.run(tmp_path, ("rank", "tokens"), quick=False)
    fits = {(fit["axis"], fit["quantity"]): (fit["exponent"], fit["last"]) for fit in found["fits"]}
    assert fits["rank", "round s"] == pytest.approx((2, 2)) and fits["rank", "peak MB"] == (0, 0)
    whys = {(line[0], line[2]): line[-1] for line in scale.table_rows(found)}
    assert whys["rank", "round s"] == "worse than linear, and not explained" and not whys["rank", "peak MB"]
    assert "attention" in whys["tokens of a record", "round s"]
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert (tmp_path / "scale.png").stat().st_size and "round s" in (tmp_path / "table.md").read_text()


def test_an_unknown_axis_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--axes: 'ranks' is not known. Did you mean 'rank'"):
        scale.run(tmp_path, ("ranks",))


def test_every_axis_has_small_points():
    assert scale.QUICK.keys() == scale.AXES.keys() == {*scale_work.SIZES, "tasks"}


def test_a_ledger_of_many_accounts_is_read():
    assert 0 < scale_work.read_ledgers(30) < math.inf


@pytest.mark.slow
@pytest.mark.parametrize("axis", scale.AXES)
def test_every_axis_runs(axis):
    found = scale_work.measure(axis, scale.QUICK[axis][0], quick=True)
    assert all(math.isfinite(value) and value >= 0 for key, value in found.items() if key != "start s")
