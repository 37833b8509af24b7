"""The linear classifier that was trained beside the body, with local CE: the task's own classes compete in training.

At test time the logits of all classes seen so far are compared as they are, which nothing has calibrated.
"""

from __future__ import annotations

from fedpeft.continual.head import Head


class Linear(Head):
    """The trained classifier, local cross-entropy."""
