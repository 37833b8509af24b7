"""The sample of a product is fixed, small, has every value, and hardly changes with a new one."""

from __future__ import annotations

import pytest

from support.sample import few, sampled

AXES = ["abcdefgh", range(5), ("x", "y")]


def kept(cases):
    return [case.values for case in cases if not case.marks]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_sample_has_every_value_and_is_small(keep):
    cases, sample = sampled(*AXES, keep=keep), kept(sampled(*AXES, keep=keep))
    assert len(cases) == 80 and 8 * keep <= len(sample) <= 15 * keep
    for axis, values in enumerate(AXES):
        assert all(sum(case[axis] == value for case in sample) >= keep for value in values)
    assert kept(sampled(*AXES, keep=keep)) == sample
    assert {*kept(sampled(*(axis[::-1] for axis in AXES), keep=keep))} == {*sample}, "whatever the order"


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("axis, value", [(axis, value) for axis, values in enumerate(AXES) for value in values])
def test_a_new_value_changes_the_sample_by_its_own_combinations_only(axis, value, keep):
    before = [[one for one in values if (place, one) != (axis, value)] for place, values in enumerate(AXES)]
    old, new = ({*kept(sampled(*axes, keep=keep))} for axes in (before, AXES))
    assert new - old == {case for case in new if case[axis] == value} != set()
    others = sum(map(len, before)) - len(before[axis])  # values whose place a combination with the new one may take
    assert len(old - new) <= keep * others


def test_one_axis_is_whole_and_few_are_those_named():
    assert kept(sampled("abc")) == [("a",), ("b",), ("c",)]
    assert kept(few("abc", "b")) == [("b",)] and len(few("abc", "b")) == 3
    with pytest.raises(AssertionError, match=r"\['d'\] are named"):
        few("abc", "bd")
