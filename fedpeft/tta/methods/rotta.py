"""RoTTA: robust batch norm statistics, a class-balanced memory of recent certain samples, and a mean teacher.

1. The teacher answers; its batch norms use moving statistics, mu <- (1 - alpha) mu + alpha mu_batch (alpha 0.05).
2. Every sample is offered to a memory of `capacity`. A predicted class is full when it holds capacity / K entries or
   more (K classes; no rounding, so that the memory can fill whatever K is). In a full class (or the largest classes,
   when the memory is full) the entry with the highest s = 1/(1 + exp(-age/capacity)) + H/ln K goes, if that is above
   the newcomer's.
3. Every `update_every` samples the student learns from the memory, strong view against the teacher's plain one,
   weighted by exp(-age) / (1 + exp(-age)), age in units of the capacity; teacher <- nu teacher + (1 - nu) student.

Yuan, Xie and Li, arXiv 2303.13899. Norms without batch statistics (LayerNorm) adapt their affine parameters only.
Learns from single samples too, since they only enter the memory.

    >>> items = offer([], {"label": 0, "uncertainty": 0.5, "age": 0}, capacity=2, classes=2)
    >>> items = offer(items, {"label": 0, "uncertainty": 0.1, "age": 0}, capacity=2, classes=2)
    >>> [(item["uncertainty"], item["age"]) for item in items]
    [(0.1, 1)]
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedpeft.config import option
from fedpeft.tta.deployed import Batch, Statistics, Tensors, join_batches, of_batch, take_rows
from fedpeft.tta.method import Outputs
from fedpeft.tta.parts import scores
from fedpeft.tta.parts.augment import KINDS, augment_batch
from fedpeft.tta.parts.gradient import GradientConfig, GradientMethod

Item = dict[str, Any]


@dataclass
class RoTTAConfig(GradientConfig):
    """Options of `rotta`: alpha = `bn_alpha`, nu = `ema`, and the memory."""

    bn_alpha: float = option(0.05, "share of a memory batch in the moving statistics", low=0, high=1)
    capacity: int = option(64, "samples in the memory", low=2)
    update_every: int = option(64, "samples between updates", low=1)
    ema: float = option(0.999, "nu, share that the teacher keeps", low=0, high=1)
    augment: str = option("image", "kind of the student's view", choices=KINDS)


class RoTTA(GradientMethod):
    """Robust statistics, class-balanced memory and a mean teacher."""

    Config: ClassVar[Any] = RoTTAConfig
    paper = "Yuan et al. 2023, arXiv 2303.13899"
    min_batch: ClassVar[int] = 1

    def _fresh(self) -> dict[str, Any]:
        moving = {
            name: [part.running_mean.clone(), part.running_var.clone()]
            for name, part in self.model.norms.items()
            if part.running_mean is not None
        }
        return {
            **super()._fresh(),
            "teacher": self._start(),
            "moving": moving,
            "student_moving": moving,
            "items": [],
            "offered": 0,
        }

    def _outputs(self, batch: Batch, learn: bool) -> Outputs:
        return self.forward(batch, self.memory["teacher"], self._fixed_norm())

    def _update(self, batch: Batch, outputs: Outputs) -> str | None:
        # Values are replaced and never changed in place, so a shallow copy is enough to go back to.
        config, before = self.config, dict(self.memory)
        labels, uncertainty = outputs.prediction.argmax(-1).tolist(), scores.entropy_of(outputs.prediction).tolist()
        classes = outputs.logits.shape[1]
        for row, label in enumerate(labels):
            item = {
                "input": take_rows(batch, torch.tensor([row])),
                "label": label,
                "uncertainty": uncertainty[row],
                "age": 0,
            }
            self.memory["items"] = offer(self.memory["items"], item, config.capacity, classes)
            self.memory["offered"] += 1
            if self.memory["offered"] % config.update_every == 0 and len(self.memory["items"]) > 1:
                reason = self._learn_from_memory()
                if reason is not None:
                    self.memory = before
                    return reason
        return None

    def _learn_from_memory(self) -> str | None:
        items = self.memory["items"]
        batch = join_batches([item["input"] for item in items])
        target, moving = self._training_forward(batch, self.memory["teacher"], "moving", graph=False)
        view = augment_batch(self.config.augment, batch, self.generator("view", self.memory["offered"]))
        leaves = self.leaves()
        logits, student_moving = self._training_forward(view, leaves, "student_moving", graph=True)
        ages = torch.tensor([item["age"] / self.config.capacity for item in items])
        loss = (torch.sigmoid(-ages).to(logits) * scores.cross_entropy(target, logits)).mean()
        gradients, reason = self.finite_gradients(loss, leaves)
        if reason is not None:
            return reason
        # `apply` writes into the moments; without a copy the way back of `_update` would be gone.
        self.memory["moments"] = {
            key: dict(value) if isinstance(value, dict) else value for key, value in self.memory["moments"].items()
        }
        self.apply(gradients)
        student, keep = self.memory["student"], self.config.ema
        self.memory["teacher"] = {
            name: keep * value + (1 - keep) * student[name] for name, value in self.memory["teacher"].items()
        }
        self.memory |= {"moving": moving, "student_moving": student_moving}
        return None

    def _fixed_norm(self) -> Statistics | None:
        moving = self.memory["moving"]
        if not moving:
            return None
        return lambda name, module, values: tuple(moving[name]) if name in moving else of_batch(values)

    def _training_forward(
        self, batch: Batch, overlay: Tensors, which: str, graph: bool
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Logits under statistics that take in this batch, and these statistics."""
        alpha, old = self.config.bn_alpha, self.memory[which]
        new: dict[str, list[Tensor]] = {}

        def statistics(name: str, module: Any, values: Tensor) -> tuple[Tensor, Tensor]:
            mean, variance = of_batch(values)
            if name in old:
                mean, variance = torch.lerp(old[name][0], mean, alpha), torch.lerp(old[name][1], variance, alpha)
                new[name] = [mean.detach(), variance.detach()]
            return mean, variance

        return self.forward(batch, overlay, statistics, graph=graph).logits, new


def offer(items: list[Item], item: Item, capacity: int, classes: int) -> list[Item]:
    """The memory after a sample was offered; everything in it is one sample older."""

    def score(entry: Item) -> float:
        return float(1 / (1 + math.exp(-entry["age"] / capacity)) + entry["uncertainty"] / math.log(classes))

    # A class at its share gives up one of its own; a full memory one of its largest classes; else there is room.
    held = Counter(entry["label"] for entry in items)
    rivals: list[int] | None = None
    if held[item["label"]] >= capacity / classes:
        rivals = [item["label"]]
    elif len(items) >= capacity:
        rivals = [label for label, count in held.items() if count == max(held.values())]
    kept = list(items)
    if rivals is not None:
        worst = max((entry for entry in items if entry["label"] in rivals), key=score)
        if score(worst) > score(item):
            kept = [entry for entry in items if entry is not worst]
    if rivals is None or len(kept) < len(items):
        kept.append(item)
    return [{**entry, "age": entry["age"] + 1} for entry in kept]
