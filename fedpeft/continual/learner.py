"""One body over one stream, with as many heads as fit its training: the loop, the matrix of accuracies, exact resume.

After each task every head is fitted on one pass over the task's records and then evaluated on the test set of every
task. Row i, column j of a head's matrix R is the number of right answers on task j after task i; test counts stand
beside it, and all metrics follow from both (`matrix`).

A body's features may be seen in several views (LAE's two experts). Each view has its own copy of every head; a view
that appears later starts from the sums of the first one, whose features it then shares.
"""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft import config as configs
from fedpeft.continual.body import Body, Classifier, TrainConfig, only_classes
from fedpeft.continual.head import Head
from fedpeft.continual.model import Inputs, Plastic
from fedpeft.continual.stream import Stream
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from fedpeft.files import write_bytes

EVALUATE = 256  # rows in a pass that only looks


class Learner:
    """A body, its classifier and its heads on a stream.

    Args:
        heads: name -> options of registered heads; all must want the same training loss, unless the body decides it.

    Raises:
        InputError: unknown names or options, heads that want different losses, a body that needs what the stream
            does not show, or a head that the body cannot have.
    """

    def __init__(
        self,
        stream: Stream,
        model: Plastic,
        body: str,
        heads: dict[str, dict[str, Any]],
        train: TrainConfig,
        seed: int,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.stream, self.model, self.train, self.seed = stream, model, train, seed
        self.body: Body = configs.method("bodies", body, options or {}, "body", model=model, train=train, seed=seed)
        self.heads: dict[str, dict[str, Head]] = {
            name: {"online": self._head(name, given)} for name, given in heads.items()
        }
        self.options = heads
        self.classifier = Classifier(stream.classes, model.base.width, seed, train.head_lr)
        self.body.classifier = self.classifier
        self.loss = self._choose_loss(body)
        self.task, self.step_number = 0, 0
        self.right: dict[str, list[list[int]]] = {name: [] for name in heads}
        self.ledger: list[dict[str, Any]] = []

    def _head(self, name: str, options: dict[str, Any]) -> Head:
        head: Head = configs.method(
            "heads",
            name,
            options,
            f"head.{name}",
            classes=self.stream.classes,
            width=self.model.base.width,
            seed=self.seed,
        )
        return head

    def _choose_loss(self, body: str) -> str:
        if "boundaries" in self.body.needs and not self.stream.boundaries:
            raise InputError(
                f"body {body} needs to be told when a task begins; stream '{self.stream.name}' is "
                f"{self.stream.scenario} and does not tell."
            )
        if not self.stream.boundaries and self.train.epochs != 1:
            raise InputError(
                f"epochs={self.train.epochs}: stream '{self.stream.name}' is {self.stream.scenario}: each "
                "record is seen once. Set epochs=1."
            )
        wrong = [name for name in self.heads if self.body.heads is not None and name not in self.body.heads]
        if wrong:
            raise InputError(
                f"head {wrong[0]}: body {body} predicts by itself; it goes with {', '.join(self.body.heads or ())}."
            )
        wanted = {views["online"].loss for views in self.heads.values()}
        # Where tasks share classes, or nobody tells them apart, there are no classes of the task's own.
        if self.body.loss == "seen" or self.stream.scenario in ("domain", "blurry", "free"):
            return "seen"
        if len(wanted) > 1:
            raise InputError(
                f"heads {', '.join(self.heads)}: they want different training losses "
                f"({', '.join(sorted(wanted))}), so they cannot share one training of {body}."
            )
        return next(iter(wanted))

    # Training --------------------------------------------------------------------------------------------------------

    def run(
        self,
        checkpoint: Path | None = None,
        every: int = 0,
        stop: int | None = None,
        on_task: Callable[[int, int], None] = lambda task, tasks: None,
    ) -> Learner:
        """Train what is left of the stream.

        Args:
            checkpoint: file that the whole state is written to after every task, and every `every` steps.
            stop: end before this many further steps have been made (0 or more), in mid-task; for tests of resume.
        """
        while self.task < len(self.stream.tasks):
            if stop == 0:  # before a task begins, which must happen once
                return self
            if self.step_number == 0:
                self._begin()
            # Seconds of the CPU: what else the machine does must not be in a comparison of bodies.
            begun = time.process_time()
            while self.step_number < self.body.steps():
                if stop is not None and (stop := stop - 1) < 0:
                    return self
                self._step(self.step_number)
                self.step_number += 1
                if checkpoint is not None and every and self.step_number % every == 0:
                    self.save(checkpoint)
            self._end(time.process_time() - begun)
            on_task(self.task, len(self.stream.tasks))
            if checkpoint is not None:
                self.save(checkpoint)
        return self

    def _begin(self) -> None:
        self.body.feed(self.task, self.stream.tasks[self.task], self.stream.seen(self.task))
        # Without boundaries a body must not learn that a task began, not even by its optimizer.
        if self.task == 0 or self.stream.boundaries:
            self.body.start()
            self.classifier.restart_optimizer()

    def _step(self, step: int) -> None:
        inputs, labels = self.body.batch(step)
        moves = self.body.body_trains(step)
        # Where the body rests, the classifier alone learns, and the features need no graph.
        with torch.set_grad_enabled(moves):
            features = self.model.features(inputs, self.body.change())
        logits = self.classifier(features)
        task = self.stream.tasks[self.task]
        allowed = self.stream.seen(self.task) if self.loss == "seen" else task.classes
        loss = F.cross_entropy(only_classes(logits, allowed) / self.train.temperature, labels)
        extra = self.body.penalty(inputs, labels, features, self.classifier) if moves else None
        if extra is not None:
            loss = loss + extra
        leaves = {
            **(self.body.parameters if moves else {}),
            "weight": self.classifier.weight,
            "bias": self.classifier.bias,
        }
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for value, gradient in zip(leaves.values(), gradients, strict=True):
            # Zeros, not None: Adam leaves out what has no gradient, and its moments would fall behind the others'.
            value.grad = torch.zeros_like(value) if gradient is None else gradient
        if moves:
            self.body.after_backward()
            self.body.step()
        self.classifier.optimizer.step()
        self.body.after_step(step)

    def _end(self, seconds: float) -> None:
        task = self.stream.tasks[self.task]
        self.body.end_task(self.body.statistics(task.train))
        self._fit_heads(task.train, self.stream.seen(self.task))
        before = self.model.passes
        seen = set(self.stream.seen(self.task))
        asked = [bool(seen & set(other.classes)) for other in self.stream.tasks]  # others cannot be answered
        counts = [
            self.count(other.test, other.classes) if known else {}
            for other, known in zip(self.stream.tasks, asked, strict=True)
        ]
        for name in self.heads:
            self.right[name].append([found.get(name, 0) for found in counts])
        rows = sum(len(other.test) for other, known in zip(self.stream.tasks, asked, strict=True) if known)
        self.ledger.append(
            {
                "task": self.task,
                "parameters": sum(v.numel() for v in self.body.parameters.values()),
                "stored_bytes": self.body.stored(),
                "head_bytes": self._head_bytes(),
                "passes_per_prediction": (self.model.passes - before) / max(rows, 1),
                "train_cpu_s": round(seconds, 3),
            }
        )
        self.task, self.step_number = self.task + 1, 0

    def _fit_heads(self, data: Encoded, seen: list[int]) -> None:
        """Fit every head in every view."""
        views = self.body.views()
        sums: dict[tuple[str, str], dict[str, Tensor]] = {}
        for view, change in views.items():
            for inputs, labels in self.body.each_batch(data, EVALUATE):
                with torch.no_grad():
                    features = self.model.features(inputs, change)
                for name, own in self.heads.items():
                    if view not in own:
                        own[view] = self._head(name, self.options[name])
                        # A view that is new has had the features of the first one until now, and so its sums.
                        own[view].load(own["online"].state())
                    found = sums.setdefault((name, view), {})
                    for key, value in own[view].statistics(features, labels).items():
                        found[key] = found[key] + value if key in found else value
        for (name, view), total in sums.items():
            self.heads[name][view].update(total, seen)

    # Prediction ------------------------------------------------------------------------------------------------------

    def scores(self, name: str, inputs: Inputs) -> Tensor:
        """Scores [N, C] of one head; each row depends on its own input only."""
        return self._score_heads([name], inputs)[name]

    def count(self, data: Encoded, classes: tuple[int, ...]) -> dict[str, int]:
        """Right answers of every head on a test set; with the task id given only the task's classes compete."""
        right = dict.fromkeys(self.heads, 0)
        for inputs, labels in self.body.each_batch(data, EVALUATE):
            for name, scores in self._score_heads(list(self.heads), inputs).items():
                allowed = only_classes(scores, classes) if self.stream.scenario == "task" else scores
                right[name] += int((allowed.argmax(-1) == labels).sum())
        return right

    @torch.no_grad()
    def _score_heads(self, names: list[str], inputs: Inputs) -> dict[str, Tensor]:
        """Scores of several heads from one pass a view."""
        own = self.body.predict(inputs, self.classifier)
        if own is not None:
            return {name: only_classes(own, self.body.seen) for name in names}
        features = {view: self.model.features(inputs, change) for view, change in self.body.views().items()}
        return {
            name: self.body.combine(
                {view: self.heads[name][view].scores(found, self.classifier) for view, found in features.items()}
            )
            for name in names
        }

    # State -----------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What `load` goes on from bit for bit, as plain data and tensors: body, heads, counts and ledger."""
        heads = {name: {view: head.state() for view, head in own.items()} for name, own in self.heads.items()}
        return {
            "task": self.task,
            "step": self.step_number,
            "body": self.body.state(),
            "heads": heads,
            "classifier": self.classifier.state(),
            "right": copy.deepcopy(self.right),
            "ledger": copy.deepcopy(self.ledger),
            "passes": self.model.passes,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state` of the same stream, body and heads, bit for bit."""
        if set(state["heads"]) != set(self.heads):
            raise InputError(
                f"checkpoint: it has the heads {', '.join(state['heads'])}, asked for are {', '.join(self.heads)}."
            )
        self.task, self.step_number = state["task"], state["step"]
        self.right, self.ledger = copy.deepcopy(state["right"]), copy.deepcopy(state["ledger"])
        self.model.passes = state["passes"]
        self.classifier.load(state["classifier"])
        for name, own in state["heads"].items():
            for view, kept in own.items():
                head = self.heads[name].setdefault(view, self._head(name, self.options[name]))
                head.load(kept)
        # A state from before the first task has index -1, and a body needs some task to be loaded at.
        last = min(max(state["body"]["index"], 0), len(self.stream.tasks) - 1)
        self.body.load(state["body"], self.stream.tasks[last])

    def save(self, path: Path) -> None:
        """Write the state whole or not at all."""
        buffer = io.BytesIO()
        torch.save(self.state(), buffer)
        write_bytes(path, buffer.getvalue())

    def resume(self, path: Path) -> None:
        """Load a saved state.

        Raises:
            InputError: the file is no state, or one of other heads.
        """
        try:
            # A state is plain data; without `weights_only` a file could run code.
            self.load(torch.load(path, weights_only=True))
        except (OSError, EOFError, RuntimeError, KeyError) as error:
            raise InputError(f"{path}: not a checkpoint of this run: {error}") from error

    def _head_bytes(self) -> int:
        sums = [value for own in self.heads.values() for head in own.values() for value in head.sums.values()]
        trained = (self.classifier.weight, self.classifier.bias)
        return sum(value.numel() * value.element_size() for value in (*sums, *trained))
