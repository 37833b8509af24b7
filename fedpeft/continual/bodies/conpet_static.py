"""Static ConPET: one LoRA for all tasks, kept from forgetting by dynamic replay of everything that was stored.

Song et al., arXiv 2309.14763. From the second task on, an epoch is `batches` batches, each half new and half old (see
`fedpeft.continual.parts.replay`), so that every task costs the same. The classifier competes over all seen classes. The
first task is trained as usual.

It stores all records of all tasks: in a federation they stay with their client, but they stay.

Deviations: the authors split an epoch's batches 0.8 : 0.2 into training and validation and keep the best epoch; here
all train and the last epoch is kept. They take AdamW with clipping; here every body has the learner's Adam.

    >>> from fedpeft.continual.parts.replay import draw_replay
    >>> import numpy as np
    >>> draw_replay(np.random.default_rng(0), [3, 3], 4).tasks.tolist()
    [1, 1, 0, 0]
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedpeft import seeds
from fedpeft.config import LEARNER, option
from fedpeft.continual.body import Body
from fedpeft.continual.model import Change, Inputs, low_rank
from fedpeft.continual.parts import lora, replay


class ConPETStatic(Body):
    """One LoRA with dynamic replay."""

    paper = "Song et al. 2023, arXiv 2309.14763"
    needs = ("boundaries", "raw")
    loss = "seen"
    stays_central = ""
    replays = True

    @dataclass
    class Config:
        r: int = option(8, "rank of the LoRA; else adapter.r", low=1, only=LEARNER)
        alpha: float = option(8.0, "scale of the LoRA: alpha / r; else adapter.alpha", above=0, only=LEARNER)
        batches: int = option(20, "batches in an epoch from the second task on (L)", low=1, only=LEARNER)

    def begin_task(self) -> None:
        if not self.parameters:
            lora.begin(self, self.config.r)

    def change(self) -> Change:
        scale = self.config.alpha / self.config.r
        return {
            layer: low_rank(self.parameters[f"{layer}/B"], self.parameters[f"{layer}/A"], scale)
            for layer in self.model.layers
            if self.parameters
        }

    def steps(self) -> int:
        return self.train.epochs * (self.config.batches if self.index else self.per_epoch())

    def batch(self, step: int) -> tuple[Inputs, Tensor]:
        if not self.index:
            return super().batch(step)
        stores = replay.stores(self.memory["raw"], self.index, self.records())
        rng = seeds.numpy_generator(self.seed, "replay", self.index, step)
        return replay.gather(stores, replay.draw_replay(rng, [len(store) for store in stores], self.train.batch_size))

    def end_task(self, statistics: dict[str, Tensor]) -> None:
        self.memory["raw"][str(self.index)] = replay.keep(self.records())
