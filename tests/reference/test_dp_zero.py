"""Records without a finite gradient or loss count as zero, in both engines, to a float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.privacy.ledger import Budget
from fedpeft.privacy.mechanism import add_clipped
from fedpeft.privacy.plan import Plan

CLIP = 0.7


def by_hand(gradients, losses):
    """Sum [P] in float64, record by record."""
    total = np.zeros(gradients.shape[1])
    for row, loss in zip(gradients.double().numpy(), losses.double().numpy(), strict=True):
        norm = np.sqrt(np.square(row).sum())
        if np.isfinite(loss) and norm < 1e30:
            total += row * min(1.0, CLIP / norm) if norm else 0
    return total


def cases():
    """Name -> gradients [N, P] and losses [N]; the first record is always a good one."""
    generator = torch.Generator().manual_seed(3)
    good, losses = torch.randn(6, 9, generator=generator), torch.rand(6, generator=generator)
    yield "none", good, losses
    for name, value in (("nan", torch.nan), ("inf", torch.inf), ("-inf", -torch.inf), ("huge", 1e30), ("max", 3e38)):
        spoiled = good.clone()
        spoiled[2, 4] = value
        yield f"{name} in a gradient", spoiled, losses
        if name in ("huge", "max"):
            continue
        spoiled = losses.clone()
        spoiled[3] = value
        yield f"{name} loss beside a finite gradient", good, spoiled
    yield "all", torch.full((6, 9), torch.nan), torch.full((6,), torch.inf)
    yield "none at all", good[:0], losses[:0]


@pytest.mark.parametrize(("gradients", "losses"), [case[1:] for case in cases()], ids=[case[0] for case in cases()])
@pytest.mark.parametrize("engine", ["one after another", "cohort"])
def test_a_gradient_or_loss_that_is_not_finite_counts_as_zero(engine, gradients, losses):
    if engine == "cohort":
        total, clients = torch.zeros(2, 9), torch.ones(len(losses), dtype=torch.int64)
        parts = [gradients[:, :4].reshape(-1, 2, 2), gradients[:, 4:]]
        add_clipped(total, parts, losses, clients, torch.tensor([5.0, CLIP]))
        assert not total[0].any()
        found = total[1]
    else:
        found = Plan(0.5, 3.0, CLIP, 1.0, 1, Budget(1.0, 1e-5)).clipped_sum(gradients, losses)
    np.testing.assert_allclose(found.double().numpy(), by_hand(gradients, losses), rtol=1e-4, atol=1e-6)
