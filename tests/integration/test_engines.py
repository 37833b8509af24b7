"""The same seeds give the same adapter in this process, in one or two worker processes, and under Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

CASES = {
    "fedsvd": {"strategy": "fedsvd"},
    "scaffold": {"strategy.wrap": ["scaffold"], "client.optimizer": "sgd", "client.lr": 0.1},
    "personal": {"strategy": "fedsa", "data.holdout": 0.25},
}


def adapter(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted((run / "adapter").rglob("*.safetensors"))}


@pytest.mark.parametrize("case", CASES)
def test_worker_processes_give_the_same_adapter(case, tiny, tmp_path):
    tiny("here", {**CASES[case], "run.clients_per_round": 3})
    for workers in (1, 2):
        tiny(f"workers-{workers}", {**CASES[case], "run.clients_per_round": 3, "run.workers": workers})
        assert adapter(tmp_path / f"workers-{workers}") == adapter(tmp_path / "here")


def test_ray_gives_the_same_adapter(tiny, tmp_path):
    # SCAFFOLD keeps state at the clients, so this also shows that the state survives from round to round.
    here = tiny("here", {**CASES["scaffold"], "run.clients_per_round": 3})
    ray = tiny("ray", {**CASES["scaffold"], "run.clients_per_round": 3, "run.engine": "ray", "run.workers": 2})
    assert adapter(tmp_path / "ray") == adapter(tmp_path / "here")
    assert ray["accuracy_by_round"] == here["accuracy_by_round"]
    assert (ray["engine"], here["engine"]) == ("ray", "cohort")
