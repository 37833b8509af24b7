"""Image classification: a head scores the classes of each image; the loss is cross-entropy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedpeft.data.encode import Encoded
from fedpeft.data.images import Images
from fedpeft.data.records import Records
from fedpeft.objectives.base import Objective


class ImageClassification(Objective):
    """One of several classes for each image."""

    records = "image"
    auto_class = "AutoModelForImageClassification"

    def encode(
        self, records: Records, processor: Any, max_length: int, what: str, folder: Path | None = None
    ) -> Encoded:
        return Encoded.over(Images(records.inputs, processor, torch.from_numpy(records.labels), records.augment))
