"""Nothing moves: the base's own features. With a closed-form head this is the baseline that few methods beat.

Zhou et al., arXiv 2303.07338, show how strong it is. No state, one pass a prediction.
"""

from __future__ import annotations

from fedpeft.continual.body import Body


class Frozen(Body):
    """The base's own features."""

    paper = "Zhou et al. 2023, arXiv 2303.07338"
    stays_central = ""

    @classmethod
    def moves_in(cls, task: int) -> bool:
        return False
