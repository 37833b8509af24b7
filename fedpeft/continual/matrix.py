"""All metrics of a continual run from its matrix of right answers: one name, one formula.

R[i,j] = right[i,j] / tests[j] is the accuracy on task j after task i. "Seen" after task i are the tasks 0..i.

    acc_micro            right answers on all tasks after the last one, over all test records
    acc_macro            mean_j R[T-1,j]
    aia_micro, aia_macro mean over i of the micro (macro) accuracy on the tasks seen after i
    learning_acc         mean_j R[j,j]: how well each task was learned, before anything could be forgotten
    bwt                  mean_{j<T-1} (R[T-1,j] - R[j,j])
    fwt                  mean_{j>=1} (R[j-1,j] - b_j),  b_j the accuracy before the first task
    forgetting_chaudhry  mean_{j<T-1} (max_{l<T-1} R[l,j] - R[T-1,j]); below 0 where the last task helped
    forgetting_ge0       the same with the last row in the maximum, so never below 0
    forgetting_avalanche mean_{j<T-1} (R[j,j] - R[T-1,j]) = -bwt
    forgetting_fed_mammoth   the same sum over all T tasks, divided by T: smaller by (T-1)/T
    a_auc                for streams without boundaries: accuracy on what was seen, averaged over the records trained on

Tools call different ones by one name. "Accuracy": PILOT, CoSO and Avalanche's stream accuracy acc_micro, Mammoth
acc_macro, ConPET both. "Average accuracy" of most papers on pre-trained models: aia_micro. "Forgetting": Chaudhry et
al. (arXiv 1801.10112) forgetting_chaudhry, Mammoth and PILOT forgetting_ge0, Avalanche and fed-mammoth their own.
"BWT": of Mammoth bwt; of Avalanche bwt too, as the negative of its forgetting. a_auc is that of i-Blurry (arXiv
2110.10031).

    >>> result = summary([[8, 0], [4, 20]], tests=[10, 20])
    >>> result["values"]["acc_micro"], result["values"]["acc_macro"], result["values"]["bwt"]
    (0.8, 0.7, -0.4)
    >>> result["undefined"]["fwt"]
    'the accuracy before the first task was not measured'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedpeft.errors import InputError

ONE_TASK = "a stream of one task has nothing to forget"
NO_TASKS = "a stream without boundaries has no tasks to compare"


def summary(
    right: Sequence[Sequence[int]] | np.ndarray,
    tests: Sequence[int] | np.ndarray,
    initial: Sequence[int] | None = None,
    records: Sequence[int] | None = None,
) -> dict[str, Any]:
    """All metrics, as fractions; JSON-ready.

    Args:
        right: right answers [T, T], row i after task i.
        tests: test records of each task [T]; 0 where a part of a stream brought no new class.
        initial: right answers [T] before the first task. Leave it out where classes never seen cannot be answered
            (class and task streams): forward transfer means nothing there.
        records: training records of each part [T], for streams without boundaries only.

    Returns:
        {"values": name -> number or None, "undefined": name -> why it is None}, all names of `NAMES`.

    Raises:
        InputError: shapes that do not fit, or more right answers than test records.
    """
    R = _Matrix(right, tests, initial, records)
    values: dict[str, float | None] = {}
    undefined: dict[str, str] = {}
    for name, formula in FORMULAS.items():
        reason = R.missing(name)
        values[name] = None if reason else float(formula(R))
        if reason:
            undefined[name] = reason
    return {"values": values, "undefined": undefined}


def accuracy_matrix(right: Sequence[Sequence[int]] | np.ndarray, tests: Sequence[int] | np.ndarray) -> np.ndarray:
    """R [T, T], float64; nan where a task has no test records."""
    return _Matrix(right, tests).R


def accuracy_curve(right: Sequence[Sequence[int]] | np.ndarray, tests: Sequence[int] | np.ndarray) -> np.ndarray:
    """Micro accuracy [T] on the tasks seen, after each task; nan before the first test record."""
    return _Matrix(right, tests).micro


class _Matrix:
    """The checked input, and what several formulas share."""

    def __init__(self, right: Any, tests: Any, initial: Any = None, records: Any = None) -> None:
        counts, self.tests = np.array(right, dtype=np.int64), np.array(tests, dtype=np.int64)
        self.T = len(self.tests)
        if self.T == 0 or counts.shape != (self.T, self.T):
            raise InputError(
                f"matrix: right answers are {list(counts.shape)}; {self.T} tasks make [{self.T}, "
                f"{self.T}], and there must be one."
            )
        self._require_counts("right answers", counts)
        self.initial, self.records = self._metric_row("initial", initial), self._metric_row("records", records)
        if self.initial is not None:
            self._require_counts("initial", self.initial)
        # 0 / 0 of a task without test records is the NaN that it should be.
        with np.errstate(invalid="ignore"):
            self.R: np.ndarray = counts / self.tests
            self.before = None if self.initial is None else self.initial / self.tests
            seen = np.tril(np.ones((self.T, self.T), dtype=np.int64))
            self.micro: np.ndarray = (counts * seen).sum(1) / np.cumsum(self.tests)
        self.diagonal, self.last = self.R.diagonal(), self.R[-1]

    def _require_counts(self, what: str, counts: np.ndarray) -> None:
        if (counts < 0).any() or (counts > self.tests).any():
            raise InputError(
                f"matrix: {what} must lie between 0 and the test records of the task, "
                f"{self.tests.tolist()}; got {counts.tolist()}."
            )

    def _metric_row(self, what: str, given: Any) -> np.ndarray | None:
        if given is None:
            return None
        row = np.array(given, dtype=np.int64)
        if row.shape != (self.T,):
            raise InputError(f"matrix: {what} is {list(row.shape)}, there are {self.T} tasks.")
        return row

    def missing(self, name: str) -> str | None:
        """Why a metric is undefined, None where it is not."""
        free = self.records is not None
        if name == "a_auc":
            return self._untested_start() if free else "the stream has boundaries; use aia_micro"
        if name == "acc_micro":
            return None if self.tests.sum() else "no test records"
        if name == "aia_micro":
            return self._untested_start()
        if free and name not in ("acc_macro", "aia_macro"):
            return NO_TASKS
        if not self.tests.all():
            return f"task {int(np.argmin(self.tests))} has no test records"
        if self.T == 1 and (name.startswith("forgetting") or name in ("bwt", "fwt")):
            return ONE_TASK
        if name == "fwt" and self.before is None:
            return "the accuracy before the first task was not measured"
        return None

    def _untested_start(self) -> str | None:
        return None if self.tests[0] else "the first task has no test records"


def _forward_transfer(m: _Matrix) -> Any:
    assert m.before is not None
    return (m.R.diagonal(offset=1) - m.before[1:]).mean()


FORMULAS: dict[str, Callable[[_Matrix], Any]] = {
    "acc_micro": lambda m: m.micro[-1],
    "acc_macro": lambda m: m.last.mean(),
    "aia_micro": lambda m: m.micro.mean(),
    "aia_macro": lambda m: np.mean([m.R[i, : i + 1].mean() for i in range(m.T)]),
    "learning_acc": lambda m: m.diagonal.mean(),
    "bwt": lambda m: (m.last - m.diagonal)[:-1].mean(),
    "fwt": _forward_transfer,
    "forgetting_chaudhry": lambda m: (m.R[:-1].max(0) - m.last)[:-1].mean(),
    "forgetting_ge0": lambda m: (m.R.max(0) - m.last)[:-1].mean(),
    "forgetting_avalanche": lambda m: (m.diagonal - m.last)[:-1].mean(),
    "forgetting_fed_mammoth": lambda m: (m.diagonal - m.last).mean(),
    "a_auc": lambda m: np.average(m.micro, weights=m.records),
}
NAMES = tuple(FORMULAS)
