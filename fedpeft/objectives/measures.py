"""What an evaluation says beside accuracy and loss: each objective names its own, from tables like `CLASSES`.

Of N records and K classes (or labels), with p the probabilities [N, K] and a class k against all others:

    F1_k      2 |right k| / (|answered k| + |is k|)
    AUROC_k   the share of pairs of a record of k and another in which p_k is higher for the first; a tie counts half
    AP_k      the mean, over the records of k, of how many of those with a p_k at least as high are of k
    ECE       sum over 15 bins of the highest p, of how far its mean is from the share of right answers, times the share
              of records; a p of exactly 1 has a bin of its own

which are torchmetrics' and scikit-learn's numbers (a test holds them equal) without either, as both cost most of a
second to import, before the first round of every run. Sums are in float64.

Predictions are collected batch by batch, 4 bytes for each record and class, so measures are for objectives with few
scores a record; what a language model is measured by follows from sums (`Objective.measure`), and nothing is kept.

    >>> scores = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
    >>> round(CLASSES["f1"].compute(scores.softmax(1), torch.tensor([0, 0, 1])), 3)
    0.667
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from fedpeft.objectives.base import Objective

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


Curve = Callable[[Tensor, Tensor], Tensor]  # p [N, K], who is of each class [N, K] -> a number for each class [K]


def _auroc(predictions: Tensor, positive: Tensor) -> Tensor:
    columns, mine = predictions.T.contiguous(), positive.T.double()
    ordered = columns.sort().values
    # Twice the mean rank of those that tie: the sum of ranks counts the pairs (Mann and Whitney 1947).
    ranks = (torch.searchsorted(ordered, columns) + torch.searchsorted(ordered, columns, right=True) + 1).double()
    count = mine.sum(1)
    won = (ranks / 2 * mine).sum(1) - count * (count + 1) / 2
    return won / (count * (len(predictions) - count))


def _average_precision(predictions: Tensor, positive: Tensor) -> Tensor:
    columns, mine = predictions.T.contiguous(), positive.T
    ordered, order = columns.sort(descending=True)
    of_class = mine.gather(1, order).cumsum(1)
    # How many are at least as high, those that tie among them.
    reached = len(predictions) - torch.searchsorted(ordered.flip(1), columns)
    precision = of_class.gather(1, (reached - 1).clamp(min=0)).double() / reached
    return (precision * mine).sum(1) / mine.sum(1)


def _mean_where_defined(curve: Curve, predictions: Tensor, positive: Tensor) -> float:
    """The mean over classes but those that none or all of the records have; NaN without any, or with a p that is."""
    if predictions.isnan().any():
        return math.nan
    count = positive.sum(0)
    return float(curve(predictions, positive)[(count > 0) & (count < len(positive))].mean())


def _one_against_the_rest(curve: Curve) -> Callable[[Tensor, Tensor], float]:
    def compute(predictions: Tensor, targets: Tensor) -> float:
        return _mean_where_defined(curve, predictions, F.one_hot(targets, predictions.shape[1]).bool())

    return compute


def _f1(right: Tensor, answered: Tensor, there: Tensor) -> Tensor:
    """0 where a class was neither there nor answered."""
    return 2 * right.double() / (answered + there).clamp(min=1)


def _f1_of_classes(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """F1 of each class, and whether it was there or answered."""
    answers, count = predictions.argmax(1), predictions.shape[1]
    right, answered, there = (
        kind.bincount(minlength=count) for kind in (targets[answers == targets], answers, targets)
    )
    return _f1(right, answered, there), answered + there > 0


def _macro_f1(predictions: Tensor, targets: Tensor) -> float:
    each, defined = _f1_of_classes(predictions, targets)
    return float(each[defined].mean())


def _calibration_error(predictions: Tensor, targets: Tensor) -> float:
    confidence, answers = predictions.max(1)
    inside = torch.bucketize(confidence, torch.linspace(0, 1, ECE_BINS + 1), right=True)
    off = torch.zeros(ECE_BINS + 2, dtype=torch.float64)
    # Means times counts are sums.
    off.index_add_(0, inside, (answers == targets).double() - confidence.double())
    return float(off.abs().sum() / len(targets))


def by_class(predictions: Tensor, targets: Tensor) -> dict[str, Any]:
    """F1 of each class, and the confusion matrix: a row for each true class, a column for each answer; JSON-ready."""
    count = predictions.shape[1]
    confusion = (targets * count + predictions.argmax(1)).bincount(minlength=count**2).view(count, count)
    return {"f1": _f1_of_classes(predictions, targets)[0].tolist(), "confusion": confusion.tolist()}


PLAIN = {"accuracy": Measure("accuracy"), "loss": Measure("loss", higher=False, share=False)}
CLASSES = {
    "f1": Measure("F1, mean over classes", compute=_macro_f1),
    "auroc": Measure("area under the ROC curve, each class against the rest", compute=_one_against_the_rest(_auroc)),
    "average_precision": Measure(
        "average precision, each class against the rest",
        compute=_one_against_the_rest(_average_precision),
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
    return float((1 - missed / spread)[spread > 0].mean())


NUMBERS = {
    "rmse": Measure("root mean squared error", higher=False, share=False, compute=_root_mean_squared_error),
    "mae": Measure("mean absolute error", higher=False, share=False, compute=_mean_absolute_error),
    "r2": Measure("coefficient of determination (R2), mean over numbers", share=False, compute=_r_squared),
}


def _of_labels(curve: Curve) -> Callable[[Tensor, Tensor], float]:
    def compute(predictions: Tensor, targets: Tensor) -> float:
        return _mean_where_defined(curve, predictions, targets.long() == 1)

    return compute


def _f1_of_labels(dim: int | None) -> Callable[[Tensor, Tensor], float]:
    """Of each label, then their mean; or, without a dimension, of all of them together."""

    def compute(predictions: Tensor, targets: Tensor) -> float:
        answers, there = predictions > 0.5, targets.long() == 1
        return float(_f1((answers & there).sum(dim), answers.sum(dim), there.sum(dim)).mean())

    return compute


SEVERAL = {
    "f1_micro": Measure("F1 of all labels together", compute=_f1_of_labels(None)),
    "f1": Measure("F1, mean over labels", compute=_f1_of_labels(0)),
    "auroc": Measure("area under the ROC curve, mean over labels", compute=_of_labels(_auroc)),
    "average_precision": Measure("average precision, mean over labels", compute=_of_labels(_average_precision)),
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
            self.collected.append((self.objective.predictions(scores).float().cpu(), targets.cpu()))

    def metrics(self) -> dict[str, float]:
        """The objective's `metrics`, and those of its measures that the records define."""
        found = self.objective.metrics(self.sums, self.samples)
        more = self.objective.further(self.sums, self.samples)
        if self.collected:
            together = self._together()
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
