"""Models that the tests of this folder share."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from support import small_models as small
from support.dp_steps import Line, Setup
from support.per_sample import as_double


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder(kind)`: the checkpoint of a small model, made once."""
    root = tmp_path_factory.mktemp("models")
    return cache(lambda kind: small.save(kind, root / kind))


@pytest.fixture(scope="module")
def model(folder):
    """`model(kind, method, scale)`: random adapter values, float64, evaluation mode (so no dropout).

    The same object for the same arguments: do not change it. Gradients are far above and far
    below the clip of dp_steps.
    """

    @cache
    def make(kind, method="lora", scale=0.3):
        made = small.adapted(folder(kind), kind, method=method)
        made.write(small.randomised(made, scale=scale))
        return as_double(made)

    return make


@pytest.fixture(scope="module")
def build(folder):
    """`build(kind, method)`: a small model, float64 and without dropout; the same object for the same arguments."""
    made = {}

    def get(kind="bert", method="lora", dtype=torch.float64):
        if (kind, method, dtype) not in made:
            model = small.adapted(folder(kind), kind, method=method, r=4)
            model.base.backbone.to(dtype)
            model.training_mode = lambda: None
            made[kind, method, dtype] = model
        return made[kind, method, dtype]

    return get


@pytest.fixture(scope="module")
def line():
    """A cheap model to take hundreds of steps on."""
    one = Line()
    return Setup(one, one.parameters_)
