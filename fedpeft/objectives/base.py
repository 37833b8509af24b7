"""Every objective describes itself. `model.task` names one of the table `objectives`, and nothing else asks for it.

An objective is what a model is trained to do: what a record is, which inputs and labels it becomes, the loss of each
sample, what an evaluation measures, and what transformers and peft call it.

    >>> import torch
    >>> objective = load_objective("image-classification")
    >>> objective.records, objective.classes, objective.auto_class
    ('image', True, 'AutoModelForImageClassification')
    >>> objective.losses(torch.zeros(2, 4), torch.tensor([0, 3])).exp().round().tolist()
    [4.0, 4.0]
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft import registry
from fedpeft.config.schema import Configured
from fedpeft.errors import InputError
from fedpeft.objectives.measures import CLASSES, PLAIN, Measure

if TYPE_CHECKING:
    from fedpeft.config import Config
    from fedpeft.data.encode import Encoded
    from fedpeft.data.records import Records
    from fedpeft.data.stored import Tokens

IGNORE = -100  # the label of what is not to be predicted; among numbers it is NaN


class Objective(Configured):
    """Base of all objectives: a head scores classes.

    Attributes:
        records: what a record is, "text" or "image".
        auto_class: transformers' class that loads a base model for it.
        peft_task: peft's `task_type`; None where peft has none.
        labelled: what a record's label is: one "class"; "numbers" or "several" names (`fedpeft.data.answers`); "tags"
            of its words (`fedpeft.data.tagged`). There is no head for "none", and for "pairs" of which one is better.
        problem_type: what transformers calls it in a model's config, where it has a name for it.
        causal: every token is predicted from those before it, so a model that sees later ones is refused.
        measures: what an evaluation says beside accuracy and loss; `run.metric` names one of all.
        headline: the measure that leads where `run.metric` is null and there is no accuracy.
        encoder_decoder: an encoder reads what is asked, and a decoder answers; all others take one of the two alone.
        mean_pooled: a linear head on mean-pooled features can take the place of the model's own.
        rows: that a record has in the model's batch, one after another.
        says: what a trained model is asked for: "labels" of records, "answers" in words, or "hidden words" of texts.
        redrawn: inputs and labels are drawn anew for each client and round.
        referred: the labels are the model's own scores before it was trained (`fedpeft.clients.reference`).
    """

    records: ClassVar[str]
    auto_class: ClassVar[str]
    peft_task: ClassVar[str | None] = None
    labelled: ClassVar[str] = "class"
    problem_type: ClassVar[str | None] = None
    causal: ClassVar[bool] = False
    encoder_decoder: ClassVar[bool] = False
    mean_pooled: ClassVar[bool] = False
    measures: ClassVar[Mapping[str, Measure]] = CLASSES
    headline: ClassVar[str | None] = None
    rows: ClassVar[int] = 1
    says: ClassVar[str] = "labels"
    redrawn: ClassVar[bool] = False
    referred: ClassVar[bool] = False

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(**options)
        self.name = name

    @property
    def classes(self) -> bool:
        """Whether each record has one class."""
        return self.labelled == "class"

    @property
    def all_measures(self) -> dict[str, Measure]:
        """Accuracy, where there is one, loss, and the objective's `measures`."""
        # Of no sample at all: only the keys are asked for.
        plain = self.metrics(defaultdict(int), 0)
        return {**{name: measure for name, measure in PLAIN.items() if name in plain}, **self.measures}

    @property
    def headed(self) -> bool:
        """Whether the model gets a head for the labels, one output for each of their names."""
        return self.labelled not in ("none", "pairs")

    def encode(
        self, records: Records, processor: Any, max_length: int, what: str, folder: Path | None = None
    ) -> Encoded:
        """Inputs and labels of the records, see `fedpeft.data.encode.encode`.

        Args:
            folder: where long columns of tokens are written, for a cache; None keeps them in memory.
        """
        raise NotImplementedError

    def arrange(self, tokens: Tokens, processor: Any) -> Tokens:
        """The texts that `encode` has made, when they come from a cache, as the objective has them."""
        return tokens

    def score(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """What a transformers model makes of a batch: [N, ...], for `pair` and `losses`."""
        logits: Tensor = model(**inputs).logits
        return logits

    def draw_input(self, name: str, mask: Tensor) -> Tensor:
        """Another input than ids and mask [N, T] of texts that are drawn to try a model on."""
        return torch.zeros_like(mask)

    def learned_tokens(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Which tokens [N, T] of drawn texts have a label, where tokens have some."""
        return inputs["attention_mask"]

    def pair(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [N, ..., K] and the labels [N, ...] that they are for, IGNORE where there is nothing to predict."""
        return logits, self.targets(labels)

    def targets(self, labels: Tensor) -> Tensor:
        """What is to be predicted, of the labels of records [N, ...]."""
        return labels

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Loss [N] of each sample, which must not depend on the others in its batch: privacy is a sample's own."""
        return F.cross_entropy(scores, targets, reduction="none")

    def measure(self, scores: Tensor, targets: Tensor, losses: Tensor) -> dict[str, float]:
        """Sums over the samples of a batch, of which `metrics` makes its means; `losses` [N] are float64."""
        known = targets != IGNORE
        return {
            "loss": float(losses.sum()),
            "right": int((scores.argmax(-1) == targets).logical_and(known).sum()),
            "targets": int(known.sum()),
        }

    def metrics(self, sums: Mapping[str, float], samples: int) -> dict[str, float]:
        """What an evaluation says, of the sums over all samples: `accuracy`, `loss`, `num-examples` and whatever else.

        It has the same keys whatever the sums, all 0 of no sample: a private client answers with the keys alone.
        """
        return {
            "accuracy": divide_or_nan(sums["right"], sums["targets"]),
            "loss": divide_or_nan(sums["loss"], samples),
            "num-examples": samples,
        }

    def further(self, sums: Mapping[str, float], samples: int) -> dict[str, float]:
        """Measures that follow from the sums too. No private client sends them, unlike `metrics`."""
        return {}

    def predictions(self, scores: Tensor) -> Tensor:
        """What the measures that are computed of all records take of the scores of a batch."""
        return scores.softmax(-1)

    def say(self, scores: Tensor, labels: Tensor, names: Sequence[str], inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """What a trained model says of each record, JSON-ready: here its most likely class, and all probabilities.

        Args:
            scores: [N, ..., K].
            labels: [N, ...], of records that were read without answers (`fedpeft.data.unanswered`).
            names: of the K outputs.
            inputs: the records as they were read.
        """
        return [
            {"label": names[int(row.argmax())], "probabilities": named_numbers(names, row)}
            for row in scores.softmax(-1)
        ]

    def answer(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The scores [N, K] of one answer for each record, which test-time methods adapt."""
        return logits

    def stream(self, data: Encoded) -> Encoded:
        """Records as a test-time stream has them, labels [N] being the answers."""
        return data

    def describe_answer(self, answer: int, label_names: Sequence[str], processor: Any) -> str:
        """A target in words."""
        return str(label_names[answer])


def load_objective(task: str, options: Mapping[str, Any] | None = None) -> Objective:
    """The objective of a `model.task`.

    Args:
        options: `model.task_options`; None is its defaults, for whoever asks nothing that hangs on them.

    Raises:
        InputError: there is none of that name.
    """
    objective: Objective = registry.load("objectives", task, "model.task")(task, **(options or {}))
    return objective


def check(config: Config) -> None:
    """Refuse what the objective does not have: a head on mean-pooled features, the accuracy of baselines, `run.metric`;
    and a metric that a sequence of tasks is not measured by.
    """
    metric, task = config.run.metric, config.model.task
    objective = load_objective(task)
    measures = objective.all_measures
    if config.model.pooling == "mean" and not objective.mean_pooled:
        raise InputError(
            f"model.pooling=mean: model.task={task} has no head on mean-pooled features, which is for texts that are "
            "classified or given numbers as a whole. Set model.pooling=auto."
        )
    if config.run.trained_baselines and "accuracy" not in measures:
        raise InputError(
            f"run.trained_baselines={config.run.trained_baselines}: their rows are accuracies, and model.task={task} "
            "has none. Set run.trained_baselines=[]."
        )
    if metric is None:
        return
    if metric not in measures:
        raise InputError(registry.unknown(f"run.metric (of {task})", metric, measures))
    if config.continual.body is not None and metric != "accuracy":
        raise InputError(
            f"run.metric={metric}: with continual.body={config.continual.body} a run is measured by the accuracy "
            "of the head that answers, over all classes so far. Set run.metric=accuracy."
        )


def by_token(labels: Tensor) -> bool:
    """Whether each token of a text has a label [N, T]; numbers [N, K] are a record's."""
    return labels.ndim == 2 and not labels.is_floating_point()


def named_numbers(names: Sequence[str], values: Tensor) -> dict[str, float]:
    """Numbers by name, with the digits that float32 has."""
    return {name: float(f"{value:.7g}") for name, value in zip(names, values.tolist(), strict=True)}


def divide_or_nan(total: float, count: float) -> float:
    """A mean; NaN of nothing."""
    return total / count if count else math.nan
