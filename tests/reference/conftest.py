"""What the tests of this folder share: helper modules (by import; dense.py as a fixture) and models."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("per_sample")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "unit")]


@pytest.fixture(scope="session")
def dense():
    """The module dense.py."""
    name = "tests_reference_dense"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("dense.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder(kind)`: the checkpoint of a small model, made once."""
    import small_models as small

    root = tmp_path_factory.mktemp("models")
    return cache(lambda kind: small.save(kind, root / kind))


@pytest.fixture(scope="module")
def model(folder):
    """`model(kind, method, scale)`: random adapter values, float64, evaluation mode (so no dropout).

    The same object for the same arguments: do not change it. Gradients are far above and far
    below the clip of dp_steps.
    """
    import small_models as small
    from per_sample import as_double

    @cache
    def make(kind, method="lora", scale=0.3):
        made = small.adapted(folder(kind), kind, method=method)
        made.write(small.randomised(made, scale=scale))
        return as_double(made)

    return make


@pytest.fixture(scope="module")
def build(folder):
    """`build(kind, method)`: a small model, float64 and without dropout; the same object for the same arguments."""
    import small_models as small

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
    from dp_steps import Line, Setup

    one = Line()
    return Setup(one, one.parameters_)
