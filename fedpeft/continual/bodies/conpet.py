"""Dynamic ConPET: an expert (LoRA and linear head) for each task, and a selector that says which experts to ask.

Song et al., arXiv 2309.14763. From the second task k on, with batches of dynamic replay (see
`fedpeft.continual.parts.replay`; an epoch is `batches` of them):

    1. selector: its LoRA goes on from the last task's, its head gets one row more; CE on the number of the task
    2. expert k: a new LoRA and a head over the task's classes C_k, from the base. For every record the n best tasks of
       the selector are asked, and with teacher forcing its own task takes the last place if it is not among them.
       Scores of experts that are not asked are -100; those of old experts come from the cache, without a gradient.
       CE over all classes so far.

A prediction takes one pass for the selector and n for the experts (one in all while there is one expert only), and is
the best class of the experts that were asked. With n = 1 and forcing, the one expert asked is the true one: old records
give no gradient, and every expert is trained by the CE over its own classes alone.

Within the steps of a task the first half trains the selector, the second the expert (the first task: the expert only).
Both have heads of their own and their own loss, `penalty`. The learner's classifier, trained beside them on features
that are detached here, says nothing in predictions.

In memory: experts and selector under "adapters", raw records, and under "statistics" the cache `logits/hash/task`, the
logits [N, |C_j|] of an expert for the records of a task, keyed by the hash of the expert's weights.

Deviations: no validation part, the last epoch is kept. The cache is in float32 and keyed by weights, where the authors'
is in float16 and keyed by names. Where tasks share classes, a class has the best score of the experts asked.

    >>> import torch
    >>> asked(torch.tensor([[3.0, 2.0, 1.0]]), 2).tolist()                       # tasks 0 and 1
    [[True, True, False]]
    >>> asked(torch.tensor([[3.0, 2.0, 1.0]]), 2, torch.tensor([2])).tolist()    # the true task in the last place
    [[True, False, True]]
    >>> union([torch.tensor([[5.0]]), torch.tensor([[6.0]])], [[0], [2]], torch.tensor([[True, False]]), 3).tolist()
    [[5.0, -100.0, -100.0]]
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft import seeds
from fedpeft.config import option
from fedpeft.continual.body import Body, Classifier, make_leaf, only_classes
from fedpeft.continual.model import Change, Inputs, low_rank
from fedpeft.continual.parts import lora, replay
from fedpeft.data.encode import Encoded

# Finite: where a record's own expert is not asked, its loss must be a number.
NOT_ASKED = -100.0
Tensors = dict[str, Tensor]


class ConPET(Body):
    """Experts and a selector."""

    paper = "Song et al. 2023, arXiv 2309.14763"
    needs = ("boundaries", "raw")
    loss = "seen"
    heads = ("linear",)
    stays_central = (
        "keeps raw records of all owners with the scores of every expert for them, and trains "
        "a selector with a loss of its own"
    )

    @dataclass
    class Config:
        r: int = option(4, "rank of every LoRA", low=1)
        alpha: float = option(8.0, "scale of the LoRAs: alpha / r", above=0)
        top: int = option(1, "experts that are asked for each record (n)", low=1)
        teacher_forcing: bool = option(True, "in training the record's own task is always asked")
        batches: int = option(20, "batches in an epoch of each stage from the second task on (L)", low=1)

    # Stages ----------------------------------------------------------------------------------------------------------

    def begin_task(self) -> None:
        self.memory["numbers"][f"classes/{self.index}"] = list(self.current().classes)
        self.parameters = {}
        if not self.index:
            self._begin_expert()
            return
        before = self._part("selector")
        fresh = self._fresh(rows=self.index + 1, purpose="selector")
        # The selector goes on; of what was drawn only the new task's row stays.
        for name, value in before.items():
            if name in ("weight", "bias"):
                fresh[name][: len(value)] = value
            else:
                fresh[name] = value
        self.parameters = {f"selector/{name}": make_leaf(value) for name, value in fresh.items()}

    def after_step(self, step: int) -> None:
        # The second stage trains other tensors, to which the selector's moments mean nothing.
        if self.index and step + 1 == self.steps() // 2:
            self._put_by()
            self._begin_expert()
            self.restart_optimizer()

    def end_task(self, statistics: dict[str, Tensor]) -> None:
        self._put_by()
        self.memory["raw"][str(self.index)] = replay.keep(self.records())

    def steps(self) -> int:
        return self.train.epochs * (2 * self.config.batches if self.index else self.per_epoch())

    def restart_optimizer(self) -> None:
        heads = [value for key, value in self.parameters.items() if key.endswith(("/weight", "/bias"))]
        loras = [value for key, value in self.parameters.items() if key.endswith(("/A", "/B"))]
        groups: list[dict[str, Any]] = [{"params": loras}, {"params": heads, "lr": self.train.head_lr}]
        self.optimizer = torch.optim.Adam(groups, lr=self.train.lr) if self.parameters else None

    def _begin_expert(self) -> None:
        fresh = self._fresh(rows=len(self.current().classes), purpose=f"expert-{self.index}")
        self.parameters = {f"expert/{self.index}/{name}": make_leaf(value) for name, value in fresh.items()}
        if self.index:
            self._fill_cache()

    def _fresh(self, rows: int, purpose: str) -> Tensors:
        """A LoRA that changes nothing, and a head of so many rows."""
        weight = torch.randn(rows, self.model.base.width, generator=self.generator("head", purpose))
        fresh = {"weight": 1e-3 * weight, "bias": torch.zeros(rows)}
        for layer in self.model.layers:
            m, n = self.model.base.shape(layer)
            fresh[f"{layer}/A"] = lora.draw_A(n, self.config.r, self.generator("A", purpose, layer))
            fresh[f"{layer}/B"] = torch.zeros(m, self.config.r)
        return fresh

    def _put_by(self) -> None:
        self.memory["adapters"] |= {key: value.detach().clone() for key, value in self.parameters.items()}

    def _part(self, name: str) -> Tensors:
        """The tensors of `selector` or `expert/k`: those that train where they do."""
        everything = {**self.memory["adapters"], **self.parameters}
        return {key.removeprefix(f"{name}/"): value for key, value in everything.items() if key.startswith(f"{name}/")}

    def _list_experts(self) -> list[Tensors]:
        found = [self._part(f"expert/{task}") for task in range(self.index + 1)]
        return [part for part in found if part]

    # Training --------------------------------------------------------------------------------------------------------

    def change(self) -> Change:
        """The newest expert; the learner's own loss does not reach it."""
        experts = self._list_experts()
        return self._view({name: value.detach() for name, value in experts[-1].items()}) if experts else {}

    def batch(self, step: int) -> tuple[Inputs, Tensor]:
        if not self.index:
            return super().batch(step)
        stores = self._replay_stores()
        rng = seeds.numpy_generator(self.seed, "replay", self.index, step)
        self.drawn = replay.draw_replay(rng, [len(store) for store in stores], self.train.batch_size)
        return replay.gather(stores, self.drawn)

    def penalty(self, inputs: Inputs, labels: Tensor, features: Tensor, classifier: Classifier) -> Tensor:
        """The loss of the stage."""
        tasks = torch.from_numpy(self.drawn.tasks) if self.index else torch.zeros(len(labels), dtype=torch.int64)
        stage = next(iter(self.parameters)).partition("/")[0]
        if stage == "selector":
            return F.cross_entropy(self._expert_logits("selector", inputs) / self.train.temperature, tasks)
        newest = self._expert_logits(f"expert/{self.index}", inputs)
        cached = [self._cached_logits(task, tasks) for task in range(self.index)]
        with torch.no_grad():
            choice = self._select_experts(inputs, tasks if self.config.teacher_forcing else None)
        scores = union([*cached, newest], self._classes_of_tasks(), choice, classifier.weight.shape[0])
        return F.cross_entropy(only_classes(scores, self.seen) / self.train.temperature, labels)

    def _select_experts(self, inputs: Inputs, forced: Tensor | None = None) -> Tensor:
        """Which experts are asked, bool [N, experts]."""
        count, rows = len(self._list_experts()), len(next(iter(inputs.values())))
        if count == 1:
            return torch.ones(rows, 1, dtype=torch.bool)
        # While the selector trains, the new task has a row in its head and no expert yet.
        return asked(self._expert_logits("selector", inputs)[:, :count], self.config.top, forced)

    def _expert_logits(self, name: str, inputs: Inputs) -> Tensor:
        part = self._part(name)
        return F.linear(self.model.features(inputs, self._view(part)), part["weight"], part["bias"])

    def _view(self, part: Tensors) -> Change:
        scale = self.config.alpha / self.config.r
        return {layer: low_rank(part[f"{layer}/B"], part[f"{layer}/A"], scale) for layer in self.model.layers}

    def _classes_of_tasks(self) -> list[list[int]]:
        return [self.memory["numbers"][f"classes/{task}"] for task in range(self.index + 1)]

    def _replay_stores(self) -> list[Encoded]:
        return replay.stores(self.memory["raw"], self.index, self.records())

    # The cache of logits ---------------------------------------------------------------------------------------------

    def _fill_cache(self) -> None:
        """Logits of every old expert for every record at hand, where they are not there yet."""
        cache, numbers = self.memory["statistics"], self.memory["numbers"]
        for expert in range(self.index):
            numbers[f"hash/{expert}"] = weights_hash(self._part(f"expert/{expert}"))
            for task, data in enumerate(self._replay_stores()):
                key = f"logits/{numbers[f'hash/{expert}']}/{task}"
                if key not in cache:
                    with torch.no_grad():
                        cache[key] = torch.cat(
                            [self._expert_logits(f"expert/{expert}", inputs) for inputs, _ in self.each_batch(data)]
                        )

    def _cached_logits(self, expert: int, tasks: Tensor) -> Tensor:
        """Cached logits [N, |C_j|] of an old expert for the batch that was drawn."""
        cache, name = self.memory["statistics"], self.memory["numbers"][f"hash/{expert}"]
        rows = torch.from_numpy(self.drawn.rows)
        found = torch.empty(len(rows), len(self._classes_of_tasks()[expert]))
        for task in tasks.unique().tolist():
            found[tasks == task] = cache[f"logits/{name}/{task}"][rows[tasks == task]]
        return found

    # Prediction ------------------------------------------------------------------------------------------------------

    def predict(self, inputs: Inputs, classifier: Classifier) -> Tensor:
        """Scores [N, C]; each expert sees only the rows for which it is asked."""
        choice, scores = self._select_experts(inputs), []
        for expert in range(choice.shape[1]):
            rows = choice[:, expert].nonzero().flatten()
            own = torch.full((len(choice), len(self._classes_of_tasks()[expert])), NOT_ASKED)
            if len(rows):
                own[rows] = self._expert_logits(f"expert/{expert}", {key: value[rows] for key, value in inputs.items()})
            scores.append(own)
        return union(scores, self._classes_of_tasks(), choice, classifier.weight.shape[0])

    def stored(self) -> dict[str, int]:
        """Bytes by kind; after a task the newest expert is in memory and still in `parameters`: it counts once."""
        kept = super().stored()
        twice = (
            value
            for key, value in self.parameters.items()
            if key in self.memory["adapters"] and torch.equal(self.memory["adapters"][key], value)
        )
        kept["adapters"] -= sum(value.numel() * value.element_size() for value in twice)
        return kept


def weights_hash(part: Tensors) -> str:
    """What an expert's cached logits are kept under."""
    digest = hashlib.sha256()
    for name, value in sorted(part.items()):
        digest.update(f"{name}{tuple(value.shape)}".encode() + value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def asked(scores: Tensor, top: int, forced: Tensor | None = None) -> Tensor:
    """The `top` best columns of each row, bool [N, k]; a forced column takes the last place if it is not among them."""
    best = scores.topk(min(top, scores.shape[1]), dim=1).indices
    if forced is not None:
        absent = (best != forced[:, None]).all(dim=1)
        best[absent, -1] = forced[absent]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)


def union(logits: list[Tensor], classes: list[list[int]], choice: Tensor, count: int) -> Tensor:
    """Scores [N, count] of the experts that are asked; -100 for classes of the others.

    Args:
        logits: of each expert, [N, |C_j|].
        choice: bool [N, experts].
    """
    scores = logits[0].new_full((len(choice), count), NOT_ASKED)
    for expert, (own, labels) in enumerate(zip(logits, classes[: len(logits)], strict=True)):
        own = own.masked_fill(~choice[:, expert, None], NOT_ASKED)
        widened = scores.new_full(scores.shape, NOT_ASKED)
        scores = torch.maximum(scores, widened.index_copy(1, torch.tensor(labels), own))
    return scores
