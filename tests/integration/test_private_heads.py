"""Under DP the head's rows of classes that do not compete get no noise: no record has a gradient there."""

from __future__ import annotations

import pytest
import torch

from fedpeft.config import load
from fedpeft.continual.curriculum import make_curriculum
from fedpeft.record import checkpoint
from fedpeft.simulations.run import simulate

TINY = {"data.limit": 240, "run.rounds": 2, "continual.tasks": 2, "client.local_steps": 2, "run.baselines": False}


@pytest.mark.parametrize("tokens", [0, None], ids=["one after another", "cohort"])
def test_rows_of_other_tasks_stay_bit_for_bit(tmp_path, tokens):
    changes = {**TINY, "run.cohort_tokens": tokens}
    simulate("continual_dp", changes, tmp_path / "run")
    kept = tmp_path / "run" / "checkpoints"  # a task that was closed after a round is another state of that round
    before, after = (checkpoint.read(max(kept.glob(f"round-{number:06d}*"))).adapter for number in (1, 2))
    config = load("continual_dp", changes)
    plan = make_curriculum(config.continual, 10, config.run.rounds, config.run.seed)
    for key in ("classifier/weight", "classifier/bias"):
        assert torch.equal(before[key][plan.classes(0)], after[key][plan.classes(0)]), key
        moved = (before[key] - after[key])[plan.classes(1)].flatten(1) if before[key].ndim > 1 else None
        assert moved is None or (moved.norm(dim=1) > 0).all(), "the task's own rows get gradient and noise"
