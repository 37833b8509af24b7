"""The sequence of tasks of a federated run: which classes a round trains, which compete, and which have been seen.

Tasks are groups of classes; every task has the same number of rounds. Server and clients read it off the same config,
and a round's number alone says where the run is.

    >>> plan = Curriculum(((3, 1), (0, 2)), rounds=5)
    >>> plan.task(5), plan.task(6), plan.place(6), plan.seen(1), plan.last(5)
    (0, 1, 0, [0, 1, 2, 3], True)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedpeft.config.schema import ContinualConfig
from fedpeft.continual.stream import group_classes
from fedpeft.errors import InputError


@dataclass(frozen=True)
class Curriculum:
    """Groups of classes in the order in which they come, each for `rounds` rounds. Round numbers start at 1."""

    groups: tuple[tuple[int, ...], ...]
    rounds: int

    def task(self, number: int) -> int:
        """The task that round `number` belongs to; after the last round the last one."""
        return min((number - 1) // self.rounds, len(self.groups) - 1)

    def place(self, number: int) -> int:
        """Rounds of the task before round `number`."""
        return (number - 1) % self.rounds

    def last(self, number: int) -> bool:
        """Whether round `number` ends its task."""
        return number % self.rounds == 0

    def classes(self, task: int) -> list[int]:
        """Labels of one task (numbered from 0), sorted."""
        return sorted(self.groups[task])

    def seen(self, task: int) -> list[int]:
        """Classes of all tasks up to and with this one."""
        return sorted({label for group in self.groups[: task + 1] for label in group})

    def of(self, labels: np.ndarray, task: int) -> np.ndarray:
        """Numbers of the records of a task."""
        return np.flatnonzero(np.isin(labels, self.groups[task]))


def make_curriculum(config: ContinualConfig, classes: int, rounds: int, seed: int) -> Curriculum:
    """The curriculum of a config: classes in a random order (or as numbered), cut into tasks of nearly equal size,
    without those that are left out.

    Raises:
        InputError: more tasks than classes, or none that is learned.
    """
    if not set(config.leave_out) < set(range(config.tasks)):
        raise InputError(
            f"continual.leave_out={config.leave_out}: tasks are numbered from 0 to {config.tasks - 1} "
            "(continual.tasks), and one at least is learned."
        )
    parts = group_classes(classes, config.tasks, seed, config.shuffle, "continual.tasks")
    kept = [tuple(part) for task, part in enumerate(parts) if task not in config.leave_out]
    # Without a rest: other numbers of rounds are refused with the config.
    return Curriculum(tuple(kept), rounds // config.learned)
