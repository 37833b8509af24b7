"""MEMO: for each sample alone, one step that makes the mean prediction over its views certain; then forget it.

    p̄ = (1/V) sum_v softmax f_theta(view_v(x));  theta' = theta - lr dH(p̄);  the answer is softmax f_theta'(x)

Zhang, Levine and Finn, arXiv 2110.09506. Episodic: nothing is kept between samples, so it works on batches of one and a
batch is a loop over its rows. Batch norms keep their running statistics by default (`bn_alpha` 0); above 0 the views'
statistics are mixed in for the step and the sample's own for the answer, as the authors do with their prior N / (N + 1)
= 1 - bn_alpha.

    >>> import torch
    >>> from fedpeft.tta.parts import scores
    >>> logits = torch.tensor([[2.0, 0.0]])
    >>> bool(torch.isclose(marginal_entropy(logits), scores.entropy(logits).mean()))     # one view: TENT's loss
    True
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedpeft.config import option
from fedpeft.tta.deployed import Batch, batch_size, batch_statistics, join_batches, take_rows
from fedpeft.tta.method import Outputs
from fedpeft.tta.parts import optim
from fedpeft.tta.parts.augment import KINDS, augment_batch
from fedpeft.tta.parts.gradient import GradientConfig, GradientMethod
from fedpeft.tta.parts.scores import marginal_entropy


@dataclass
class MEMOConfig(GradientConfig):
    """Options of `memo`: V = `views`, and the one step that each sample gets."""

    adapt: Any = option("all", "what adapts: norm_affine, lora, head, all, or a list of name patterns")
    lr: float = option(0.005, "learning rate", low=0)
    optimizer: str = option("sgd", "optimizer", choices=("adam", "sgd"))
    bn_alpha: float = option(0.0, "share of the views' statistics in batch norms", low=0, high=1)
    views: int = option(32, "augmented views of a sample", low=1)
    augment: str = option("image", "kind of views", choices=KINDS)


class MEMO(GradientMethod):
    """Marginal entropy of one sample's views, one step, episodic."""

    Config: ClassVar[Any] = MEMOConfig
    paper = "Zhang et al. 2021, arXiv 2110.09506"
    min_batch: ClassVar[int] = 1

    def holds(self) -> list[str]:
        """None: every sample starts at the source model."""
        return []

    def _fresh(self) -> dict[str, Any]:
        return {}

    def _outputs(self, batch: Batch, learn: bool) -> Outputs:
        start = self._start()
        rows = [self._answer_one(take_rows(batch, torch.tensor([row])), row, start) for row in range(batch_size(batch))]
        features = [row.features for row in rows if row.features is not None]
        return Outputs(torch.cat([row.logits for row in rows]), torch.cat(features) if features else None)

    def _answer_one(self, sample: Batch, row: int, start: dict[str, Tensor]) -> Outputs:
        """The answer for one sample; the source's where the step is not finite."""
        config, draws = self.config, self.generator("views", row)
        views = join_batches([augment_batch(config.augment, sample, draws) for _ in range(config.views)])
        leaves = self.leaves(start)
        statistics = batch_statistics(config.bn_alpha)
        outputs = self.forward(views, leaves, statistics, graph=True)
        with torch.enable_grad():
            loss = marginal_entropy(outputs.logits)
        gradients, reason = self.finite_gradients(loss, leaves)
        if reason is None:
            # Fresh moments: nothing of one sample may reach the next.
            start = optim.step(config.optimizer, start, gradients, optim.fresh(), config.lr)
        return self.forward(sample, start, statistics)
