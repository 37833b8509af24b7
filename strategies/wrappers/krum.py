"""Krum and multi-Krum: keep the updates that lie closest to others. Blanchard et al., NeurIPS 2017, arXiv 1703.02757.

    score(k) = sum of ||theta_k - theta_j||^2 over its n - f - 2 nearest other updates;   the `keep` lowest scores go on

The distance is over all uploaded tensors together. Ties go to the first client name. n >= f + 3 updates are required,
else a score has no term; the paper's guarantee needs n >= 2 f + 3, and a warning is logged below that.

Deviations: kept updates keep their weights in the strategy inside (the paper's multi-Krum takes the plain mean; set
strategy.weighting=uniform for it).

    >>> import torch
    >>> scores(torch.tensor([[0.0], [1.0], [3.0], [50.0]]), byzantine=1).tolist()
    [1.0, 1.0, 4.0, 2209.0]
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.config import option
from fedpeft.errors import InputError
from fedpeft.state import Needs, ServerState, Update
from fedpeft.strategies.client import names_that_add_up
from fedpeft.strategies.wrappers.wrapper import Wrapper, flatten_update, require_equal_shapes

log = logging.getLogger("fedpeft")


class Krum(Wrapper):
    """Only the most central updates are aggregated."""

    paper = "Blanchard et al. 2017, arXiv 1703.02757"
    needs = Needs.INDIVIDUAL
    robust = True

    @dataclass
    class Config:
        byzantine: int = option(1, "f, how many clients of a round may be malicious", low=0)
        keep: int = option(1, "how many updates go on; 1 is Krum, more is multi-Krum", low=1)

    def require_clients(self, count: int) -> None:
        """Raise InputError if a round of this many updates leaves a score without a term."""
        byzantine, keep = self.config.byzantine, self.config.keep
        least = max(byzantine + 3, keep)
        if count < least:
            raise InputError(
                f"strategy.wrap: krum with byzantine={byzantine} and keep={keep} needs at least {least} "
                f"updates (byzantine + 3, and keep), got {count}. Ask more clients, or lower "
                "byzantine or keep."
            )

    def transform(self, server: ServerState, updates: list[Update]) -> list[Update]:
        self.require_clients(len(updates))
        count = len(updates)
        if count < 2 * self.config.byzantine + 3:
            log.warning(
                "krum: %d updates are below 2 f + 3 = %d; the paper's guarantee does not hold",
                count,
                2 * self.config.byzantine + 3,
            )
        require_equal_shapes(updates, "krum")
        beside = names_that_add_up(self.inner, server)
        points = torch.stack([flatten_update(update, beside) for update in updates])
        # Stable, as updates come in the order of names: of equal scores the first name's stays.
        order = scores(points, self.config.byzantine).argsort(stable=True)
        self.treated = {updates[index].client: "not selected" for index in sorted(order[self.config.keep :].tolist())}
        # Back in the order of names, in which sums are taken.
        return [updates[index] for index in sorted(order[: self.config.keep].tolist())]


def scores(points: Tensor, byzantine: int) -> Tensor:
    """Krum score [n] of each row of `points` [n, d]."""
    # From differences, not from norms and products, which cancel where updates are near each other.
    squares = torch.stack([(points - point).square().sum(dim=1) for point in points])
    # Or each would be its own nearest neighbour.
    squares.fill_diagonal_(torch.inf)
    return squares.sort(dim=1).values[:, : points.shape[0] - byzantine - 2].sum(dim=1)
