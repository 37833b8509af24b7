"""Metrics against a 3x3 matrix worked out by hand: unbalanced tests, one column that falls and one that improves."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from fedpeft.continual import matrix
from fedpeft.errors import InputError

# R = .9          task 0 falls to .5, then .4
#     .5 .6       task 1 improves to .8
#     .4 .8 .75
TESTS = [10, 20, 40]
RIGHT = [[9, 2, 0], [5, 12, 10], [4, 16, 30]]
INITIAL = [1, 4, 8]

BY_HAND = {
    "acc_micro": 50 / 70,
    "acc_macro": (0.4 + 0.8 + 0.75) / 3,
    "aia_micro": (9 / 10 + 17 / 30 + 50 / 70) / 3,
    "aia_macro": (0.9 + 0.55 + 0.65) / 3,
    "learning_acc": (0.9 + 0.6 + 0.75) / 3,
    "bwt": (-0.5 + 0.2) / 2,
    "fwt": ((0.1 - 0.2) + (0.25 - 0.2)) / 2,
    "forgetting_chaudhry": ((0.9 - 0.4) + (0.6 - 0.8)) / 2,
    "forgetting_ge0": (0.5 + 0.0) / 2,
    "forgetting_avalanche": (0.5 - 0.2) / 2,
    "forgetting_fed_mammoth": (0.5 - 0.2 + 0.0) / 3,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    result = matrix.summary(RIGHT, TESTS, INITIAL)
    assert result["values"][name] == pytest.approx(BY_HAND[name], abs=1e-12)


def test_every_metric_has_a_value_by_hand_or_a_reason():
    result = matrix.summary(RIGHT, TESTS, INITIAL)
    assert set(result["values"]) == set(matrix.NAMES) == {*BY_HAND, "a_auc"}
    assert result["undefined"] == {"a_auc": "the stream has boundaries; use aia_micro"}
    assert json.loads(json.dumps(result)) == result


def test_without_the_accuracies_before_there_is_no_forward_transfer():
    result = matrix.summary(RIGHT, TESTS)
    assert result["values"]["fwt"] is None and "before the first task" in result["undefined"]["fwt"]
    assert result["values"]["bwt"] == pytest.approx(BY_HAND["bwt"])


def test_one_task_has_accuracy_and_nothing_to_forget():
    result = matrix.summary([[3]], [4])
    assert result["values"]["acc_micro"] == result["values"]["aia_macro"] == 0.75
    for name in ("bwt", "forgetting_chaudhry", "forgetting_ge0", "forgetting_avalanche", "forgetting_fed_mammoth"):
        assert result["values"][name] is None and result["undefined"][name] == matrix.ONE_TASK


def test_best_accuracy_of_chaudhry_is_over_all_rows_but_the_last():
    """Task 0: .5, .9, .7. The best row is neither the first nor the last."""
    result = matrix.summary([[5, 0, 0], [9, 5, 0], [7, 5, 5]], [10, 10, 10])["values"]
    assert result["forgetting_chaudhry"] == pytest.approx((0.2 + 0.0) / 2)
    assert result["forgetting_avalanche"] == pytest.approx((-0.2 + 0.0) / 2)


def test_stream_without_boundaries():
    """Accuracy on what was seen: .9, 14/30, 20/30 after 10, 10 and 30 records; part 1 of the second run is untested."""
    result = matrix.summary([[9, 0, 0], [4, 10, 0], [4, 6, 0]], [10, 20, 0], records=[10, 10, 30])
    assert result["values"]["a_auc"] == pytest.approx((0.9 * 10 + 14 / 30 * 10 + 10 / 30 * 30) / 50)
    assert result["values"]["aia_micro"] == pytest.approx((0.9 + 14 / 30 + 10 / 30) / 3)
    for name in ("bwt", "learning_acc", "forgetting_ge0"):
        assert result["undefined"][name] == matrix.NO_TASKS
    assert result["undefined"]["acc_macro"] == "task 2 has no test records"
    assert matrix.summary([[0, 0], [0, 1]], [0, 2], records=[1, 1])["undefined"]["a_auc"]


def test_input_is_left_as_it_was():
    right, tests, initial = copy.deepcopy(RIGHT), np.array(TESTS), list(INITIAL)
    array = np.array(RIGHT, dtype=np.int64)
    matrix.summary(right, tests, initial)
    matrix.summary(array, tests, initial)
    matrix.accuracy_curve(array, tests)
    assert right == RIGHT and array.tolist() == RIGHT and tests.tolist() == TESTS and initial == INITIAL


def test_curve_and_accuracies():
    assert matrix.accuracy_curve(RIGHT, TESTS).tolist() == pytest.approx([0.9, 17 / 30, 50 / 70])
    assert matrix.accuracy_matrix(RIGHT, TESTS)[1].tolist() == pytest.approx([0.5, 0.6, 0.25])


@pytest.mark.parametrize(
    ("right", "tests", "more", "said"),
    [
        ([[1, 2]], [3, 3], {}, r"\[1, 2\]"),
        ([], [], {}, "must be one"),
        ([[4]], [3], {}, "between 0 and the test records"),
        ([[-1]], [3], {}, "between 0 and the test records"),
        ([[1]], [3], {"initial": [4]}, "initial"),
        ([[1]], [3], {"initial": [1, 1]}, "initial"),
        ([[1]], [3], {"records": [1, 1]}, "records"),
    ],
)
def test_what_does_not_fit_is_refused(right, tests, more, said):
    with pytest.raises(InputError, match=said):
        matrix.summary(right, tests, **more)
