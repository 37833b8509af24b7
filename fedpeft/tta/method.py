"""The contract of test-time methods: predict, adapt, step, reset, state, load.

A method sees inputs only: no label and no domain name reaches it. What it keeps between batches is in `self.memory`
(tensors, numbers, nested dicts), what it learned from source data before deployment in `self.prepared`; `state`, `load`
and `reset` follow from that, so a saved and loaded method goes on bit for bit. Random draws derive from the seed and
the number of batches learned from, so they too are part of the state.

Rows with NaN or infinity are left out of the forward pass and answered with the uniform distribution; such a batch, and
one smaller than `min_batch`, is predicted and not learned from, and `diagnostics["reason"]` says so.

    >>> import torch
    >>> from fedpeft.tta.deployed import deploy
    >>> method = make("tent", deploy(torch.nn.Sequential(torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))))
    >>> before = method.state()
    >>> probs, diagnostics = method.step(torch.eye(2))
    >>> diagnostics["reason"], method.cost["forwards"], method.cost["backwards"]
    (None, 1, 1)
    >>> method.load(before); bool((method.step(torch.eye(2))[0] == probs).all())
    True
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedpeft import config as configs
from fedpeft import seeds
from fedpeft.config import Configured, option
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from fedpeft.tta.deployed import Batch, Deployed, Hooks, Statistics, Tensors, batch_size, deploy, finite_rows, take_rows
from fedpeft.tta.parts import scores

NEEDS = ("none", "inputs", "labels")
BATCH = 64  # rows in a forward pass over source data


@dataclass
class Outputs:
    """What one forward pass gave.

    Attributes:
        logits: [N, K]; with a graph where the method learns from them.
        features: [N, D] that enter the last layer; None where the model declares none.
        probs: predictions [N, K]; None is softmax(logits).
        extra: whatever else the method's update needs.
    """

    logits: Tensor
    features: Tensor | None
    probs: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def prediction(self) -> Tensor:
        """Predictions [N, K], each row on the simplex, without a graph."""
        return (self.logits.softmax(-1) if self.probs is None else self.probs).detach()


@dataclass
class MethodConfig:
    """Options that every method has."""

    order: str = option(
        "before", "predict before the update, or after it with another forward pass", choices=("before", "after")
    )


class TTAMethod(Configured):
    """Base of all methods. A subclass gives `_outputs`, and as needed `_update`, `_fresh`, `_prepare`.

    Attributes:
        memory: everything that changes on the stream.
        prepared: what `prepare` got from source data.
        batches: batches learned from since the reset; random draws derive from it.
        reason: why the last batch was not learned from, None when it was.
        cost: forward passes, rows in them, backward passes, restarts since the reset.
        ready: nothing is missing that only `prepare` can give.
        pairs_with: the wrapper of a federation that learns what it needs.
    """

    Config: ClassVar[Any] = MethodConfig
    needs_source: str = "none"  # "inputs", "labels": what `prepare` must be given
    min_batch: ClassVar[int] = 1  # rows below which nothing is learned from a batch
    pairs_with: ClassVar[str | None] = None

    def __init__(self, model: Deployed, seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.model = deploy(model)
        self.seed = seed
        self.prepared: dict[str, Any] = {}
        self.classes = 0
        self.memory: dict[str, Any] = {}
        self.reason: str | None = None
        self.needs_source = self._needs()
        self.ready = self.needs_source == "none"
        self._clear_counters()
        self._restart()

    # What a method defines.

    def holds(self) -> list[str]:
        """Names of the model's tensors whose values it keeps from batch to batch and answers with, moved or as copies.

        A model whose tensors of these names have changed meanwhile would not be heard.
        """
        return []

    def _outputs(self, batch: Batch, learn: bool) -> Outputs:
        """Predictions for a batch without a change of state; a graph is kept when `learn`."""
        raise NotImplementedError

    def _update(self, batch: Batch, outputs: Outputs) -> str | None:
        """Learn from a batch; a reason means that nothing was learned and nothing changed."""
        return None

    def _fresh(self) -> dict[str, Any]:
        """The memory before the first batch."""
        return {}

    def _needs(self) -> str:
        """What `prepare` must be given with these options."""
        return type(self).needs_source

    def _prepare(self, source: Encoded) -> dict[str, Any]:
        """What the method must know of the source data, as plain data."""
        return {}

    # What a user calls.

    def prepare(self, source: Encoded) -> None:
        """Learn from source data before deployment; only methods whose `needs_source` is not "none" need it."""
        self.prepared = self._prepare(source)
        self.ready = True
        self.reset()

    def predict(self, batch: Batch) -> Tensor:
        """Class probabilities [N, K]; changes nothing but `cost`."""
        batch = self.model.moved(batch)
        good = self._find_good(batch)
        with torch.no_grad():
            return self._spread_predictions(
                self._outputs(_take_good(batch, good), learn=False).prediction if good.any() else None, good
            )

    def adapt(self, batch: Batch) -> None:
        """Learn from a batch; `reason` says why not."""
        self._learn(self.model.moved(batch), None)

    def step(self, batch: Batch, reference: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Predict a batch and learn from it, in the method's order, sharing the forward pass where predict is first.

        Args:
            reference: labels [N] of another predictor (the source model): how many differ is reported as `changed`.

        Returns:
            Probabilities [N, K], and diagnostics: order, rows, mean entropy, distinct classes, changed, reason.
        """
        batch = self.model.moved(batch)
        good = self._find_good(batch)
        # One pass serves both only where predict comes first and all rows may be learned from.
        if self.config.order == "after" or not good.all() or batch_size(batch) < self.min_batch:
            if self.config.order == "before":
                probs = self.predict(batch)
            self._learn(batch, None)
            if self.config.order == "after":
                probs = self.predict(batch)
        else:
            outputs = self._outputs(batch, learn=True)
            probs = outputs.prediction
            self._learn(batch, outputs)
        labels = probs.argmax(-1)
        return probs, {
            "order": self.config.order,
            "rows": len(probs),
            "entropy": float(scores.entropy_of(probs).mean()),
            "classes": len(labels[good].unique()),
            "changed": None if reference is None else float((labels != reference).float().mean()),
            "reason": self.reason,
        }

    def reset(self) -> None:
        """Back to the moment of deployment, counters and random draws included."""
        self._clear_counters()
        self._restart()

    def restart(self) -> None:
        """Forget what was learned, but go on counting: what a periodic reset or the monitor does."""
        self._restart()
        self.cost["resets"] += 1

    def state(self) -> dict[str, Any]:
        """All that changes, as plain data (tensors, numbers, texts, lists, dicts)."""
        # A copy, or what was saved would go on changing with the method.
        return copy.deepcopy(
            {
                "method": type(self).__name__,
                "config": dataclasses.asdict(self.config),
                "seed": self.seed,
                "batches": self.batches,
                "classes": self.classes,
                "cost": self.cost,
                "ready": self.ready,
                "prepared": self.prepared,
                "memory": self.memory,
            }
        )

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`, on whatever device it was made.

        Raises:
            InputError: it is the state of another method, or of one with other options.
        """
        mine = {"method": type(self).__name__, "config": dataclasses.asdict(self.config)}
        for key, value in mine.items():
            if state.get(key) != value:
                raise InputError(f"state: {key} is {state.get(key)}, this method's is {value}.")
        for key, value in copy.deepcopy({key: value for key, value in state.items() if key not in mine}).items():
            setattr(self, key, on(self.model.device, value))
        self.reason = None

    def spent(self) -> dict[str, int]:
        """`cost`, that of a base method included."""
        return dict(self.cost)

    def held(self) -> int:
        """Numbers kept beside the one backbone: copies of tensors, moments, stored samples."""
        return _count_values(self.memory) + _count_values(self.prepared)

    # What methods use.

    def forward(
        self,
        batch: Batch,
        overlay: Tensors | None = None,
        statistics: Statistics | None = None,
        hooks: Hooks | None = None,
        graph: bool = False,
    ) -> Outputs:
        """One counted forward pass."""
        self.cost["forwards"] += 1
        self.cost["rows"] += batch_size(batch)
        with torch.set_grad_enabled(graph):
            return Outputs(*self.model(batch, overlay, statistics, hooks))

    def gradients(self, loss: Tensor, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients by name, without those that the loss does not reach; counted."""
        self.cost["backwards"] += 1
        found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        return {name: value for name, value in zip(params, found, strict=True) if value is not None}

    def generator(self, *path: str | int) -> torch.Generator:
        """Draws for this batch, the same whenever it is asked for."""
        return seeds.torch_generator(self.seed, "tta", self.batches, *path)

    def _learn(self, batch: Batch, outputs: Outputs | None) -> None:
        good = self._find_good(batch)
        if not good.all():
            self.reason = f"{int((~good).sum())} of {len(good)} inputs are not finite"
        elif len(good) < self.min_batch:
            self.reason = f"batch of {len(good)}: at least {self.min_batch} are needed"
        else:
            self.reason = self._update(batch, outputs or self._outputs(batch, learn=True))
            if self.reason is None:
                # Draws are numbered by it: a batch that taught nothing must not shift those of the next.
                self.batches += 1

    def _find_good(self, batch: Batch) -> Tensor:
        if not self.ready:
            raise InputError(f"{type(self).__name__} needs source data ({self.needs_source}): call prepare first.")
        if batch_size(batch) == 0:
            raise InputError("batch: it has no rows.")
        return finite_rows(batch)

    def _spread_predictions(self, probs: Tensor | None, good: Tensor) -> Tensor:
        """Predictions of the finite rows among uniform ones for the others."""
        if probs is not None:
            self.classes = probs.shape[1]
            if good.all():
                return probs
        if not self.classes:
            self.classes = self._count_classes()
        full = torch.full((len(good), self.classes), 1 / self.classes, device=good.device)
        if probs is not None:
            full[good] = probs
        return full

    def _count_classes(self) -> int:
        if self.model.head is None:
            raise InputError(
                "batch: no input is finite, and the model declares no head that tells how many classes "
                "there are; deploy(model, head='name')."
            )
        return self.model.head.out_features

    def _restart(self) -> None:
        # What is fresh may follow from source data (PETAL's mean), which are not there yet.
        self.memory = self._fresh() if self.ready else {}
        self.reason = None

    def _clear_counters(self) -> None:
        self.batches = 0
        self.cost = {"forwards": 0, "rows": 0, "backwards": 0, "resets": 0}


def make(
    name: str,
    model: Any,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    source: Encoded | None = None,
    key: str = "tta",
) -> TTAMethod:
    """A registered method on a model, prepared on `source` if it needs that and it is given.

    Raises:
        InputError: unknown method or option, a value out of bounds, or an adaptable set that the model lacks.
    """
    method: TTAMethod = configs.method("tta", name, options or {}, key, model=deploy(model), seed=seed)
    if source is not None and method.needs_source != "none":
        method.prepare(source)
    return method


def source_batches(source: Encoded, rows: int = BATCH) -> list[tuple[Batch, Tensor]]:
    """All of a source set in order."""
    parts = [source.view(np.arange(start, min(start + rows, len(source)))) for start in range(0, len(source), rows)]
    return [(part.inputs, part.labels) for part in parts]


def on(device: torch.device, value: Any) -> Any:
    """Plain data with its tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: on(device, item) for key, item in value.items()}
    return [on(device, item) for item in value] if isinstance(value, list) else value


def _take_good(batch: Batch, good: Tensor) -> Batch:
    return batch if bool(good.all()) else take_rows(batch, good)


def _count_values(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, dict):
        return sum(_count_values(item) for item in value.values())
    return sum(_count_values(item) for item in value) if isinstance(value, list | tuple) else 0
