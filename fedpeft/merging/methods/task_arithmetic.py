"""Task arithmetic: add the changes that tasks made, subtract those to unlearn. Ilharco et al., arXiv 2212.04089.

    D = lambda sum_t w_t tau_t,   tau_t = s B_t A_t

w_t is the number given with an adapter, 1 if none is; -1 negates a task. The sum does not depend on the order, and an
adapter that is added and later subtracted leaves nothing behind (up to rounding). The default lambda, 0.3, is that of
continual merging of many tasks (Tang et al., arXiv 2501.09522); give lambda=1 for the plain sum.

Deviation: heads are averaged, all with weight 1, since a head has no common start to be a change of.

    >>> import torch
    >>> from fedpeft.merging.base import merge
    >>> from fedpeft.state import AdapterState, AdaptedLayer
    >>> layers = {"q": AdaptedLayer("lora")}
    >>> def one(b): return AdapterState({"q/A": torch.ones(1, 1), "q/B": torch.tensor([[b]])}, layers)
    >>> merged = merge("task_arithmetic", [one(1.0), one(4.0)], {"lambda": 0.5}, [1, -1])
    >>> (merged["q/B"] @ merged["q/A"]).item()
    -1.5
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fedpeft.config import option
from fedpeft.merging.base import Merger, Numbers, State, Tensors, combine
from fedpeft.state import AdapterState


@dataclass
class TaskArithmeticConfig:
    """Options of `task_arithmetic`: the scale of the sum, beside the adapters' own weights."""

    lambda_: float = option(0.3, "factor of the sum of all changes")


class TaskArithmetic(Merger):
    """A scaled sum of the adapters' products; a weight of -1 subtracts a task."""

    Config: ClassVar[Any] = TaskArithmeticConfig
    paper = "Ilharco et al. 2022, arXiv 2212.04089"
    number = "weight"
    fewest = 1

    def update(self, state: State, adapter: AdapterState, number: float | None) -> tuple[Tensors, Numbers]:
        return combine(state, adapter, 1.0, 1.0 if number is None else number), {}

    def finish(self, state: State) -> Tensors:
        return {
            # On B alone, as on both factors it would be squared.
            key: value * (self.config.lambda_ if key.endswith("/B") else 1.0)
            for key, value in super().finish(state).items()
        }
