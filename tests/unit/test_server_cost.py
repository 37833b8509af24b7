"""The server-cost benchmark: aggregation makes nothing dense, and what is timed is right."""

from __future__ import annotations

import json

import pytest
import torch

from fedpeft.errors import InputError, RunError
from fedpeft.simulations.benchmarks import server_cost
from fedpeft.simulations.benchmarks.server_cost import DENSE, OPTIONS, Largest, Size

SMALL = Size(sites=2, m=64, n=48, r=3, clients=4)


@pytest.mark.parametrize("name", OPTIONS)
def test_aggregation_makes_no_dense_matrix(name):
    assert server_cost.largest(name, SMALL) <= SMALL.m * SMALL.r * SMALL.clients < SMALL.m * SMALL.n


@pytest.mark.parametrize("name", DENSE)
def test_the_watch_sees_the_dense_way(name):
    server, updates = server_cost.draw(server_cost.make(name), SMALL, 0)
    with Largest() as watch:
        server_cost.dense(name, server, updates)
    assert watch.numel >= SMALL.m * SMALL.n


@pytest.mark.parametrize("name", OPTIONS)
def test_factors_give_the_dense_result(name):
    assert server_cost.check(name) < 1e-9


def test_methods_are_told_apart():
    """The small case separates the definitions: FedIT's mean of factors is none of the others' results."""
    results = {}
    for name in OPTIONS:
        server, updates = server_cost.draw(server_cost.make("fedit"), SMALL, 0, torch.float64)
        results[name] = server_cost.dense(name, server, updates)
    for name in ("lora_fair", "flexlora", "fedex"):
        assert float((results[name] - results["fedit"]).norm() / results["fedit"].norm()) > 1e-3


def test_nothing_is_timed_when_a_method_is_wrong(monkeypatch):
    monkeypatch.setattr(server_cost, "dense", lambda name, server, updates: torch.ones(48, 40, dtype=torch.float64))
    with pytest.raises(RunError, match="fedsvd"):
        server_cost.measure("fedsvd", SMALL, "factors")


def test_results_say_what_was_scaled(tmp_path, monkeypatch):
    monkeypatch.setattr(server_cost, "_child", server_cost.measure)
    results = server_cost.run(tmp_path, sites=3, m=64, n=48, r=3, clients=4, dense_sites=2)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert [row["method"] for row in results["rows"]] == list(OPTIONS)
    for row in results["rows"][1:]:
        assert row["dense_sites"] == 2 and row["dense_seconds_scaled"] == pytest.approx(row["dense_seconds"] * 1.5)
    headers = " ".join(str(column.header) for column in server_cost.table(results).columns)
    assert "scaled, not measured" in headers and "dense_seconds" not in results["rows"][0]
    with pytest.raises(InputError, match="at most"):
        server_cost.run(tmp_path, sites=1, m=4, n=4, r=8, clients=2)


def test_memory_is_that_of_a_fresh_process():
    ballast = torch.ones(60_000_000)  # 240 MB in this process must not show in the child's peak
    row = server_cost._child("fedit", Size(1, 64, 48, 3, 2), "factors")
    assert row["peak_bytes"] is None or row["peak_bytes"] < 4 * ballast.numel() / 4
