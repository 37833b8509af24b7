"""Coordinate-wise median of the updates. Yin et al., ICML 2018, arXiv 1803.01498.

    theta[i] = median over clients of theta_k[i]   (of an even number: the mean of the two in the middle)

Weights play no part: a client could claim any. The strategy inside then sees one update. The median of factors is not a
median of products; what it guards against is single clients.

Deviations: none.

    >>> Median().needs.value
    'individual'
"""

from __future__ import annotations

from fedpeft.state import Needs, ServerState, Update
from fedpeft.strategies.wrappers.wrapper import Wrapper, merge_updates


class Median(Wrapper):
    """The coordinate-wise median in place of the mean."""

    paper = "Yin et al. 2018, arXiv 1803.01498"
    needs = Needs.INDIVIDUAL
    robust = True

    def transform(self, server: ServerState, updates: list[Update]) -> list[Update]:
        # So that one value is left of an odd number, and the two in the middle of an even one.
        one, self.treated = merge_updates(updates, (len(updates) - 1) // 2, "median")
        return one
