"""Real 8x8 digits, two classes a task, on a network pre-trained on random strokes: the smallest real class stream.

Easy: a nearest class mean on the frozen network has about 82 %, RanPAC about 98 %. It shows what forgets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fedpeft.config import option
from fedpeft.continual import nets
from fedpeft.continual.streams.base import Material, StreamSource
from fedpeft.data.digits import Digits
from fedpeft.data.encode import Encoded

TEST_SHARE = 0.4


class Digits5(StreamSource):
    """scikit-learn's digits: 1,797 records, 40 % of them for test, the split drawn from the seed."""

    name = "digits5"
    summary = "digits 8x8, 5 tasks of 2 classes, network pre-trained on random strokes"

    @dataclass
    class Config:
        tasks: int = option(5, "tasks that the ten classes are cut into", low=1, high=10)

    def records(self, seed: int) -> Material:
        from sklearn.model_selection import train_test_split

        parts = Digits().load()
        # Channels before height and width, as the network takes them.
        images = np.concatenate([np.asarray(part.inputs) for part in parts]).transpose(0, 3, 1, 2)
        labels = np.concatenate([part.labels for part in parts])
        data = Encoded({"pixel_values": torch.from_numpy(np.ascontiguousarray(images))}, torch.from_numpy(labels))
        train, test = train_test_split(np.arange(len(labels)), test_size=TEST_SHARE, stratify=labels, random_state=seed)
        return Material(
            data.view(np.sort(train)), data.view(np.sort(test)), nets.glyph_net("drawings", 10), nets.LAYERS
        )
