"""Experience replay: a few old records, kept by reservoir sampling, go into every batch.

Chaudhry et al., arXiv 1902.10486; the reservoir is Vitter's algorithm R:

    record number n (from 1) of the whole stream:  kept if n <= capacity, else it takes place j if j < capacity,
                                                   j ~ U{0..n-1}

so that each record seen so far is in the memory with the same probability. A batch is `batch_size` new records and
`replay` old ones, without replacement; all seen classes compete in the loss. Records are offered once, when their task
is over (the authors offer each batch as it is drawn, which in several passes would offer a record several times), so
during a task the memory holds earlier tasks only, and no boundary has to be known beforehand.

    >>> import numpy as np
    >>> places(np.random.default_rng(0), offered=0, count=3, capacity=2)[:2]
    [(0, 0), (1, 1)]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedpeft import seeds
from fedpeft.config import option
from fedpeft.continual.model import Inputs
from fedpeft.continual.parts.forms import FormBody, FormConfig
from fedpeft.data.encode import Encoded


class ER(FormBody):
    """Replay from a reservoir."""

    paper = "Chaudhry et al. 2019, arXiv 1902.10486"
    needs = ("raw",)
    loss = "seen"
    stays_central = "keeps one reservoir of raw records of all owners; conpet_static replays each client's own"

    @dataclass
    class Config(FormConfig):
        capacity: int = option(200, "records kept", low=1)
        replay: int = option(32, "old records in a batch", low=1)

    def batch(self, step: int) -> tuple[Inputs, Tensor]:
        new = self.records().view(self.order(step))
        raw = self.memory["raw"]
        if not raw:
            return new.batch(np.arange(len(new)))
        rng = seeds.numpy_generator(self.seed, "replay", self.index, step)
        old = Encoded(raw["inputs"], raw["labels"])
        mixed = joined(new, old.view(rng.permutation(len(old))[: self.config.replay]))
        return mixed.batch(np.arange(len(mixed)))

    def end_task(self, statistics: dict[str, Tensor]) -> None:
        new, raw, numbers = self.records(), self.memory["raw"], self.memory["numbers"]
        pool = joined(Encoded(raw["inputs"], raw["labels"]), new) if raw else new
        # Old records come first in the pool, so that places in the memory are numbers in it.
        held = len(pool) - len(new)
        offered = numbers.get("offered", 0)
        chosen = list(range(held))
        rng = seeds.numpy_generator(self.seed, "reservoir", self.index)
        for number, place in places(rng, offered, len(new), self.config.capacity):
            # A slice: while there is room `place` is one behind the end, and this appends.
            chosen[place : place + 1] = [held + number]
        kept = pool.view(np.array(chosen))
        self.memory["raw"] = {"inputs": kept.inputs, "labels": kept.labels}
        numbers["offered"] = offered + len(new)


def places(rng: np.random.Generator, offered: int, count: int, capacity: int) -> list[tuple[int, int]]:
    """Which of `count` further records take which place, after `offered` records, in order."""
    taken = []
    for number in range(count):
        total = offered + number
        place = total if total < capacity else int(rng.integers(total + 1))
        if place < capacity:
            taken.append((number, place))
    return taken


def joined(first: Encoded, second: Encoded) -> Encoded:
    """The records of both, in order."""
    more = second.inputs
    inputs = {name: torch.cat([value, more[name]]) for name, value in first.inputs.items()}
    return Encoded(inputs, torch.cat([first.labels, second.labels]))
