"""Forty classes of 1-D signals, in 5, 10 or 20 tasks: the shape of ImageNet-R's class streams, in seconds.

Templates and records are drawn from the seed (`procedural`), the network was pre-trained on sixty other templates.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.config import option
from fedpeft.continual import nets
from fedpeft.continual.streams.base import Material, StreamSource
from fedpeft.continual.streams.signals import draw_signals

CLASSES = 40


class Glyph1D(StreamSource):
    """2,400 training and 1,600 test signals in 40 classes."""

    name = "glyph1d"
    summary = "1-D signals, 40 classes in 5, 10 or 20 tasks, network pre-trained on other signals"

    @dataclass
    class Config:
        tasks: int = option(10, "tasks that the classes are cut into", low=1, high=CLASSES)
        train: int = option(60, "training records a class", low=2)
        test: int = option(40, "test records a class", low=1)

    def records(self, seed: int) -> Material:
        train, test = (
            draw_signals(CLASSES, count, seed, which)
            for which, count in (("train", self.config.train), ("test", self.config.test))
        )
        return Material(train, test, nets.glyph_net("signals", CLASSES), nets.LAYERS)
