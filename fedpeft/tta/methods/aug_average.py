"""Mean of a frozen model's answers over augmented views: most of what CoTTA gains on short streams (specs: 24.6 against
24.2), so a table without this row says little.

    z = (1/V) sum_v f(view_v(x)),  p = softmax(z)        (the mean of probabilities by option)

Cf. Krizhevsky et al. 2012 (test-time augmentation); views are those of CoTTA (Wang et al., arXiv 2203.13591).

    >>> import torch
    >>> from fedpeft.tta.method import make
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    >>> method = make("aug_average", net, {"augment": "identity"})
    >>> x = torch.rand(2, 1, 2, 2)
    >>> bool(torch.allclose(method.predict(x), net(x).softmax(-1)))
    True
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedpeft.config import option
from fedpeft.tta.deployed import Batch, batch_size, batch_statistics
from fedpeft.tta.method import MethodConfig, Outputs, TTAMethod
from fedpeft.tta.parts.augment import KINDS, augment_batch


@dataclass
class AugAverageConfig(MethodConfig):
    """Options of `aug_average`: V = `views`, and whether logits or probabilities are averaged."""

    views: int = option(4, "augmented views", low=1)
    augment: str = option("image", "kind of views", choices=KINDS)
    average: str = option("logits", "what is averaged", choices=("logits", "probs"))
    bn_alpha: float = option(1.0, "share of the batch's statistics in batch norms", low=0, high=1)


class AugAverage(TTAMethod):
    """Mean over augmented views of the frozen source model."""

    Config: ClassVar[Any] = AugAverageConfig
    paper = "Wang et al. 2022 (its ablation), arXiv 2203.13591"

    def _outputs(self, batch: Batch, learn: bool) -> Outputs:
        config = self.config
        # One sample has no variance over the batch to speak of.
        statistics = batch_statistics(config.bn_alpha) if batch_size(batch) > 1 else None
        draws = self.generator("views")
        views = [
            self.forward(augment_batch(config.augment, batch, draws), None, statistics) for _ in range(config.views)
        ]
        logits = torch.stack([view.logits for view in views])
        features = [view.features for view in views if view.features is not None]
        return Outputs(
            logits.mean(0),
            torch.stack(features).mean(0) if features else None,
            logits.softmax(-1).mean(0) if config.average == "probs" else None,
        )
