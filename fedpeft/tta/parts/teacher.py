"""CoTTA and PETAL share a student, its moving average as teacher, and targets averaged where the anchor is unsure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedpeft.config import option
from fedpeft.data.encode import Encoded
from fedpeft.tta.deployed import Batch
from fedpeft.tta.method import Outputs, source_batches
from fedpeft.tta.parts import scores
from fedpeft.tta.parts.augment import KINDS, augment_batch
from fedpeft.tta.parts.gradient import GradientConfig, GradientMethod


@dataclass
class TeacherConfig(GradientConfig):
    """Options of methods with a student, its moving average as teacher, and an anchor."""

    adapt: Any = option("all", "what adapts: norm_affine, lora, head, all, or a list of name patterns")
    ema: float = option(0.999, "alpha, share that the teacher keeps", low=0, high=1)
    views: int = option(32, "augmented views in a target", low=1)
    threshold: float | None = option(
        None,
        "mean confidence of the anchor below which targets are averaged over views; "
        "null is the 5 % quantile on source data - 0.05",
        low=0,
    )
    augment: str = option("image", "kind of views", choices=KINDS)
    symmetric: bool = option(False, "mean of the cross entropy in both directions (the authors' ImageNet form)")
    restore: float = option(0.01, "p, share of entries that go back to the anchor after a step", low=0, high=1)
    restore_order: str = option(
        "after", "restore after the teacher took the student in, as published, or before", choices=("after", "before")
    )
    joint_lora: bool = option(True, "restore row r of lora_A and column r of lora_B together, or not at all")


class MeanTeacher(GradientMethod):
    """Student, teacher and targets; a method adds its penalty and its restore."""

    Config: ClassVar[Any] = TeacherConfig

    def _needs(self) -> str:
        return "inputs" if self.config.threshold is None else "none"

    def _prepare(self, source: Encoded) -> dict[str, Any]:
        if self.config.threshold is not None:
            return {}
        confidence = [
            self.forward(batch, self.anchor(), self.statistics(batch)).prediction.max(-1).values
            for batch, _ in source_batches(source)
        ]
        return {"threshold": float(torch.cat(confidence).quantile(0.05)) - 0.05}

    def _fresh(self) -> dict[str, Any]:
        return {**super()._fresh(), "teacher": self._start()}

    def anchor(self) -> dict[str, Tensor]:
        """Tensors of the anchor over the backbone; none is the source model."""
        return {}

    def _penalty_gradient(self, name: str, value: Tensor) -> Tensor | None:
        return None

    def _restored(
        self, student: dict[str, Tensor], data: dict[str, Tensor], whole: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The student after the restore; `data` and `whole` are the gradients of its loss without and with penalty."""
        return restore_at_random(
            student, self._start(), self.config.restore, self.generator("restore"), self.config.joint_lora
        )

    def _outputs(self, batch: Batch, learn: bool) -> Outputs:
        config, statistics = self.config, self.statistics(batch)
        anchor = self.forward(batch, self.anchor(), statistics)
        threshold = config.threshold if config.threshold is not None else self.prepared["threshold"]
        # Only far from the source, where one view is not to be trusted: the mean of many costs a pass each.
        if float(anchor.prediction.max(-1).values.mean()) < threshold:
            draws = self.generator("views")
            views = [
                self.forward(augment_batch(config.augment, batch, draws), self.memory["teacher"], statistics)
                for _ in range(config.views)
            ]
            features = [view.features for view in views if view.features is not None]
            target = Outputs(
                torch.stack([view.logits for view in views]).mean(0),
                torch.stack(features).mean(0) if features else None,
            )
        else:
            target = self.forward(batch, self.memory["teacher"], statistics)
        if learn:
            leaves = self.leaves()
            target.extra = {"leaves": leaves, "student": self.forward(batch, leaves, statistics, graph=True).logits}
        return target

    def _update(self, batch: Batch, outputs: Outputs) -> str | None:
        leaves, logits = outputs.extra["leaves"], outputs.extra["student"]
        loss = scores.symmetric_cross_entropy if self.config.symmetric else scores.cross_entropy
        data, reason = self.finite_gradients(loss(outputs.logits, logits).mean(), leaves)
        if reason is not None:
            return reason
        whole = dict(data)
        for name, value in self.memory["student"].items():
            penalty = self._penalty_gradient(name, value)
            if penalty is not None:
                whole[name] = whole[name] + penalty if name in whole else penalty
        self.apply(whole)
        # So that what was restored reaches the teacher, which gives the answers.
        if self.config.restore_order == "before":
            self.memory["student"] = self._restored(self.memory["student"], data, whole)
        keep, student = self.config.ema, self.memory["student"]
        self.memory["teacher"] = {
            name: keep * value + (1 - keep) * student[name] for name, value in self.memory["teacher"].items()
        }
        if self.config.restore_order == "after":
            self.memory["student"] = self._restored(student, data, whole)
        return None


def restore_at_random(
    student: dict[str, Tensor], anchor: dict[str, Tensor], p: float, draws: torch.Generator, joint_lora: bool
) -> dict[str, Tensor]:
    """Each entry from `anchor` with probability p; a LoRA pair by rank-one components if `joint_lora`."""
    new = {}
    components: dict[str, Tensor] = {}
    for name, value in student.items():
        role = "A" if ".lora_A." in f".{name}" else "B" if ".lora_B." in f".{name}" else ""
        if joint_lora and role:
            pair = name.replace("lora_A.", "lora_*.").replace("lora_B.", "lora_*.")
            rank = value.shape[0] if role == "A" else value.shape[1]
            if pair not in components:
                # One draw for A and B: half a restored component would be neither the old product nor the new one.
                components[pair] = torch.rand(rank, generator=draws) < p
            mask = components[pair].reshape((-1, 1) if role == "A" else (1, -1)).expand(value.shape[:2])
            mask = mask.reshape(*mask.shape, *([1] * (value.ndim - 2)))
        else:
            mask = torch.rand(value.shape, generator=draws) < p
        new[name] = torch.where(mask.to(value.device), anchor[name], value)
    return new
