"""Labels that are numbers, or several names of a record: what a column is read to, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from fedpeft.config import DataConfig
from fedpeft.data import answers, columns, source, tagged
from fedpeft.data.cache import Cache
from fedpeft.data.records import Records
from fedpeft.data.tables import Table
from fedpeft.errors import InputError


def table(values, **names):
    return Table({"label": list(values)}, "a.csv", names=names)


def read(kind, values, separator=None, **names):
    return answers.read(kind, table(values, **names), "label", separator)


@pytest.mark.parametrize(
    ("values", "separator", "expected"),
    [
        ([3, 1, 2], None, [[3], [1], [2]]),  # whole numbers, which are no classes
        (["3", "-1e2", " 2.5 "], None, [[3], [-100], [2.5]]),
        ([[1, 2.5], (3, 4)], None, [[1, 2.5], [3, 4]]),
        (["1; 2", "3;4"], ";", [[1, 2], [3, 4]]),
        ([np.float64(0.5), np.int64(2)], None, [[0.5], [2]]),
    ],
)
def test_numbers_stay_numbers(values, separator, expected):
    targets, names, notes = read("numbers", values, separator)
    assert targets.dtype == np.float32 and targets.tolist() == expected and not notes
    assert names == (["label"] if len(expected[0]) == 1 else ["label-0", "label-1"])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1, "two"], "record 2 has no number, but 'two'"),
        ([1, "2,5"], "record 2 .* decimal comma"),
        ([None, 1], "record 1 has no number, but None"),
        ([1, float("nan")], "record 2 has no number, but nan"),
        ([1, 1e300], "record 2 has no number, but 1e"),
        ([1, True], "record 2 has no number, but True"),
        ([[1, 2], [3]], "record 2 has 1 numbers, and the first has 2"),
        ([[], []], "record 1 has 0 numbers"),
    ],
)
def test_what_is_no_number_is_refused_by_record(values, said):
    with pytest.raises(InputError, match=rf"a\.csv: column label: {said}"):
        read("numbers", values)


def test_one_number_in_all_records_is_said():
    assert "same number in every record" in str(read("numbers", [2, 2])[2][0])


@pytest.mark.parametrize(
    ("values", "separator", "names", "expected"),
    [
        ([["b", "a"], [], ["b"]], None, ["a", "b"], [[1, 1], [0, 0], [0, 1]]),
        (["b; a", "", "b"], ";", ["a", "b"], [[1, 1], [0, 0], [0, 1]]),
        ([[10, 9], [9]], None, ["9", "10"], [[1, 1], [1, 0]]),
        ([["b", "b"], ["c"]], None, ["b", "c"], [[1, 0], [0, 1]]),
    ],
)
def test_several_names(values, separator, names, expected):
    targets, found, _ = read("several", values, separator)
    assert found == names and targets.dtype == bool and targets.astype(int).tolist() == expected


@pytest.mark.parametrize(
    "names", [["10", "9", "-3", "0"], ["10", "9", "007"], ["10", "9", "-0"], ["10", "9", "٣"], ["b", "10", "9"]]
)
def test_several_names_stand_in_the_order_of_those_that_are_classes(names):
    _, classes, _ = columns.labels(table(names), "label")
    assert read("several", [[name] for name in names])[1] == classes
    assert (classes == sorted(names)) == (names != ["10", "9", "-3", "0"])
    texts = Table({"tokens": [["a"] * len(names)], "tags": [names]}, "a.json")
    assert tagged.read(texts, DataConfig()).label_names == classes


def test_numbers_of_known_names():
    targets, found, _ = read("several", [[1], [0, 1]], label=["no", "yes"])
    assert found == ["no", "yes"] and targets.tolist() == [[False, True], [True, True]]


@pytest.mark.parametrize(
    ("values", "separator", "said"),
    [
        (["a;b"], None, "record 1 has the text 'a;b', .*data.label_separator"),
        (["a;;b"], ";", "record 1 has '' among its labels"),
        ([["a"], [{"b": 1}]], None, "record 2 has .* among its labels"),
        ([["a"], None], None, "record 2 has None among its labels"),
        ([[], []], None, "has 0 different labels"),
    ],
)
def test_what_is_no_list_of_names_is_refused(values, separator, said):
    with pytest.raises(InputError, match=rf"a\.csv: column label:? {said}"):
        read("several", values, separator)


def records(targets, names):
    count = len(targets)
    return Records(["text"] * count, np.zeros(count, np.int64), names, {}, "text", targets=np.array(targets))


def test_names_are_matched_and_numbers_keep_their_place():
    some = records([[True, False], [True, False]], ["b", "z"])
    assert answers.align(some, ["a", "b"], "test set", "it").targets.tolist() == [[False, True], [False, True]]
    with pytest.raises(InputError, match="the labels 'b' are not in it, which has a, c"):
        answers.align(some, ["a", "c"], "test set", "it")
    numbers = records([[0.5, 1.0]], ["x", "y"])
    assert answers.align(numbers, ["a", "b"], "test set", "it").label_names == ["a", "b"]
    with pytest.raises(InputError, match="have 2 numbers each, and it has 1: a"):
        answers.align(numbers, ["a"], "test set", "it")


def test_targets_go_with_their_records_and_through_the_cache(tmp_path):
    rows = [{"text": f"text {n}", "label": n} for n in range(20)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(source=str(path), test_fraction=0.25)
    plain = source.load(config, "regression", 0)
    for cached in (source.load(config, "regression", 0, Cache(tmp_path / "cache", least=0)) for _ in range(2)):
        for one, other in zip(plain, cached, strict=True):
            assert one.targets[:, 0].tolist() == [float(text.split()[1]) for text in one.inputs]
            assert np.array_equal(one.targets, other.targets) and one.fingerprint == other.fingerprint
    assert not plain[0].labels.any() and plain[0].label_names == ["label"]
    other = replace(plain[0], targets=plain[0].targets + 1)
    assert other.fingerprint != plain[0].fingerprint
