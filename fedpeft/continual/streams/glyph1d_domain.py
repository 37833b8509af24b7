"""The same ten classes of 1-D signals in six domains, one after another: what changes is how a class looks (`signals`).

For methods of shifting inputs and for merging six fine-tuned copies. The order of the domains is drawn from the seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fedpeft.config import option
from fedpeft.continual import nets
from fedpeft.continual.streams.base import Material, StreamSource
from fedpeft.continual.streams.signals import DOMAINS, draw_signals
from fedpeft.data.encode import Encoded

CLASSES = 10


class Glyph1DDomain(StreamSource):
    """1,800 training and 1,200 test signals in 10 classes and 6 domains."""

    name = "glyph1d_domain"
    summary = "1-D signals, the same 10 classes in 6 domains"
    scenario = "domain"

    @dataclass
    class Config:
        train: int = option(30, "training records a class and domain", low=2)
        test: int = option(20, "test records a class and domain", low=1)

    def records(self, seed: int) -> Material:
        (train, of_train), (test, of_test) = (
            _join_parts([draw_signals(CLASSES, count, seed, which, domain) for domain in DOMAINS])
            for which, count in (("train", self.config.train), ("test", self.config.test))
        )
        return Material(
            train, test, nets.glyph_net("signals", CLASSES), nets.LAYERS, (of_train, of_test), list(DOMAINS)
        )


def _join_parts(parts: list[Encoded]) -> tuple[Encoded, np.ndarray]:
    """All records, and the number of the part that each is from."""
    signals, labels = torch.cat([part.inputs["signal"] for part in parts]), torch.cat([part.labels for part in parts])
    return Encoded({"signal": signals}, labels), np.repeat(np.arange(len(parts)), [len(part) for part in parts])
