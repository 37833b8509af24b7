"""EAR: a frozen encoder finds domains in the stream, each gets an adapter of its own, and inputs go to the nearest.

With the frozen encoder's features f, source mean mu and deviation sigma (per feature), R of random signs, b Gaussian:

    code(x) = sign(R' (f(x) - mu) / sigma + b) in {-1, 1}^bits,     a batch or a domain is the sum of its codes

A batch whose cosine to every known domain is below `threshold` opens a new domain, whose branch starts from the source
model's tensors; else it goes to the nearest. The source domain is the source model itself and learns nothing. The
branch that was taken learns by entropy minimisation; all others stay the same bits.

After Daniels et al., arXiv 2308.02084 (encoder, adaptor, reconfigurator), whose code is not public. b is ours: it gives
the source domain a code, so that nearness to it is a cosine too. Left out: their search among adaptor architectures
(what adapts is `adapt`: `lora` gives one LoRA a domain), and their supervised training of a new branch. A whole batch
has one domain. `bn_alpha` is that of the branches; the encoder keeps its running statistics. The default
threshold was picked on a digits-C stream in batches of 32, by how many branches it opened there; that each of them held
one corruption was not checked, and other data, batches or encoders need another threshold.

    >>> import torch
    >>> route_code(torch.tensor([1.0, 1.0]), [torch.tensor([1.0, -1.0]), torch.tensor([3.0, 3.0])], 0.9)
    (1, 1.0)
    >>> route_code(torch.tensor([1.0, 1.0]), [torch.tensor([1.0, -1.0])], 0.9)
    (None, 0.0)
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
from fedpeft.tta.deployed import Batch
from fedpeft.tta.method import Outputs, source_batches
from fedpeft.tta.parts import optim, scores
from fedpeft.tta.parts.gradient import GradientConfig, GradientMethod

LEAST = 1e-6  # deviation of a feature that never changes


@dataclass
class EARConfig(GradientConfig):
    """Options of `ear`: when a batch opens a domain, and how long the codes are that tell domains apart."""

    threshold: float = option(0.95, "cosine below which a batch belongs to no known domain", low=-1, high=1)
    domains: int = option(16, "most domains beside the source's; from then on the nearest is taken", low=1)
    bits: int = option(1024, "length of a code", low=1)


class EAR(GradientMethod):
    """One adapter a domain, found and chosen by codes of a frozen encoder's features."""

    Config: ClassVar[Any] = EARConfig
    paper = "Daniels et al. 2023, arXiv 2308.02084"
    needs_source: str = "inputs"

    def __init__(self, model: Any, seed: int = 0, **options: Any) -> None:
        super().__init__(model, seed, **options)
        self.model.require_head()
        self._names()  # refuse an empty set now, not when the first domain turns up

    def _prepare(self, source: Encoded) -> dict[str, Any]:
        features = torch.cat([self._detached_features(self.forward(batch)) for batch, _ in source_batches(source)])
        draws = seeds.torch_generator(self.seed, "tta", "ear")
        width, bits = features.shape[1], self.config.bits
        found = {
            "mean": features.mean(0),
            "deviation": features.std(0, correction=0).clamp(min=LEAST),
            "signs": (2.0 * torch.randint(2, (width, bits), generator=draws) - 1).to(features),
            "bias": (width**0.5 * torch.randn(bits, generator=draws)).to(features),
        }
        return {**found, "source": sign_codes(features, found).sum(0)}

    def _fresh(self) -> dict[str, Any]:
        return {"branches": []}

    @staticmethod
    def _detached_features(outputs: Outputs) -> Tensor:
        assert outputs.features is not None  # there is a head
        return outputs.features.detach()

    def _outputs(self, batch: Batch, learn: bool) -> Outputs:
        plain, branches = self.forward(batch), self.memory["branches"]
        code = sign_codes(self._detached_features(plain), self.prepared).sum(0)
        known = [self.prepared["source"], *(branch["code"] for branch in branches)]
        full = len(branches) >= self.config.domains
        # No cosine is below -1: with all places taken the nearest domain is the right one.
        place, _ = route_code(code, known, -1.0 if full else self.config.threshold)
        extra: dict[str, Any] = {"place": place, "code": code}
        if place == 0:
            return Outputs(plain.logits, plain.features, None, extra)
        student = self._start() if place is None else branches[place - 1]["student"]
        leaves = self.leaves(student) if learn else student
        outputs = self.forward(batch, leaves, self.statistics(batch), graph=learn)
        outputs.extra = {**extra, "leaves": leaves}
        return outputs

    def _update(self, batch: Batch, outputs: Outputs) -> str | None:
        place, branches = outputs.extra["place"], self.memory["branches"]
        if place == 0:
            return "the batch looks like source data"
        leaves = outputs.extra["leaves"]
        gradients, reason = self.finite_gradients(scores.entropy(outputs.logits).mean(), leaves)
        if reason is not None:
            return reason
        # Made only now, since a batch that taught nothing must leave no domain behind.
        if place is None:
            branches.append(
                {"code": torch.zeros_like(outputs.extra["code"]), "student": self._start(), "moments": optim.fresh()}
            )
            place = len(branches)
        branch, config = branches[place - 1], self.config
        branch["code"] = branch["code"] + outputs.extra["code"]
        branch["student"] = optim.step(
            config.optimizer, branch["student"], gradients, branch["moments"], config.lr, config.momentum
        )
        return None


def sign_codes(features: Tensor, prepared: dict[str, Tensor]) -> Tensor:
    """Rows [N, D] as rows of signs [N, bits]."""
    scaled = (features - prepared["mean"]) / prepared["deviation"]
    return torch.where(scaled @ prepared["signs"] + prepared["bias"] >= 0, 1.0, -1.0)


def route_code(code: Tensor, known: list[Tensor], threshold: float) -> tuple[int | None, float]:
    """The place of the nearest known code, None if even that is below the threshold, and its cosine."""
    cosines = torch.stack([F.cosine_similarity(code, other, dim=0) for other in known])
    best, place = cosines.max(0)
    return (int(place) if float(best) >= threshold else None), round(float(best), 6)
