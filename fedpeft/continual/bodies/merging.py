"""Merging: every task trains a LoRA of its own from the same start; after each task they are merged into one.

The sequential use of `fedpeft.merging`, where the methods and their papers are described:

    task t:      B = 0, A as `start` says; W + s B_t A_t trains, from the base, as if there were no other task
    after it:    state <- add(state, (B_t, A_t));   predictions are made with result(state), one adapter

No records are kept. What is kept is the state of the merger: some keep one adapter, some all of them. In mid-task,
predictions are still those of the tasks that were merged.

`start`: with `same` all tasks have one draw of A, as fine-tuned copies of one initial adapter; with `orthogonal` A is
frozen, and each task's rows are the next ones of a random orthogonal basis (orthogonal_adaptation needs that).

    >>> from fedpeft.state import AdapterState, AdaptedLayer
    >>> one = AdapterState({"q/A": torch.ones(1, 2), "q/B": torch.ones(3, 1)}, {"q": AdaptedLayer("lora", (3, 2), 0.5)})
    >>> list(view(one))
    ['q']
    >>> view(one)["q"](torch.ones(1, 2), torch.zeros(1, 3)).tolist()
    [[1.0, 1.0, 1.0]]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedpeft import registry
from fedpeft.config import LEARNER, option
from fedpeft.continual.body import Body, make_leaf
from fedpeft.continual.model import Change, low_rank
from fedpeft.continual.parts import lora
from fedpeft.merging.base import make
from fedpeft.merging.methods.orthogonal_adaptation import rows
from fedpeft.state import AdaptedLayer, AdapterState


class Merging(Body):
    """A LoRA for each task, merged over time."""

    paper = "see the mergers"
    needs = ("boundaries",)
    stays_central = ""
    renews = True

    @dataclass
    class Config:
        method: str = option("running_average", "registered merger")
        method_options: dict[str, Any] = option({}, "options of the merger", options_of=("mergers", "method"))
        start: str = option(
            "same",
            "A of a new task: one draw for all, or frozen rows orthogonal to earlier ones",
            choices=("same", "orthogonal"),
        )
        r: int = option(8, "rank of each task's LoRA; else adapter.r", low=1, only=LEARNER)
        alpha: float = option(8.0, "scale of the LoRAs: alpha / r; else adapter.alpha", above=0, only=LEARNER)

    @classmethod
    def fixed_roles(cls, config: Any) -> tuple[str, ...]:
        return ("A",) if config.start == "orthogonal" else ()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        registry.load("mergers", self.config.method, "body.method")
        self.merger = make(self.config.method, self.config.method_options, "body.method_options")
        self._rehearse_merge()

    def begin_task(self) -> None:
        for layer in self.model.layers:
            m, _ = self.model.base.shape(layer)
            self.parameters[f"{layer}/A"] = make_leaf(self._start(layer, self.index))
            self.parameters[f"{layer}/B"] = make_leaf(torch.zeros(m, self.config.r))

    def change(self) -> Change:
        return view(self._adapter_of(self.parameters)) if self.parameters else {}

    def views(self) -> dict[str, Change]:
        merged = self.merged()
        return {"online": self.change() if merged is None else view(merged)}

    def merged(self) -> AdapterState | None:
        tensors = {
            key.removeprefix("merged/"): value
            for key, value in self.memory["adapters"].items()
            if key.startswith("merged/")
        }
        return self._adapter_of(tensors) if tensors else None

    def end_task(self, statistics: dict[str, Tensor]) -> None:
        adapters, numbers = self.memory["adapters"], self.memory["numbers"]
        own = {key: value.detach().clone() for key, value in self.parameters.items()}
        state = self.merger.start()
        if self.index:
            kept = {key.removeprefix("merger/"): value for key, value in adapters.items() if key.startswith("merger/")}
            state = {"numbers": numbers["merger"], "tensors": kept}
        state = self.merger.add(state, self._adapter_of(own))
        merged = self.merger.result(state).tensors
        numbers["merger"] = state["numbers"]
        self.memory["adapters"] = {
            **{f"merger/{key}": value for key, value in state["tensors"].items()},
            **{f"merged/{key}": value for key, value in merged.items()},
        }

    def _start(self, layer: str, task: int) -> Tensor:
        _, n = self.model.base.shape(layer)
        if self.config.start == "orthogonal":
            return rows(n, self.config.r, task, self.seed, layer).float()
        # Without the task in its name: one draw for all tasks.
        return lora.draw_A(n, self.config.r, self.generator("A", layer))

    def _adapter_of(self, tensors: dict[str, Tensor]) -> AdapterState:
        scale = self.config.alpha / self.config.r
        return AdapterState(
            tensors, {layer: AdaptedLayer("lora", self.model.base.shape(layer), scale) for layer in self.model.layers}
        )

    def _rehearse_merge(self) -> None:
        """Merge two adapters of noise: a merger that cannot take what comes says so before anything was trained."""
        layer, state = self.model.layers[0], self.merger.start()
        for task in range(2):
            outputs, _ = self.model.base.shape(layer)
            # Not zero, as B starts: a zero product would try nothing of a merger.
            noise = torch.randn(outputs, self.config.r, generator=self.generator("rehearsal", task))
            pair = {f"{layer}/A": self._start(layer, task), f"{layer}/B": noise}
            state = self.merger.add(state, AdapterState(pair, {layer: self._adapter_of({}).sites[layer]}))
        self.merger.result(state)


def view(adapter: AdapterState) -> Change:
    """What a plain LoRA adapter changes."""
    return {
        site: low_rank(adapter[f"{site}/B"], adapter[f"{site}/A"], adapter.sites[site].scaling)
        for site in adapter.lora_sites()
    }
