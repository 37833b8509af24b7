"""Dynamic replay: batches of half new and half old records, the old ones drawn task by task from all that was stored.

ConPET (Song et al., arXiv 2309.14763): an old slot takes an old task uniformly, then one of its records uniformly; a
new slot takes a record of the present task, no record twice in a batch. So the work of a task does not grow with the
number of tasks, while what is stored does. Small old tasks are over-weighted by design.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft.continual.model import Inputs
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError


@dataclass(frozen=True)
class Draw:
    """Which records make a batch: numbers of their tasks and their rows in those, each int64 [N]."""

    tasks: np.ndarray
    rows: np.ndarray


def draw_replay(rng: np.random.Generator, sizes: Sequence[int], count: int) -> Draw:
    """Half of `count` records from the last task (rounded down), then the rest from the tasks before it.

    Args:
        sizes: records of each task, two tasks or more. A new task with less than half a batch is drawn with
            replacement.

    Raises:
        InputError: `count` is below 2.

    >>> drawn = draw_replay(np.random.default_rng(0), [5, 900, 30], 6)
    >>> drawn.tasks[:3].tolist(), bool((drawn.tasks[3:] < 2).all()), len(set(drawn.rows[:3].tolist()))
    ([2, 2, 2], True, 3)
    """
    if count < 2:
        raise InputError(f"train.batch_size={count}: half a batch is new and half is old, so it needs at least 2.")
    new = count // 2
    fresh = rng.choice(sizes[-1], new, replace=sizes[-1] < new)
    tasks = rng.integers(len(sizes) - 1, size=count - new)
    rows = rng.integers(np.array(sizes)[tasks])
    last = np.full(new, len(sizes) - 1)
    return Draw(np.concatenate([last, tasks]), np.concatenate([fresh, rows]))


def gather(stores: Sequence[Encoded], drawn: Draw) -> tuple[Inputs, Tensor]:
    """The records of a draw, in its order; texts are cut to the longest of them."""
    # Read task by task, then put back: `argsort` of an order is its inverse.
    order = np.argsort(drawn.tasks, kind="stable")
    parts = [stores[task].view(drawn.rows[drawn.tasks == task]) for task in np.unique(drawn.tasks)]
    tables = [part.inputs for part in parts]
    inputs = {name: torch.cat([table[name] for table in tables]) for name in tables[0]}
    return Encoded(inputs, torch.cat([part.labels for part in parts])).batch(np.argsort(order))


def keep(data: Encoded) -> dict[str, Any]:
    """Records as plain data for `memory["raw"]`."""
    every = data.view(np.arange(len(data)))  # a copy, so that what is kept does not change with the data set
    return {"inputs": every.inputs, "labels": every.labels}


def stores(raw: dict[str, Any], present: int, now: Encoded) -> list[Encoded]:
    """The kept records of tasks 0 to `present` - 1, and those of the present task."""
    kept = [raw[str(task)] for task in range(present)]
    return [*(Encoded(one["inputs"], one["labels"]) for one in kept), now]
