"""The alarm before a collapse: three signs, over the last predictions of a stream, that a method is going wrong.

  * entropy: mean entropy far below that of the source model on its own data (all answers become certain)
  * classes: fewer distinct classes than a share of those known
  * drift: KL(mean prediction of the window || mean prediction on source data) above a limit

A sign counts once the window is full. A stream that is sorted by class shows few classes too, and a label shift drifts:
an alarm is a question, and `reset` its answer by option. After an alarm the window starts anew.

    >>> import torch
    >>> monitor = Monitor(torch.full((4,), 0.25), entropy=0.5, window=4)
    >>> monitor.observe(torch.eye(4)[torch.tensor([0, 0, 0, 0])])
    ['entropy', 'classes', 'drift']
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedpeft.config import option
from fedpeft.data.encode import Encoded
from fedpeft.tta.method import TTAMethod, source_batches
from fedpeft.tta.parts import scores


@dataclass
class MonitorConfig:
    """Options of a monitor: how many predictions it looks at, and the limits whose breach is an alarm."""

    window: int = option(256, "predictions that are looked at together", low=1)
    entropy_share: float = option(0.1, "alarm below this share of the source-time mean entropy", low=0)
    class_share: float = option(0.3, "alarm below this share of the classes", low=0, high=1)
    max_drift: float = option(1.0, "alarm above this KL to the source-time mean prediction, in nats", above=0)
    reset: bool = option(False, "restart the method at an alarm")


class Monitor:
    """Watches predictions; knows nothing of labels or of the method.

    Attributes:
        alarms: of every alarm, batch number and signs.
    """

    Config: ClassVar[Any] = MonitorConfig

    def __init__(self, mean: Tensor, entropy: float, **options: Any) -> None:
        """Source-time mean prediction [K] and mean entropy (nats)."""
        self.config = MonitorConfig(**options)
        self.mean, self.entropy = mean, entropy
        self.recent = mean.new_zeros(0, len(mean))
        self.batches = 0
        self.alarms: list[dict[str, Any]] = []

    @classmethod
    def on_source(cls, method: TTAMethod, source: Encoded, **options: Any) -> Monitor:
        """A monitor with what the deployed model, unadapted, says of source data."""
        with torch.no_grad():
            probs = torch.cat([method.model(batch)[0].softmax(-1) for batch, _ in source_batches(source)])
        return cls(probs.mean(0), float(scores.entropy_of(probs).mean()), **options)

    def observe(self, probs: Tensor) -> list[str]:
        """Take in predictions [N, K]; the signs of an alarm, none mostly."""
        self.batches += 1
        self.recent = torch.cat([self.recent, probs.detach()])[-self.config.window :]
        if len(self.recent) < self.config.window:
            return []
        limits = {
            "entropy": float(scores.entropy_of(self.recent).mean()) < self.config.entropy_share * self.entropy,
            "classes": len(self.recent.argmax(-1).unique()) < self.config.class_share * len(self.mean),
            "drift": scores.divergence(self.recent.mean(0), self.mean) > self.config.max_drift,
        }
        signs = [name for name, true in limits.items() if true]
        if signs:
            self.alarms.append({"batch": self.batches - 1, "signs": signs})
            # A new window, or the next batch would alarm again for the same predictions.
            self.recent = self.recent[:0]
        return signs

    def watch(self, method: TTAMethod, probs: Tensor) -> list[str]:
        """`observe`, and restart the method at an alarm if `reset` is set."""
        signs = self.observe(probs)
        if signs and self.config.reset:
            method.restart()
        return signs

    def state(self) -> dict[str, Any]:
        """Copies of all that changes and of what source data said."""
        return copy.deepcopy(
            {
                "mean": self.mean,
                "entropy": self.entropy,
                "recent": self.recent,
                "batches": self.batches,
                "alarms": self.alarms,
            }
        )

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`; the options stay those given here."""
        for key, value in copy.deepcopy(state).items():
            setattr(self, key, value)
