"""What an evaluation says beside accuracy and loss: each objective names its own, from tables like `CLASSES`.

A measure that torchmetrics has is computed by torchmetrics, which is imported where an evaluation ends and not before.
Its predictions are collected batch by batch, 4 bytes for each record and class, so it is for objectives with few
scores a record; what a language model is measured by follows from sums (`Objective.measure`), and nothing is kept.

    >>> scores = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
    >>> round(CLASSES["f1"].compute(scores.softmax(1), torch.tensor([0, 0, 1])), 3)
    0.667
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fedpeft.objectives.base import Objective

# As torchmetrics has it unless told otherwise, so that numbers compare.
ECE_BINS = 15
MOST_CLASSES = 50  # with numbers of their own: an event stays small


@dataclass(frozen=True)
class Measure:
    """One number of an evaluation.

    Attributes:
        words: its name for readers.
        higher: whether more is better.
        share: whether it lies in [0, 1] and is written in per cent.
        compute: the number, of predictions [N, ...] and targets [N]; NaN where the records do not define it. None: it
            is among what `Objective.metrics` or `Objective.further` makes of sums.
    """

    words: str
    higher: bool = True
    share: bool = True
    compute: Callable[[Tensor, Tensor], float] | None = None

    def tree(self) -> dict[str, Any]:
        """Words and direction, JSON-ready."""
        return {"words": self.words, "higher": self.higher, "share": self.share}


def _one_against_the_rest(function: str) -> Callable[[Tensor, Tensor], float]:
    """The mean over classes of a torchmetrics function; classes that none or all of the records have are left out."""

    def compute(predictions: Tensor, targets: Tensor) -> float:
        count = targets.bincount(minlength=predictions.shape[1])
        defined = (count > 0) & (count < len(targets))
        return float(_by_torchmetrics(function, predictions, targets, average=None)[defined].mean())

    return compute


def _macro_f1(predictions: Tensor, targets: Tensor) -> float:
    return float(_by_torchmetrics("multiclass_f1_score", predictions, targets, average="macro"))


def _calibration_error(predictions: Tensor, targets: Tensor) -> float:
    return float(_by_torchmetrics("multiclass_calibration_error", predictions, targets, n_bins=ECE_BINS, norm="l1"))


def by_class(predictions: Tensor, targets: Tensor) -> dict[str, Any]:
    """F1 of each class, and the confusion matrix: a row for each true class, a column for each answer; JSON-ready."""
    return {
        "f1": _by_torchmetrics("multiclass_f1_score", predictions, targets, average=None).tolist(),
        "confusion": _by_torchmetrics("multiclass_confusion_matrix", predictions, targets).tolist(),
    }


def _by_torchmetrics(function: str, predictions: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """A classification function of torchmetrics, of probabilities [N, K] and classes [N]."""
    from torchmetrics.functional import classification

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # classes without records, which are left out on purpose
        value: Tensor = getattr(classification, function)(
            predictions, targets, num_classes=predictions.shape[1], validate_args=False, **options
        )
    return value


PLAIN = {"accuracy": Measure("accuracy"), "loss": Measure("loss", higher=False, share=False)}
CLASSES = {
    "f1": Measure("F1, mean over classes", compute=_macro_f1),
    "auroc": Measure(
        "area under the ROC curve, each class against the rest", compute=_one_against_the_rest("multiclass_auroc")
    ),
    "average_precision": Measure(
        "average precision, each class against the rest",
        compute=_one_against_the_rest("multiclass_average_precision"),
    ),
    "ece": Measure(f"expected calibration error, {ECE_BINS} bins", higher=False, compute=_calibration_error),
}
TOKENS = {
    "exact_match": Measure("texts whose every token is the most likely one"),
    "perplexity": Measure("perplexity", higher=False, share=False),
}


def _root_mean_squared_error(predictions: Tensor, targets: Tensor) -> float:
    return float((predictions - targets).double().square().mean().sqrt())


def _mean_absolute_error(predictions: Tensor, targets: Tensor) -> float:
    return float((predictions - targets).double().abs().mean())


def _r_squared(predictions: Tensor, targets: Tensor) -> float:
    """Mean over the numbers [N, K] that differ between records; NaN where none does."""
    spread = (targets.double() - targets.double().mean(0)).square().sum(0)
    missed = (predictions - targets).double().square().sum(0)
    # A number that is the same for all records has nothing that could be explained.
    return float((1 - missed / spread)[spread > 0].mean())


NUMBERS = {
    "rmse": Measure("root mean squared error", higher=False, share=False, compute=_root_mean_squared_error),
    "mae": Measure("mean absolute error", higher=False, share=False, compute=_mean_absolute_error),
    "r2": Measure("coefficient of determination (R2), mean over numbers", share=False, compute=_r_squared),
}


def _of_labels(function: str, average: str | None) -> Callable[[Tensor, Tensor], float]:
    """A multi-label function of torchmetrics; a mean over labels leaves out those that none or all records have, where
    they are not defined.
    """

    def compute(predictions: Tensor, targets: Tensor) -> float:
        from torchmetrics.functional import classification

        targets, count = targets.long(), targets.sum(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # labels without records
            value: Tensor = getattr(classification, function)(
                predictions, targets, num_labels=targets.shape[1], average=average, validate_args=False
            )
        return float(value if average else value[(count > 0) & (count < len(targets))].mean())

    return compute


SEVERAL = {
    "f1_micro": Measure("F1 of all labels together", compute=_of_labels("multilabel_f1_score", "micro")),
    "f1": Measure("F1, mean over labels", compute=_of_labels("multilabel_f1_score", "macro")),
    "auroc": Measure("area under the ROC curve, mean over labels", compute=_of_labels("multilabel_auroc", None)),
    "average_precision": Measure(
        "average precision, mean over labels", compute=_of_labels("multilabel_average_precision", None)
    ),
}


class Tally:
    """What an evaluation has seen so far, fed batch by batch."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.sums: defaultdict[str, float] = defaultdict(int)
        self.samples = 0
        self.collected: list[tuple[Tensor, Tensor]] = []

    def add(self, scores: Tensor, targets: Tensor) -> None:
        """Count a batch: scores [N, ..., K] and the targets [N, ...] that they are for."""
        # Sums over many records must not hang on how they are cut into batches.
        losses = self.objective.losses(scores, targets).double()
        for key, value in self.objective.measure(scores, targets, losses).items():
            self.sums[key] += value
        self.samples += len(scores)
        if any(measure.compute for measure in self.objective.measures.values()):
            # Off the device: these stay until the evaluation is over.
            self.collected.append((self.objective.predictions(scores).float().cpu(), targets.cpu()))

    def metrics(self) -> dict[str, float]:
        """The objective's `metrics`, and those of its measures that the records define."""
        found = self.objective.metrics(self.sums, self.samples)
        more = self.objective.further(self.sums, self.samples)
        # Scores that are no numbers have no order; torchmetrics would rank them all the same.
        if self.collected and not (together := self._together())[0].isnan().any():
            more |= {key: it.compute(*together) for key, it in self.objective.measures.items() if it.compute}
        return found | {key: value for key, value in more.items() if math.isfinite(value)}

    def by_class(self, names: list[str]) -> dict[str, Any]:
        """`by_class` of what was collected, with the names of the classes; empty where there is none, or too many."""
        if not (self.collected and self.objective.classes and len(names) <= MOST_CLASSES):
            return {}
        return {"names": names, **by_class(*self._together())}

    def _together(self) -> tuple[Tensor, Tensor]:
        predictions, targets = zip(*self.collected, strict=True)
        return torch.cat(predictions), torch.cat(targets)
