"""Coordinate-wise trimmed mean of the updates. Yin et al., ICML 2018, arXiv 1803.01498.

    theta[i] = mean of theta_k[i] over clients without the floor(fraction n) smallest and as many largest values

Weights play no part: a client could claim any. The strategy inside then sees one update.

Deviations: none. Where floor(fraction n) = 0 the result is the plain unweighted mean: a run whose rounds are all that
small is refused, and a warning is logged where a round lost clients.

    >>> TrimmedMean(fraction=0.25).fraction
    0.25
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from typing import Any

from fedpeft.config import option
from fedpeft.errors import InputError
from fedpeft.state import Needs, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy
from fedpeft.strategies.wrappers.wrapper import Wrapper, merge_updates

log = logging.getLogger("fedpeft")


class TrimmedMean(Wrapper):
    """The coordinate-wise trimmed mean in place of the mean."""

    paper = "Yin et al. 2018, arXiv 1803.01498"
    needs = Needs.INDIVIDUAL
    robust = True

    @dataclass
    class Config:
        fraction: float = option(0.2, "share of the clients cut from each end, below 0.5", low=0, high=0.49)

    def __init__(self, inner: FederatedStrategy | None = None, **options: Any) -> None:
        super().__init__(inner, **options)
        self.fraction = float(self.config.fraction)
        if not 0 <= self.fraction < 0.5:
            raise InputError(f"trimmed_mean fraction={self.fraction}: allowed is 0 <= fraction < 0.5.")

    def require_clients(self, count: int) -> None:
        """Raise InputError if nothing would be trimmed of a round of this many updates; fraction 0 asks for that."""
        if self.fraction and int(self.fraction * count) < 1:
            least = next(number for number in itertools.count(count + 1) if int(self.fraction * number))
            raise InputError(
                f"strategy.wrap: trimmed_mean with fraction={self.fraction:g} trims nothing of {count} "
                f"updates (floor(fraction n) = 0); it needs at least {least}. Ask more clients, or raise "
                "fraction."
            )

    def transform(self, server: ServerState, updates: list[Update]) -> list[Update]:
        # Of the updates that came, not of the clients that were asked: those that failed are no extreme values.
        cut = int(self.fraction * len(updates))
        if self.fraction and not cut:
            log.warning(
                "trimmed_mean: fraction=%g of %d updates is none, nothing is trimmed", self.fraction, len(updates)
            )
        one, self.treated = merge_updates(updates, cut, "trimmed_mean")
        return one
