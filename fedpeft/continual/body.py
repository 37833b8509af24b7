"""A body says how parameters move while tasks arrive. One file in `bodies` is one body.

A step, as the learner runs it:

    inputs, labels = body.batch(step)                    a batch of the task, with what the body mixes in
    features = model.features(inputs, body.change())     the training view
    loss = CE(classifier(features), labels over the task's or all seen classes) + body.penalty(...)
    loss.backward();  body.after_backward();  body.step();  body.after_step()

All that a body keeps from task to task is in `memory`, plain data whose top level says what kind it is (`raw` records,
`statistics`, `bases`, `adapters`, `numbers`): the ledger of bytes, checkpoints and resume follow from that. What it
trains now is in `parameters`, tensors by `layer/role`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedpeft import seeds
from fedpeft.config import option
from fedpeft.continual.model import Change, Inputs, Plastic
from fedpeft.continual.stream import Task
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from fedpeft.state import AdapterState

KINDS = ("raw", "statistics", "bases", "adapters", "numbers")


@dataclass
class TrainConfig:
    """How every body is trained on a task; the same for all bodies of a comparison unless said."""

    epochs: int = option(10, "passes over a task's training records", low=1)
    batch_size: int = option(32, "records a step", low=1)
    lr: float = option(1e-3, "learning rate of the body", above=0)
    head_lr: float = option(5e-3, "learning rate of the classifier", above=0)
    temperature: float = option(1.0, "logits are divided by it in training", above=0)


@dataclass
class BodyConfig:
    """Options of a body that has none."""


class Body:
    """Base of all bodies: a frozen one. A subclass overrides what it changes.

    Attributes:
        needs: what must be there: "boundaries" (told when a task begins), "raw" (keeps records), "statistics" (a pass
            over the task's records after training).
        loss: classes that compete in the training loss: "any" (the head says: the task's own, or all seen), or "seen"
            for bodies that replay.
        heads: registered heads that make sense with it, None for all.
        stays_central: why a federation's server cannot run it, a sentence's end after "it"; empty where it can.
        replays: batches are half new and half old records; in a federation of the client's own.
        renews: every task trains a pair of its own, from no change.
        adds_up: with `renews`, what predicts is the sum of all tasks' pairs; else what `merged` says.
        surveys: it needs the sums of `statistics` over a task's records before it trains on them, too.
        parameters: what trains now, leaf tensors by `layer/role`.
        memory: what persists, by kind.
        classifier: what trains beside it; the learner sets it.
    """

    classifier: Classifier

    Config: ClassVar[Any] = BodyConfig
    paper: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    loss: ClassVar[str] = "any"
    heads: ClassVar[tuple[str, ...] | None] = None
    stays_central: ClassVar[str] = "does not say that a server can run it (`Body.stays_central`)"
    replays: ClassVar[bool] = False
    renews: ClassVar[bool] = False
    adds_up: ClassVar[bool] = False
    surveys: ClassVar[bool] = False

    @classmethod
    def fixed_roles(cls, config: Any) -> tuple[str, ...]:
        """Roles of `parameters` that stay as a task begins with them."""
        return ()

    @classmethod
    def moves_in(cls, task: int) -> bool:
        """Whether the body trains in this task, or the classifier alone."""
        return True

    def __init__(self, model: Plastic, train: TrainConfig, seed: int, **options: Any) -> None:
        self.model, self.train, self.seed = model, train, seed
        self.config = self.Config(**options)
        self.parameters: dict[str, Tensor] = {}
        self.memory: dict[str, Any] = {kind: {} for kind in KINDS}
        self.optimizer: torch.optim.Optimizer | None = None
        self.index = -1
        self.surveyed: dict[str, Tensor] | None = None
        self.joined: dict[str, tuple[int, Any]] = {}  # by layer, of a task: what follows from `memory`, and is no state
        self.task: Task | None = None
        self.seen: list[int] = []

    # What a body defines ---------------------------------------------------------------------------------------------

    def begin_task(self) -> None:
        """A task begins (`self.task`, `self.index`, `self.seen` are set); make or keep `parameters`."""

    def change(self) -> Change:
        """The view that trains."""
        return {}

    def views(self) -> dict[str, Change]:
        """Views that predict; the first is the one heads are fitted on first."""
        return {"online": self.change()}

    def combine(self, scores: dict[str, Tensor]) -> Tensor:
        """Scores [N, C] of all views to one; unseen classes are -inf."""
        return next(iter(scores.values()))

    def predict(self, inputs: Inputs, classifier: Classifier) -> Tensor | None:
        """Scores [N, C] of a body with a rule of its own; None: views, head and `combine` decide."""
        return None

    def steps(self) -> int:
        """Optimizer steps of the present task."""
        return self.per_epoch() * self.train.epochs

    def batch(self, step: int) -> tuple[Inputs, Tensor]:
        """The batch of a step: a function of seed, task and step, so that a resumed run draws the same."""
        return self.records().batch(self.order(step))

    def penalty(self, inputs: Inputs, labels: Tensor, features: Tensor, classifier: Classifier) -> Tensor | None:
        """What is added to the loss."""
        return None

    def body_trains(self, step: int) -> bool:
        """Whether the body moves in this step, or the classifier alone."""
        return bool(self.parameters) and self.moves_in(self.index)

    def after_backward(self) -> None:
        """Change the gradients of `parameters`."""

    def step(self) -> None:
        """Move `parameters` along their gradients."""
        if self.optimizer is not None:
            self.optimizer.step()

    def after_step(self, step: int) -> None:
        """Averages, projections, counters."""

    def statistics(self, data: Encoded) -> dict[str, Tensor]:
        """What the end of the task needs to know of its records, so that sums over owners give that of all."""
        return {}

    def end_task(self, statistics: dict[str, Tensor]) -> None:
        """The task is over."""

    def merged(self) -> AdapterState | None:
        """What predicts in the place of the pair that trains, where the body merges; None before it has."""
        return None

    # What the learner calls ------------------------------------------------------------------------------------------

    def feed(self, index: int, task: Task, seen: list[int]) -> None:
        """The next records; a new task where the stream shows boundaries, and always at first."""
        self.index, self.task, self.seen = index, task, list(seen)

    def start(self) -> None:
        """`begin_task`, and a new optimizer."""
        self.begin_task()
        self.restart_optimizer()

    def restart_optimizer(self) -> None:
        """Forget the moments: a new Adam over the parameters whose role is not fixed, None where none is left."""
        fixed = self.fixed_roles(self.config)
        leaves = [value for key, value in self.parameters.items() if key.rpartition("/")[2] not in fixed]
        self.optimizer = torch.optim.Adam(leaves, lr=self.train.lr) if leaves else None

    def state(self) -> dict[str, Any]:
        """Everything that changes, as plain data."""
        optimizer = None if self.optimizer is None else self.optimizer.state_dict()
        own = {
            "index": self.index,
            "seen": self.seen,
            "memory": self.memory,
            "optimizer": optimizer,
            "parameters": {key: value.detach() for key, value in self.parameters.items()},
        }
        return copy.deepcopy(own)

    def load(self, state: dict[str, Any], task: Task) -> None:
        """Go on from a `state` in the middle of `task`."""
        state = copy.deepcopy(state)
        self.index, self.seen, self.memory, self.task = state["index"], state["seen"], state["memory"], task
        self.joined = {}
        # New leaves, so the optimizer is made anew on them before it gets its moments.
        self.parameters = {key: make_leaf(value) for key, value in state["parameters"].items()}
        self.restart_optimizer()
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])

    def stored(self) -> dict[str, int]:
        """Bytes that must be kept to go on, by kind; the trained parameters count as adapters."""
        kept = {kind: _count_bytes(self.memory[kind]) for kind in KINDS}
        kept["adapters"] += _count_bytes(self.parameters)
        return kept

    # What bodies use -------------------------------------------------------------------------------------------------

    def current(self) -> Task:
        """The present task.

        Raises:
            InputError: none has begun.
        """
        if self.task is None:
            raise InputError("body: no task has begun.")
        return self.task

    def records(self) -> Encoded:
        """The training records of the present task."""
        return self.current().train

    def survey(self) -> dict[str, Tensor]:
        """`statistics` of the task's records: those that all owners' make, where they were handed over."""
        return self.statistics(self.records()) if self.surveyed is None else self.surveyed

    def per_epoch(self) -> int:
        """Steps of one pass over the task's records; the last batch may be smaller."""
        return -(-len(self.records()) // self.train.batch_size)

    def order(self, step: int) -> Any:
        """Numbers of the records of a step: shuffled passes over the task."""
        epoch, within = divmod(step, self.per_epoch())
        size = self.train.batch_size
        rng = seeds.numpy_generator(self.seed, "order", self.index, epoch)
        return rng.permutation(len(self.records()))[within * size : (within + 1) * size]

    def generator(self, *path: str | int) -> torch.Generator:
        """A generator for this body's draws; name the purpose."""
        return seeds.torch_generator(self.seed, "body", *path)

    def each_batch(self, data: Encoded, size: int = 256) -> list[tuple[Inputs, Tensor]]:
        """All records in order, in batches."""
        import numpy as np

        return [data.batch(np.arange(start, min(start + size, len(data)))) for start in range(0, len(data), size)]


class Classifier:
    """The linear classifier that trains beside a body, all classes from the start: weight [C, D], bias [C].

    Rows of classes that a loss leaves out get no gradient, and a new optimizer for every task leaves them bit for bit.
    """

    def __init__(self, classes: int, width: int, seed: int, lr: float) -> None:
        rows = torch.randn(classes, width, generator=seeds.torch_generator(seed, "classifier"))
        # Nearly zero, so that no class is ahead; not zero, or the first step would not reach the body.
        self.weight, self.bias, self.lr = make_leaf(rows * 1e-3), make_leaf(torch.zeros(classes)), lr
        self.restart_optimizer()

    def restart_optimizer(self) -> None:
        """Forget the moments: a new Adam over weight and bias."""
        self.optimizer = torch.optim.Adam([self.weight, self.bias], lr=self.lr)

    def __call__(self, features: Tensor) -> Tensor:
        """Logits [N, C] of all classes."""
        return features @ self.weight.T + self.bias

    def state(self) -> dict[str, Any]:
        """Copies of weight, bias and the optimizer's state."""
        return copy.deepcopy(
            {"weight": self.weight.detach(), "bias": self.bias.detach(), "optimizer": self.optimizer.state_dict()}
        )

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`, with its moments."""
        state = copy.deepcopy(state)
        self.weight, self.bias = make_leaf(state["weight"]), make_leaf(state["bias"])
        self.restart_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])


def make_leaf(value: Tensor) -> Tensor:
    """A copy that can be trained."""
    return value.detach().clone().requires_grad_(True)


def only_classes(logits: Tensor, classes: list[int] | tuple[int, ...]) -> Tensor:
    """Logits with -inf for every class that is not in `classes`."""
    # -inf, as softmax and argmax come next; `Adapted`, of whose logits entropies are taken, has a finite number.
    mask = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    mask[list(classes)] = False
    return logits.masked_fill(mask, float("-inf"))


def _count_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_count_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_count_bytes(item) for item in value)
    return 8 if isinstance(value, int | float) else 0
