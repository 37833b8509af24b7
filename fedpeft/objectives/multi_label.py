"""Multi-label text classification: a head says of each label whether a text has it; binary cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft.data import skipped
from fedpeft.data.encode import Encoded, encode_texts
from fedpeft.data.records import Records
from fedpeft.data.stored import Tokens
from fedpeft.objectives.base import Objective, named_numbers
from fedpeft.objectives.measures import SEVERAL


class MultiLabel(Objective):
    """Several labels for each text, or none: each is answered by itself, yes above one half."""

    records = "text"
    auto_class = "AutoModelForSequenceClassification"
    peft_task = "SEQ_CLS"
    labelled = "several"
    problem_type = "multi_label_classification"
    mean_pooled = True
    measures = SEVERAL

    def encode(
        self, records: Records, processor: Any, max_length: int, what: str, folder: Path | None = None
    ) -> Encoded:
        columns, fillers, cut = encode_texts(records, processor, max_length, what, folder=folder)
        skipped.say(cut)
        assert records.targets is not None
        return Encoded.over(Tokens(columns, fillers, torch.from_numpy(records.targets).float()), cut)

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Mean over the labels of a text [N], those that it has and those that it has not; NaN counts 0."""
        # Taken out before the loss and after it: a slope of NaN times 0 is NaN again, and would reach all parameters.
        known = targets.isfinite()
        each = F.binary_cross_entropy_with_logits(scores, targets.where(known, 0).to(scores.dtype), reduction="none")
        return each.where(known, 0).mean(1)

    def measure(self, scores: Tensor, targets: Tensor, losses: Tensor) -> dict[str, float]:
        """Right is a text whose every label is right."""
        right = int(((scores > 0) == (targets > 0.5)).all(1).sum())
        return {"loss": float(losses.sum()), "right": right, "targets": len(targets)}

    def say(self, scores: Tensor, labels: Tensor, names: Sequence[str], inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """The labels of each text, and the probability of each."""
        return [
            {
                "labels": [name for name, value in zip(names, row.tolist(), strict=True) if value > 0.5],
                "probabilities": named_numbers(names, row),
            }
            for row in scores.sigmoid()
        ]

    def predictions(self, scores: Tensor) -> Tensor:
        """The probability of each label."""
        return scores.sigmoid()
