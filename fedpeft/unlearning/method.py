"""What a way of unlearning is, and the case that it gets: a finished run, and what of it is to be forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.adapters.adapted import Adapted
from fedpeft.clients.train import evaluate
from fedpeft.config import Config, Configured
from fedpeft.data.encode import Encoded
from fedpeft.run.world import World
from fedpeft.state import AdapterState
from fedpeft.unlearning.asked import Asked


@dataclass(frozen=True)
class Outcome:
    """What a method leaves.

    Attributes:
        adapter: plain LoRA factors over the run's base.
        steps: of the optimizer.
        passes: records that a gradient was taken of, each as often as it was.
        notes: sentences for the reader.
    """

    adapter: AdapterState
    steps: int
    passes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A finished run, opened, and what of it is to be forgotten.

    Attributes:
        run: its folder.
        config: as the run had it.
        world: the same base and records under one plain LoRA, without strategy or privacy.
        adapter: as trained, as plain factors.
        forget: records that were trained on and are to be forgotten.
        retain: all other records that were trained on.
        reference: records like those to be forgotten that clients have held out; there may be none.
        test: test records of what is not forgotten as a whole.
    """

    run: Path
    config: Config
    world: World
    adapter: AdapterState
    asked: Asked
    forget: Encoded
    retain: Encoded
    reference: Encoded
    test: Encoded

    @property
    def model(self) -> Adapted:
        """The one model, into which adapters are written."""
        return self.world.local.model

    def write(self, adapter: AdapterState, start: AdapterState | None = None) -> None:
        """Put an adapter of any rank into the model.

        Args:
            start: what of it the trained factors hold; the base weights hold the rest. None is nothing.
        """
        fresh = self.world.start.adapter
        tensors: dict[str, Tensor] = {}
        # As a residual of the weights: the model's own factors have one rank, and this adapter any.
        for site in fresh.lora_sites():
            left = [adapter.sites[site].scaling * adapter[f"{site}/B"].double()]
            right = [adapter[f"{site}/A"].double()]
            if start is not None:
                left.append(-start.sites[site].scaling * start[f"{site}/B"].double())
                right.append(start[f"{site}/A"].double())
            tensors |= {f"{site}/residual_B": torch.cat(left, 1), f"{site}/residual_A": torch.cat(right, 0)}
        heads = adapter if start is None else start
        tensors |= {key: value for key, value in heads.tensors.items() if heads.role(key) == "head"}
        self.model.write(fresh.replace({**(start.tensors if start is not None else {}), **tensors}))

    def started(self, factors: dict[str, Tensor]) -> AdapterState:
        """A start of training: the fresh factors but for these, and the head as trained."""
        fresh = self.world.start.adapter
        heads = {key: value for key, value in self.adapter.tensors.items() if self.adapter.role(key) == "head"}
        sites = {**self.adapter.sites, **{site: fresh.sites[site] for site in fresh.lora_sites()}}
        return AdapterState({**fresh.tensors, **heads, **factors}, sites)

    def is_forgotten(self) -> bool:
        """Whether the model, as it is, knows no more of what is to be forgotten than of the reference."""
        if not len(self.reference):
            return False
        tokens = self.config.run.evaluate_tokens
        known, unseen = (evaluate(self.model, data, tokens=tokens)["loss"] for data in (self.forget, self.reference))
        return known >= unseen


class UnlearningMethod(Configured):
    """A way of unlearning; options are in `Config`.

    Attributes:
        reruns: it runs the federation again, in the folder of the result.
        needs_classes: its loss is of scores among which one is right.
    """

    reruns: ClassVar[bool] = False
    needs_classes: ClassVar[bool] = False

    def unlearn(self, case: Case, folder: Path) -> Outcome:
        """The adapter without what is to be forgotten.

        Args:
            folder: of the result, with config, split and fingerprints without it.
        """
        raise NotImplementedError


def make(name: str, options: dict[str, Any]) -> UnlearningMethod:
    """A registered method from its options.

    Raises:
        InputError: unknown method or option, or a value out of bounds.
    """
    registry.load("unlearning", name, "--method")  # which the error then names
    method: UnlearningMethod = configs.method("unlearning", name, options, "")
    return method
