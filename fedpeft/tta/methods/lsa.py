"""Label shift adapter: a small network, trained on source data, moves the classifier to the target's class imbalance.

The imbalance of a class distribution pi is one number, with centred logarithms and source prior s:

    d(pi) = <log pi, log s> / |log s|^2          1: as in the source, 0: uniform, -1: inverted
    h~ = (1 + gamma) ⊙ h + beta;  z = (W + dW) h~ + b + db
    gamma, beta, dW, db = network(d), its last layer 0 at first

Training, backbone frozen: d uniform in [-1.5, 1.5], pi_d ∝ s^d, loss CE(z + tau (log s - log pi_d), y), so z estimates
the posterior under pi_d. On the stream: z with d(pi), then pi <- (1 - a) pi + a mean_i softmax z_i, pi uniform at
first, entries at least 1e-4. Any base method may adapt the backbone below.

After Park, Choi, Kim and Ye, arXiv 2308.08810; no code is public, so the map to d, the sizes and the constants are
ours. The scalar cannot express every pi, and EM prior correction beat it in our tests: keep that row beside it.

    >>> import torch
    >>> s = torch.tensor([0.1, 0.3, 0.6])
    >>> [round(degree(pi, s), 4) + 0.0 for pi in (s, torch.full((3,), 1 / 3), (1 / s) / (1 / s).sum())]
    [1.0, 0.0, -1.0]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft import seeds
from fedpeft.config import option
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from fedpeft.tta.deployed import Batch
from fedpeft.tta.method import Outputs, source_batches
from fedpeft.tta.parts import optim, scores
from fedpeft.tta.parts.wrapped import WrappedMethod, WrapperConfig

FLOOR, RANGE = 1e-4, 1.5


@dataclass
class LSAConfig(WrapperConfig):
    """Options of `lsa`; all but `base` and `rate` are of the network's training on source data."""

    base: str = option("bn_adapt", "registered method below the adapter")
    rate: float = option(0.1, "a, share of a batch in the estimate of the class distribution", low=0, high=1)
    hidden: int = option(16, "hidden units of the network", low=1)
    tau: float = option(1.0, "strength of the logit adjustment in training", low=0)
    steps: int = option(500, "training steps", low=0)
    lr: float = option(1e-3, "training learning rate (Adam)", above=0)
    batch: int = option(64, "training batch", low=1)


class LabelShiftAdapter(WrappedMethod):
    """Moves features and classifier to the target's estimated class imbalance."""

    Config: ClassVar[Any] = LSAConfig
    paper = "Park et al. 2023, arXiv 2308.08810"
    needs_source: str = "labels"

    def _prepare(self, source: Encoded) -> dict[str, Any]:
        self.model.require_head()
        found = [self.forward(batch) for batch, _ in source_batches(source)]
        logits = torch.cat([outputs.logits for outputs in found])
        features = torch.cat([outputs.features for outputs in found if outputs.features is not None])
        prior = scores.on_simplex(torch.bincount(source.labels, minlength=logits.shape[1]).float(), FLOOR).to(logits)
        if float(_centre_log(prior).norm()) < 1e-6:
            raise InputError("lsa: the source classes are exactly balanced, so there is no imbalance to move along.")
        return {"prior": prior, "network": self._train(features, logits, source.labels.to(logits.device), prior)}

    def _train(self, features: Tensor, logits: Tensor, labels: Tensor, prior: Tensor) -> dict[str, Tensor]:
        config, weight = self.config, self.model.head_parameters()[0].detach()
        draws = seeds.torch_generator(self.seed, "tta", "lsa")
        network = fresh_network(config.hidden, weight.shape[0], weight.shape[1], draws)
        network, moments = {name: value.to(weight) for name, value in network.items()}, optim.fresh()
        for number in range(config.steps):
            draws = seeds.torch_generator(self.seed, "tta", "lsa", number)
            rows = torch.randint(len(labels), (config.batch,), generator=draws).to(labels.device)
            d = float(torch.rand((), generator=draws)) * 2 * RANGE - RANGE
            # Imbalances of all degrees, from none to the reverse, so that whichever the target has was trained for.
            target = scores.on_simplex(prior**d, 0.0)
            leaves: dict[str, Tensor] = {name: torch.nn.Parameter(value) for name, value in network.items()}
            with torch.enable_grad():
                z = adapted(logits[rows], features[rows], weight, leaves, d)
                loss = F.cross_entropy(z + config.tau * (prior.log() - target.log()), labels[rows])
            network = optim.step("adam", network, self.gradients(loss, leaves), moments, config.lr)
        return network

    def _fresh(self) -> dict[str, Any]:
        prior = self.prepared["prior"]
        return {"target": torch.full_like(prior, 1 / len(prior))}

    def _outputs(self, batch: Batch, learn: bool) -> Outputs:
        base = self.base._outputs(batch, learn)
        assert base.features is not None  # there is a head
        weight, _ = self.model.head_parameters(self.base.memory.get("student"))
        # The network has seen no imbalance beyond, and there may answer anything.
        d = max(-RANGE, min(RANGE, degree(self.memory["target"], self.prepared["prior"])))
        logits = adapted(base.logits.detach(), base.features.detach(), weight.detach(), self.prepared["network"], d)
        return Outputs(logits, base.features, None, {"base": base})

    def _update(self, batch: Batch, outputs: Outputs) -> str | None:
        reason = self._learn_base(batch, outputs.extra["base"])
        if reason is None and self.config.rate > 0:
            mean = outputs.prediction.mean(0)
            self.memory["target"] = scores.on_simplex(torch.lerp(self.memory["target"], mean, self.config.rate), FLOOR)
        return reason


def fresh_network(hidden: int, classes: int, width: int, draws: torch.Generator) -> dict[str, Tensor]:
    """Weights of d -> tanh layer -> (gamma [D], beta [D], dW [K, D], db [K]) in one row."""
    out = 2 * width + classes * width + classes
    return {
        "first": torch.randn(hidden, 1, generator=draws),
        "first_bias": torch.randn(hidden, generator=draws),
        "last": torch.zeros(out, hidden),
        "last_bias": torch.zeros(out),
    }


def adapted(logits: Tensor, features: Tensor, weight: Tensor, network: dict[str, Tensor], d: float) -> Tensor:
    """z [N, K] from the base's logits W h + b, its features h and its W [K, D]."""
    classes, width = weight.shape
    hidden = torch.tanh(network["first"] @ weight.new_tensor([d]) + network["first_bias"])
    row = network["last"] @ hidden + network["last_bias"]
    gamma, beta, change, bias = row.split([width, width, classes * width, classes])
    moved: Tensor = gamma * features + beta
    z: Tensor = logits + moved @ weight.T + (features + moved) @ change.reshape(classes, width).T + bias
    return z


def degree(pi: Tensor, prior: Tensor) -> float:
    """The imbalance of `pi` along that of the source."""
    axis = _centre_log(prior)
    return float(_centre_log(pi) @ axis / axis.square().sum())


def _centre_log(pi: Tensor) -> Tensor:
    log = scores.log(pi)
    return log - log.mean()
