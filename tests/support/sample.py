"""Products of cases that are too large for every `make test`: a fixed sample there, all of them in `make full`."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def sampled(*axes: Iterable[Any], keep: int = 1) -> list[Any]:
    """The product of the axes as parameters, of which all but a sample are marked `full`.

    Combinations are looked at in the order of the sha256 of their text, and taken into the sample while one of their
    values is in fewer than `keep` of those taken. So every value of every axis is tested in `make test`, the sample is
    the same on every machine, and a new value brings one combination and moves no other out of those before it.
    """
    cases = list(product(*axes))
    seen: Counter[tuple[int, str]] = Counter()
    taken = set()
    for case in sorted(cases, key=lambda case: hashlib.sha256(repr(case).encode()).hexdigest()):
        values = [(axis, repr(value)) for axis, value in enumerate(case)]
        if any(seen[value] < keep for value in values):
            taken.add(repr(case))
            seen.update(values)
    return [param(case, repr(case) in taken) for case in cases]


def every(step: int, cases: Iterable[Any]) -> list[Any]:
    """Like cases as parameters, of which all but every `step`-th, in the order of their sha256, are marked `full`."""
    cases = list(cases)
    taken = set(sorted(map(repr, cases), key=lambda text: hashlib.sha256(text.encode()).hexdigest())[::step])
    return [param(case, repr(case) in taken) for case in cases]


def few(cases: Iterable[Any], always: Iterable[Any]) -> list[Any]:
    """The cases as parameters, of which all but those named are marked `full`."""
    always = [*always]
    return [param(case, case in always) for case in cases]


def param(case: Any, taken: bool) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=() if taken else pytest.mark.full)
