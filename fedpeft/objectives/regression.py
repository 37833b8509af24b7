"""Text regression: a head gives one or several numbers for each text; the loss is their mean squared error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpeft.data import skipped
from fedpeft.data.encode import Encoded, encode_texts
from fedpeft.data.records import Records
from fedpeft.data.stored import Tokens
from fedpeft.objectives.base import Objective, divide_or_nan, named_numbers
from fedpeft.objectives.measures import NUMBERS


class Regression(Objective):
    """One number for each text, or several, as they are in the data: no scaling is learned or undone."""

    records = "text"
    auto_class = "AutoModelForSequenceClassification"
    peft_task = "SEQ_CLS"
    labelled = "numbers"
    problem_type = "regression"
    mean_pooled = True
    measures = NUMBERS
    headline = "rmse"

    def encode(
        self, records: Records, processor: Any, max_length: int, what: str, folder: Path | None = None
    ) -> Encoded:
        columns, fillers, cut = encode_texts(records, processor, max_length, what, folder=folder)
        skipped.say(cut)
        assert records.targets is not None
        return Encoded.over(Tokens(columns, fillers, torch.from_numpy(records.targets)), cut)

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error over a text's own numbers [N]; one whose target is NaN counts 0."""
        # The score itself in the place of NaN, without a graph: difference and slope are 0, and no NaN is in between.
        return (scores - targets.where(targets.isfinite(), scores.detach())).square().mean(1)

    def measure(self, scores: Tensor, targets: Tensor, losses: Tensor) -> dict[str, float]:
        return {"loss": float(losses.sum())}

    def metrics(self, sums: Mapping[str, float], samples: int) -> dict[str, float]:
        """`loss` is the mean squared error; there is no accuracy."""
        return {"loss": divide_or_nan(sums["loss"], samples), "num-examples": samples}

    def predictions(self, scores: Tensor) -> Tensor:
        """The numbers themselves."""
        return scores

    def say(self, scores: Tensor, labels: Tensor, names: Sequence[str], inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """The numbers of each text, by name."""
        return [{"values": named_numbers(names, row)} for row in scores]
