"""The source model as it is: the row that every table must have.

>>> import torch
>>> from fedpeft.tta.method import make
>>> net = torch.nn.Linear(2, 2)
>>> bool(torch.equal(make("source", net).predict(torch.eye(2)), net(torch.eye(2)).softmax(-1)))
True
"""

from __future__ import annotations

from fedpeft.tta.deployed import Batch
from fedpeft.tta.method import Outputs, TTAMethod


class Source(TTAMethod):
    """No adaptation: the baseline of baselines."""

    def _outputs(self, batch: Batch, learn: bool) -> Outputs:
        return self.forward(batch)
