"""`fedpeft bench sites` at a tiny size: a real coordinator, light sites over gRPC and TLS, secure sums, a late one."""

from __future__ import annotations

import json

import pytest

from fedpeft.simulations.benchmarks import sites


@pytest.mark.parametrize(
    ("secagg", "late", "rounds"),
    [
        (True, 6, 1),
        pytest.param(False, 0, 2, marks=pytest.mark.slow),
        pytest.param(False, 3, 2, marks=pytest.mark.slow),
        pytest.param(True, 0, 2, marks=pytest.mark.slow),
    ],
)
def test_light_sites_take_part_in_every_round(tmp_path, monkeypatch, secagg, late, rounds):
    monkeypatch.setattr(sites, "DEADLINE_S", 8.0)
    monkeypatch.setattr(sites, "PROCESSES", 2)
    said = []
    result = sites.run(tmp_path / "out", sites=6, rounds=rounds, secagg=secagg, late=late, tell=said.append)
    away = 0 if not late else 6 // late
    assert [row["round"] for row in result["rows"]] == list(range(1, rounds + 1))
    assert len(said) == 1 + rounds
    for row in result["rows"]:
        assert (row["answered"], row["left_out"]) == (6 - away, away)
        assert row["seconds"] > (8.0 if late else 0.0)
        assert all(row[f"{role}_mb"] > 20 for role in sites.ROLES)
    assert sum(row["cpu_s"] for row in result["rows"]) > 0
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == result
    flags = (" --secagg" if secagg else "") + (f" --late {late}" if late else "")
    assert result["reproduce"] == f"fedpeft bench sites --out DIR --sites 6 --rounds {rounds}{flags}"
