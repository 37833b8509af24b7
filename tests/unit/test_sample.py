"""The sample of a product is fixed, small, and has every value."""

from __future__ import annotations

from support.sample import every, few, sampled


def kept(cases):
    return [case.values for case in cases if not case.marks]


def test_a_sample_has_every_value_and_is_small():
    axes = ["abcdefgh", range(5), ("x", "y")]
    for keep in (1, 2):
        cases, sample = sampled(*axes, keep=keep), kept(sampled(*axes, keep=keep))
        assert len(cases) == 80 and 8 * keep <= len(sample) <= 15 * keep
        for axis, values in enumerate(axes):
            assert all(sum(case[axis] == value for case in sample) >= keep for value in values)
    assert kept(sampled(*axes)) == kept(sampled(*axes))


def test_one_axis_is_whole_and_few_are_those_named():
    assert kept(sampled("abc")) == [("a",), ("b",), ("c",)]
    assert kept(few("abc", "b")) == [("b",)] and len(few("abc", "b")) == 3


def test_every_third_of_a_list():
    cases = [(number, -number) for number in range(10)]
    assert len(every(3, cases)) == 10 and len(kept(every(3, cases))) == 4
    assert kept(every(3, cases)) == kept(every(3, cases)) and {*kept(every(3, cases))} == {*kept(every(3, cases[::-1]))}
    assert kept(every(1, cases)) == cases and len(kept(every(20, cases))) == 1
