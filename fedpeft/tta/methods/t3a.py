"""T3A: the last layer's rows become class prototypes that certain test samples refine; nothing is trained.

Supports of class k start as {w_k}. A test feature z joins those of its predicted class; each class keeps its M supports
of lowest entropy under the source head. Prototype c_k = normalised sum of the normalised supports; scores are z . c_k.

Iwasawa and Matsuo, NeurIPS 2021. M = 100. A head row counts for its own class even where the head would classify it
otherwise, and bias is not used, as in the authors' code. The answer follows the update (`order` after).

    >>> import torch
    >>> from fedpeft.tta.method import make
    >>> from fedpeft.tta.deployed import deploy
    >>> head = torch.nn.Linear(3, 2)
    >>> method = make("t3a", deploy(torch.nn.Sequential(head), head="0"))
    >>> bool(torch.equal(method.memory["supports"], head.weight)), method.memory["labels"].tolist()
    (True, [0, 1])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft.config import option
from fedpeft.tta.deployed import Batch
from fedpeft.tta.method import Outputs
from fedpeft.tta.parts import scores
from fedpeft.tta.parts.wrapped import WrappedMethod, WrapperConfig


@dataclass
class T3AConfig(WrapperConfig):
    """Options of `t3a`; as published a sample joins the supports before it is answered."""

    order: str = option(
        "after", "predict before the update, or after it with another forward pass", choices=("before", "after")
    )
    supports: int = option(100, "M, supports kept a class", low=1)


class T3A(WrappedMethod):
    """Test-time classifier adjustment by class prototypes."""

    Config: ClassVar[Any] = T3AConfig
    paper = "Iwasawa and Matsuo 2021, NeurIPS"

    def holds(self) -> list[str]:
        """The head, whose rows are the first supports, and what the base holds."""
        head = self.model.require_head()
        own = [name for name, places in self.model.slots.items() if any(part is head for part, _ in places)]
        return [*own, *super().holds()]

    def _fresh(self) -> dict[str, Any]:
        weight, bias = self.model.head_parameters()
        weight = weight.detach().clone()
        return {
            "supports": weight,
            "labels": torch.arange(len(weight), device=weight.device),
            # As a sample whose feature is the row itself would have: rows have to hold their places against samples.
            "entropy": scores.entropy(weight @ weight.T + bias.detach()),
        }

    def _outputs(self, batch: Batch, learn: bool) -> Outputs:
        base = self.base._outputs(batch, learn)
        self.model.require_head()
        assert base.features is not None  # there is a head
        supports, labels = self.memory["supports"], self.memory["labels"]
        logits = base.features.detach() @ prototypes(supports, labels, base.logits.shape[1]).T
        return Outputs(logits, base.features, None, {"base": base})

    def _update(self, batch: Batch, outputs: Outputs) -> str | None:
        base = outputs.extra["base"]
        reason = self._learn_base(batch, base)
        if reason is None:
            logits = base.logits.detach()
            grown = (
                torch.cat([self.memory["supports"], base.features.detach()]),
                torch.cat([self.memory["labels"], logits.argmax(-1)]),
                torch.cat([self.memory["entropy"], scores.entropy(logits)]),
            )
            kept = most_certain(grown[1], grown[2], self.config.supports)
            names = ("supports", "labels", "entropy")
            self.memory |= {name: value[kept] for name, value in zip(names, grown, strict=True)}
        return reason


def prototypes(supports: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Unit rows [K, D]: the direction of each class's supports [M, D]."""
    sums = supports.new_zeros(classes, supports.shape[1]).index_add(0, labels, F.normalize(supports, dim=-1))
    return F.normalize(sums, dim=-1)


def most_certain(labels: Tensor, entropy: Tensor, most: int) -> Tensor:
    """Indices, in their old order, of the `most` entries of lowest entropy in each class."""
    # Stable: of equal entropies the older support stays.
    order = torch.argsort(entropy, stable=True)
    kept = [order[labels[order] == label][:most] for label in labels.unique()]
    return torch.cat(kept).sort().values
