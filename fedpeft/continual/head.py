"""A head says how features become class scores. One file in `heads` is one head.

A head is fitted after a task has been trained, from one pass over its records, as sums: `statistics` of several owners
added together are those of all their records, so a federated head equals the centralised one.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from torch import Tensor

from fedpeft.config import Configured
from fedpeft.continual.body import Classifier, only_classes


class Head(Configured):
    """Base of all heads: the trained classifier itself.

    Attributes:
        loss: classes that compete in the training loss that this head wants: "local", the task's own, or "seen".
        takes_noise: whether it can be fitted on sums with noise, as under sample-level DP.
        sums: everything it has learned, tensors that add up over records.
        seen: classes that it can answer with.
    """

    loss: ClassVar[str] = "local"
    takes_noise: ClassVar[bool] = False

    def __init__(self, classes: int, width: int, seed: int, **options: Any) -> None:
        super().__init__(**options)
        self.classes, self.width, self.seed = classes, width, seed
        self.sums: dict[str, Tensor] = {}
        self.seen: list[int] = []

    def statistics(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Sums over records with features [N, D] and labels [N]; empty where nothing is fitted."""
        return {}

    def solve(self) -> None:
        """What follows from `sums`, once for each task."""

    def scores(self, features: Tensor, classifier: Classifier | None) -> Tensor:
        """Scores [N, C]; -inf for classes never seen. Heads that are fitted on sums need no classifier."""
        assert classifier is not None
        return only_classes(classifier(features), self.seen)

    def update(self, statistics: dict[str, Tensor], seen: list[int]) -> None:
        """Add sums and fit."""
        for key, value in statistics.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.seen = list(seen)
        self.solve()

    def state(self) -> dict[str, Any]:
        """Copies of the sums and of the classes seen; the rest follows from them."""
        return copy.deepcopy({"sums": self.sums, "seen": self.seen})

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`: the sums are taken over, and the head is fitted on them if it has seen a class."""
        state = copy.deepcopy(state)
        self.sums, self.seen = state["sums"], state["seen"]
        if self.seen:
            self.solve()
