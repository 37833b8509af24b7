"""Periodic reset: any method, restarted every `period` batches that it learned from. With ETA (EATA without its Fisher
term) this is RDumb, a baseline that long streams rarely beat.

Press et al., arXiv 2306.05401. Weights, moments and running estimates all restart; counters and random draws go on.
Period 1 is episodic adaptation.

    >>> import torch
    >>> from fedpeft.tta.method import make
    >>> net = torch.nn.Sequential(torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))
    >>> method = make("rdumb", net, {"base": "tent", "base_options": {}, "period": 1})
    >>> _ = method.step(torch.eye(2))
    >>> method.base.memory["student"]["0.weight"].tolist(), method.base.cost["resets"]
    ([1.0, 1.0], 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fedpeft.config import option
from fedpeft.tta.deployed import Batch
from fedpeft.tta.method import Outputs
from fedpeft.tta.parts.wrapped import WrappedMethod, WrapperConfig


@dataclass
class RDumbConfig(WrapperConfig):
    """Options of `rdumb`; by default the base is ETA, that is EATA without its Fisher term."""

    base: str = option("eata", "registered method that is restarted")
    base_options: dict[str, Any] = option(
        {"fisher_weight": 0.0}, "options of the base method", options_of=("tta", "base")
    )
    period: int = option(1000, "batches learned from between restarts", low=1)


class RDumb(WrappedMethod):
    """Restarts its base method every so many updates."""

    Config: ClassVar[Any] = RDumbConfig
    paper = "Press et al. 2023, arXiv 2306.05401"

    def _outputs(self, batch: Batch, learn: bool) -> Outputs:
        base = self.base._outputs(batch, learn)
        return Outputs(base.logits, base.features, base.prediction, {"base": base})

    def _update(self, batch: Batch, outputs: Outputs) -> str | None:
        reason = self._learn_base(batch, outputs.extra["base"])
        # By the base's count, which a restart does not set back.
        if reason is None and self.base.batches % self.config.period == 0:
            self.base.restart()
        return reason
