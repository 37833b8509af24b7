"""The linear classifier trained with the logits of unseen classes masked: all classes seen so far compete in training.

Without replay this pushes old classes down (they are only ever negatives), which is the point of showing it.
"""

from __future__ import annotations

from fedpeft.continual.head import Head


class Masked(Head):
    """The trained classifier, cross-entropy over all seen classes."""

    loss = "seen"
