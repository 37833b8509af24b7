"""Joint training: every record so far is kept and trained on, the upper reference of every table.

    task t trains on the records of tasks 0..t, all seen classes compete

Parameters go on from the last task. An epoch is a pass over all records so far, so later tasks take more steps: the
accuracy is that of no forgetting, the cost and the storage are those of no method.

    >>> Joint.loss, Joint.needs
    ('seen', ('raw',))
"""

from __future__ import annotations

import torch

from fedpeft.continual.parts.forms import FormBody
from fedpeft.continual.stream import Task
from fedpeft.data.encode import Encoded


class Joint(FormBody):
    """All records of all tasks so far."""

    needs = ("raw",)
    loss = "seen"
    stays_central = (
        "trains on the raw records of all tasks again, which is a federation without tasks (continual.body=null)"
    )

    def feed(self, index: int, task: Task, seen: list[int]) -> None:
        super().feed(index, task, seen)
        raw = self.memory["raw"]
        inputs = {
            name: torch.cat([raw["inputs"][name], value]) if raw else value for name, value in task.train.inputs.items()
        }
        labels = torch.cat([raw["labels"], task.train.labels]) if raw else task.train.labels
        # When the task comes, not when it is over: its own records are trained on too.
        self.memory["raw"] = {"inputs": inputs, "labels": labels}

    def records(self) -> Encoded:
        return Encoded(self.memory["raw"]["inputs"], self.memory["raw"]["labels"])
