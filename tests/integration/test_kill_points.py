"""A run that is killed at any point goes on and ends as if nothing had happened, and pays for what it released once.

All points of every kind of run are behind the marker `attack`; of each kind a fixed few are in the default tier.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedpeft.errors import InputError
from fedpeft.simulations import run as runs
from support.kill_points import Left, facts, ledgers, watched

SMALL: dict[str, Any] = {
    "data.limit": 36,
    "data.clients": 3,
    "client.local_steps": 1,
    "client.batch_size": 2,
    "run.rounds": 2,
    "run.evaluate_every": 2,
    "data.test_fraction": 0.2,
}
PRIVATE = {"strategy.weighting": "uniform", "privacy.accountant": "rdp", "privacy.noise_multiplier": 1.0}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"strategy.wrap": ["scaffold"], "client.optimizer": "sgd"},
    "sample": {**PRIVATE, "privacy.unit": "sample", "adapter.dropout": 0.2, "run.checkpoint_every": 2},
    "client": {
        **PRIVATE,
        "privacy.unit": "client",
        "privacy.adaptive_clip": True,
        "privacy.clip_count_noise": 0.9,
        "privacy.delta": 1e-3,
    },
    "secagg": {"strategy.weighting": "uniform", "secagg.enabled": True},
    "workers": {**PRIVATE, "privacy.unit": "sample", "run.workers": 2},
    "sequence": {
        **PRIVATE,
        "privacy.unit": "sample",
        "strategy": "ffa_lora",
        "continual.body": "sequential",
        "continual.tasks": 2,
        "continual.head": "lda",
        "continual.statistics_noise": 2.0,
        "data.limit": 80,
        "data.clients": 2,
        "privacy.delta": 1e-3,
    },
    "test-time": {
        "data.holdout": 0.4,
        "tta.method": "tent",
        "tta.keep": True,
        "tta.batch_size": 4,
        "data.limit": 40,
        "data.clients": 2,
        "run.evaluate_every": 1,
    },
}
FEW = 2  # points of each kind in the default tier


@pytest.fixture
def killed(tiny, tmp_path, forked):
    """`killed(kind)` is a run's folder, and what a kill at each of its points leaves."""

    def run(kind: str) -> tuple[Path, list[Left]]:
        points, left = watched(tmp_path / "run", tmp_path / "copies", lambda: tiny("run", {**SMALL, **KINDS[kind]}))
        assert points >= len(left) > 25, "the hooks see the run"
        return tmp_path / "run", left

    return run


def check(left: Left, number: int, run: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    """Resume one point's copy and compare its end."""
    again = tmp_path / f"point-{number}" / run.name  # ledgers know a run by the name of its folder
    left.restore(again)
    counted = {
        (account.partition("+")[0], entry.round) for account, entries in ledgers(again).items() for entry in entries
    }
    accounts = {account.partition("+")[0] for account in whole["ledgers"]}
    assert {(who, when) for who, when in left.sent if who in accounts} <= counted, "released and not counted"
    if not (again / "resolved.yaml").exists():
        assert not list(again.glob("*/*")), "nothing has begun"
        with pytest.raises(InputError, match=r"no resolved\.yaml"):
            runs.resume(again)
        return
    runs.resume(again)
    end = facts(again)
    for what, expected in whole.items():
        assert end[what] == expected, f"point {number}: {what}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_at_some_points_changes_nothing(kind, killed, tmp_path):
    run, left = killed(kind)
    whole = facts(run)
    for part in range(1, FEW + 1):
        number = len(left) * part // (FEW + 1)
        check(left[number], number, run, whole, tmp_path)


@pytest.mark.attack
@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_at_any_point_changes_nothing(kind, killed, tmp_path):
    run, left = killed(kind)
    whole = facts(run)
    for number, one in enumerate(left):
        check(one, number, run, whole, tmp_path)
