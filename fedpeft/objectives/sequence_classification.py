"""Text classification: a head scores the classes of each text; the loss is cross-entropy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedpeft.data import skipped
from fedpeft.data.encode import Encoded, encode_texts
from fedpeft.data.records import Records
from fedpeft.data.stored import Tokens
from fedpeft.objectives.base import Objective


class SequenceClassification(Objective):
    """One of several classes for each text."""

    records = "text"
    auto_class = "AutoModelForSequenceClassification"
    peft_task = "SEQ_CLS"
    mean_pooled = True

    def encode(
        self, records: Records, processor: Any, max_length: int, what: str, folder: Path | None = None
    ) -> Encoded:
        columns, fillers, cut = encode_texts(records, processor, max_length, what, folder=folder)
        skipped.say(cut)
        return Encoded.over(Tokens(columns, fillers, torch.from_numpy(records.labels)), cut)
