"""Methods that learn by gradient share this: tensors over the frozen model, an optimiser, a guarded step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedpeft.config import option
from fedpeft.tta.deployed import Batch, Statistics, batch_size, batch_statistics
from fedpeft.tta.method import MethodConfig, Outputs, TTAMethod
from fedpeft.tta.parts import optim


@dataclass
class GradientConfig(MethodConfig):
    """Options of methods that learn by gradient steps; `momentum` is of SGD alone."""

    adapt: Any = option("norm_affine", "what adapts: norm_affine, lora, head, all, or a list of name patterns")
    lr: float = option(1e-3, "learning rate", low=0)
    optimizer: str = option("adam", "optimizer", choices=("adam", "sgd"))
    momentum: float = option(0.9, "of sgd", low=0, high=1)
    bn_alpha: float = option(
        1.0, "share of the batch's statistics in batch norms; 0 keeps the running ones", low=0, high=1
    )


class GradientMethod(TTAMethod):
    """A method with adaptable tensors ("student") and an optimiser's moments in its memory.

    A batch of one is predicted with the running statistics of batch norms, and not learned from.
    """

    Config: ClassVar[Any] = GradientConfig
    min_batch: ClassVar[int] = 2

    def _names(self) -> list[str]:
        return self.model.select(self.config.adapt)

    def holds(self) -> list[str]:
        """What it adapts."""
        return self._names()

    def _start(self) -> dict[str, Tensor]:
        """The adaptable tensors before the first batch."""
        return self.model.tensors(self._names())

    def _fresh(self) -> dict[str, Any]:
        return {"student": self._start(), "moments": optim.fresh()}

    def statistics(self, batch: Batch) -> Statistics | None:
        """What batch norms normalise a batch with; None, their running statistics, for a batch of one."""
        return batch_statistics(self.config.bn_alpha) if batch_size(batch) > 1 else None

    def leaves(self, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The student (or other tensors) as leaves of a new graph."""
        # New ones for every pass: no graph reaches back into the batch before.
        return {name: torch.nn.Parameter(value) for name, value in (tensors or self.memory["student"]).items()}

    def _outputs(self, batch: Batch, learn: bool) -> Outputs:
        if not learn:
            return self.forward(batch, self.memory["student"], self.statistics(batch))
        leaves = self.leaves()
        outputs = self.forward(batch, leaves, self.statistics(batch), graph=True)
        outputs.extra["leaves"] = leaves
        return outputs

    def descend(self, loss: Tensor, leaves: dict[str, Tensor]) -> str | None:
        """One optimiser step on the student, or the reason why there was none."""
        gradients, reason = self.finite_gradients(loss, leaves)
        if reason is None:
            self.apply(gradients)
        return reason

    def finite_gradients(self, loss: Tensor, leaves: dict[str, Tensor]) -> tuple[dict[str, Tensor], str | None]:
        """Gradients by name, and None; or the reason why they may not be used: loss or a gradient is not finite."""
        if not bool(loss.isfinite()):
            return {}, f"the loss is {float(loss)}"
        gradients = self.gradients(loss, leaves)
        bad = [name for name, value in gradients.items() if not bool(value.isfinite().all())]
        return gradients, f"the gradient of {bad[0]} is not finite" if bad else None

    def apply(self, gradients: dict[str, Tensor]) -> None:
        """One step of the optimiser on the student; its moments are kept in the memory."""
        config = self.config
        self.memory["student"] = optim.step(
            config.optimizer, self.memory["student"], gradients, self.memory["moments"], config.lr, config.momentum
        )
