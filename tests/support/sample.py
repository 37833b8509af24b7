"""Products of cases that are too large for every `make test`: a fixed sample there, all of them in `make full`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def sampled(*axes: Iterable[Any], keep: int = 1) -> list[Any]:
    """The product of the axes as parameters, of which all but a sample are marked `full`.

    For each value of each axis the sample holds the `keep` combinations with it whose text has the smallest sha256. So
    every value is tested in `make test`, and the sample is the same on every machine. A new value brings `keep`
    combinations with it, and takes another's place only with a combination of that other value and itself.
    """
    axes = tuple([*axis] for axis in axes)
    cases = sorted(product(*axes), key=lambda case: hashlib.sha256(repr(case).encode()).hexdigest())
    taken = set()
    for axis, values in enumerate(axes):
        for value in values:
            taken |= {repr(case) for case in [case for case in cases if case[axis] == value][:keep]}
    return [param(case, repr(case) in taken) for case in product(*axes)]


def few(cases: Iterable[Any], always: Iterable[Any]) -> list[Any]:
    """The cases as parameters, of which all but those named are marked `full`."""
    cases, always = [*cases], [*always]
    unknown = [case for case in always if case not in cases]
    assert not unknown, f"{unknown} are named as a sample of cases that do not have them"
    return [param(case, case in always) for case in cases]


def param(case: Any, taken: bool) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=() if taken else pytest.mark.full)
