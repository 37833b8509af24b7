"""The one view of a frozen base model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from fedpeft.objectives.base import Objective, load_objective


@dataclass
class Base:
    """A frozen base model.

    Attributes:
        backbone: the transformers model that adapters go into.
        forward: inputs -> logits [N, labels] ([N, T, vocabulary] for causal-lm).
        heads: module name -> head module; names are those of the checkpoint (`classifier`).
        processor: tokenizer, image processor, or None where images go in as they are.
        source: what `AutoModel...from_pretrained` takes to get this base again.
    """

    backbone: nn.Module
    forward: Callable[[dict[str, Tensor]], Tensor]
    heads: dict[str, nn.Module]
    processor: Any
    source: str
    task: str

    @cached_property
    def objective(self) -> Objective:
        """What the model is trained to do."""
        return load_objective(self.task)
