"""Prior correction by EM: re-weight the classifier's posterior to a target prior that is estimated on the stream.

With source prior s and target prior t (Saerens, Latinne and Decaestecker 2002), both on the simplex:

    q_ik = p_ik t_k / s_k / sum_l p_il t_l / s_l             (E: the answer)
    t <- (1 - a) t + a mean_i q_i                            (M, stepwise: Cappe and Moulines, arXiv 0712.4273)

t starts at s, so the first answer is the base's, and it lags the answer by one batch. `target=uniform` keeps t uniform:
plain logit adjustment. s comes from the labels of the source data. t has the floor 1e-4.

    >>> import torch
    >>> posterior(torch.tensor([[0.5, 0.5]]), torch.tensor([0.2, 0.8]), torch.tensor([0.5, 0.5])).tolist()[0][1]
    0.800000011920929
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedpeft.config import option
from fedpeft.data.encode import Encoded
from fedpeft.tta.deployed import Batch
from fedpeft.tta.method import Outputs
from fedpeft.tta.parts import scores
from fedpeft.tta.parts.wrapped import WrappedMethod, WrapperConfig

FLOOR = 1e-4


@dataclass
class EMPriorConfig(WrapperConfig):
    """Options of `em_prior`: a = `rate`, and whether t is estimated or uniform."""

    base: str = option("bn_adapt", "registered method whose predictions are corrected")
    rate: float = option(0.1, "share of a batch in the estimate of the prior", low=0, high=1)
    target: str = option("em", "target prior: estimated, or uniform", choices=("em", "uniform"))


class EMPrior(WrappedMethod):
    """Corrects predictions to the stream's own class prior, estimated by EM."""

    Config: ClassVar[Any] = EMPriorConfig
    paper = "Saerens et al. 2002, Neural Computation 14(1)"
    needs_source: str = "labels"

    def _prepare(self, source: Encoded) -> dict[str, Any]:
        logits = self.forward(source.view(np.arange(1)).inputs).logits
        counts = torch.bincount(source.labels, minlength=logits.shape[1])
        return {"prior": scores.on_simplex(counts.to(logits), FLOOR)}

    def _fresh(self) -> dict[str, Any]:
        prior = self.prepared["prior"]
        return {"prior": prior.clone() if self.config.target == "em" else torch.full_like(prior, 1 / len(prior))}

    def _outputs(self, batch: Batch, learn: bool) -> Outputs:
        base = self.base._outputs(batch, learn)
        source, target = self.prepared["prior"], self.memory["prior"]
        # The base's answer bit for bit, as long as there is nothing to correct.
        probs = base.prediction if target.equal(source) else posterior(base.prediction, target, source)
        return Outputs(base.logits, base.features, probs, {"base": base})

    def _update(self, batch: Batch, outputs: Outputs) -> str | None:
        reason = self._learn_base(batch, outputs.extra["base"])
        if reason is None and self.config.target == "em" and self.config.rate > 0:
            mean = outputs.prediction.mean(0)
            self.memory["prior"] = scores.on_simplex(torch.lerp(self.memory["prior"], mean, self.config.rate), FLOOR)
        return reason


def posterior(probs: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """Rows [N, K] re-weighted from prior `source` to prior `target`, both [K]."""
    weighted = probs * (target / source)
    return weighted / weighted.sum(-1, keepdim=True)
