"""PETAL: CoTTA from the maximum a posteriori view: a Gaussian prior from source training, and a data-driven restore.

Before deployment (SWAG-diagonal): go on training on source data, over the snapshots m = mean theta, v = mean theta^2 -
m^2. Student and teacher start at m, which is the anchor too. On the stream, as CoTTA with

    L = CE(teacher -> student) + s/2 sum_i (theta_i - m_i)^2 / (v_i + 1e-6)
    restore: the share `restore` of entries with the smallest squared gradient goes back to m      (fisher)
             or each entry with probability `restore`                                              (random: CoTTA's)

Brahma and Rai, arXiv 2212.09713. Fixed here, against the released code: v >= 0; snapshots are really taken (20 by
default); the k = floor(share x P) smallest are selected and ties broken at random, where a strict quantile restores
nothing once that many gradients are exactly 0 (LoRA with B = 0); tensors and embedding rows that the batch did not use
do not count; the Fisher term is of the data loss alone by default; `per_tensor` takes the share within each tensor.
`adapt: all` is every tensor, where the authors take those named weight or bias, as in CoTTA.

    >>> import torch
    >>> scores = {"w": torch.tensor([0.0, 0.0, 0.0, 4.0])}
    >>> int(smallest(scores, 0.5, torch.Generator(), False)["w"].sum())
    2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpeft import seeds
from fedpeft.config import option
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from fedpeft.tta.parts import optim
from fedpeft.tta.parts.teacher import MeanTeacher, TeacherConfig, restore_at_random

DAMPING = 1e-6


@dataclass
class PETALConfig(TeacherConfig):
    """Options of `petal`; those named `snapshot` make the prior before deployment."""

    restore: float = option(0.03, "delta, share of entries that go back to the prior's mean", low=0, high=1)
    rule: str = option("fisher", "which entries are restored", choices=("fisher", "random"))
    fisher: str = option("data", "loss whose squared gradient ranks the entries", choices=("data", "whole"))
    per_tensor: bool = option(False, "take the share within each tensor")
    prior_weight: float = option(1e-9, "s, weight of the prior", low=0)
    snapshots: int = option(20, "source-training snapshots for mean and variance", low=2)
    snapshot_steps: int = option(5, "steps between snapshots", low=1)
    snapshot_lr: float = option(8e-4, "learning rate (SGD, momentum 0.9) of the source training", low=0)
    snapshot_batch: int = option(64, "batch of the source training", low=2)


class PETAL(MeanTeacher):
    """Probabilistic lifelong adaptation: a weight prior and Fisher-guided restore on a mean teacher."""

    Config: ClassVar[Any] = PETALConfig
    paper = "Brahma and Rai 2023, arXiv 2212.09713"

    def _needs(self) -> str:
        return "labels"

    def _prepare(self, source: Encoded) -> dict[str, Any]:
        self.prepared = self._fit_swag(source)
        return {**self.prepared, **super()._prepare(source)}

    def _fit_swag(self, source: Encoded) -> dict[str, Any]:
        config, start, moments = self.config, self.model.tensors(self._names()), optim.fresh()
        student = start
        moved = {name: torch.zeros_like(value) for name, value in start.items()}  # means of theta - start: no
        square = {name: torch.zeros_like(value) for name, value in start.items()}  # cancellation in the variance
        for number in range(config.snapshots * config.snapshot_steps):
            draws = seeds.numpy_generator(self.seed, "tta", "swag", number)
            rows = draws.choice(len(source), min(config.snapshot_batch, len(source)), replace=False)
            batch, labels = source.batch(rows)
            leaves = self.leaves(student)
            loss = F.cross_entropy(
                self.forward(batch, leaves, self.statistics(batch), graph=True).logits, labels.to(self.model.device)
            )
            gradients, reason = self.finite_gradients(loss, leaves)
            if reason is not None:
                raise InputError(f"petal: source training for the prior failed: {reason}. Lower snapshot_lr.")
            student = optim.step("sgd", student, gradients, moments, config.snapshot_lr, 0.9)
            if (number + 1) % config.snapshot_steps == 0:
                for name, value in student.items():
                    moved[name] += (value - start[name]) / config.snapshots
                    square[name] += (value - start[name]).square() / config.snapshots
        return {
            "mean": {name: value + moved[name] for name, value in start.items()},
            "variance": {name: (square[name] - moved[name].square()).clamp(min=0) for name in start},
        }

    def _start(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.prepared["mean"].items()}

    def anchor(self) -> dict[str, Tensor]:
        mean: dict[str, Tensor] = self.prepared["mean"]
        return mean

    def _penalty_gradient(self, name: str, value: Tensor) -> Tensor | None:
        weight = self.config.prior_weight
        if weight == 0:
            return None
        mean, variance = self.prepared["mean"][name], self.prepared["variance"][name]
        gradient: Tensor = weight * (value - mean) / (variance + DAMPING)
        return gradient

    def _restored(
        self, student: dict[str, Tensor], data: dict[str, Tensor], whole: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        config, draws, mean = self.config, self.generator("restore"), self.prepared["mean"]
        if config.rule == "random":
            return restore_at_random(student, mean, config.restore, draws, config.joint_lora)
        chosen = data if config.fisher == "data" else whole
        fisher = {name: value.square() for name, value in chosen.items()}
        for name, value in fisher.items():
            # Rows of tokens that did not come have no gradient, and would all count as unimportant.
            if isinstance(self.model.slots[name][0][0], nn.Embedding):
                fisher[name] = value.masked_fill((data[name] == 0).all(-1, keepdim=True), torch.nan)
        masks = smallest(fisher, config.restore, draws, config.per_tensor)
        return {
            name: torch.where(masks[name], mean[name], value) if name in masks else value
            for name, value in student.items()
        }


def smallest(values: dict[str, Tensor], share: float, draws: torch.Generator, per_tensor: bool) -> dict[str, Tensor]:
    """Masks of the floor(share x P) smallest of P entries, over all tensors or in each; NaN entries do not count."""
    if per_tensor:
        return {name: smallest({name: value}, share, draws, False)[name] for name, value in values.items()}
    flat = torch.cat([value.flatten() for value in values.values()])
    counted = (~flat.isnan()).nonzero().squeeze(-1)
    shuffled = counted[torch.randperm(len(counted), generator=draws).to(counted.device)]
    first = shuffled[flat[shuffled].argsort(stable=True)[: int(share * len(counted))]]
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[first] = True
    parts = mask.split([value.numel() for value in values.values()])
    return {name: part.reshape(value.shape) for (name, value), part in zip(values.items(), parts, strict=True)}
