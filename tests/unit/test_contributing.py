"""CONTRIBUTING's walk-through builds a body that learns, pulls back, resumes exactly and needs no other line."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from fedpeft import registry
from fedpeft.cli import catalogue
from fedpeft.registry import TABLES
from support import continual_parts as parts

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()


@pytest.fixture
def l2_pull(tmp_path, monkeypatch):
    """The body of the text, registered by the line of the text, from a file of its own."""
    [code] = re.findall(r"<!-- this file is built and run by the tests -->\n```python\n(.*?)```", TEXT, re.S)
    [(name, target)] = re.findall(r'`"(\w+)": "(fedpeft\.continual\.bodies\.l2_pull:\w+)"`', TEXT)
    module = target.partition(":")[0]
    path = tmp_path / "l2_pull.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module, loaded)
    spec.loader.exec_module(loaded)
    monkeypatch.setitem(TABLES["bodies"], name, target)
    registry.table.cache_clear()
    yield name
    registry.table.cache_clear()


def moved(learner):
    return sum(float(value.detach().square().sum()) for value in learner.body.parameters.values())


def test_it_pulls_back_and_resumes_bit_for_bit(l2_pull):
    first = parts.learner(l2_pull, ("linear", "lda"))
    first.run(stop=first_task_steps(first))
    after_one = {key: value.detach().clone() for key, value in first.body.parameters.items()}
    free, held = (parts.learner(l2_pull, ("linear",), options={"lam": lam}).run() for lam in (0.0, 1e4))
    distance = {
        lam: sum(float((value.detach() - after_one[key]).square().sum()) for key, value in made.body.parameters.items())
        for lam, made in ((0, free), (1, held))
    }
    assert moved(held) > 0 and distance[1] < 0.2 * distance[0]
    whole = parts.learner(l2_pull, ("linear", "lda")).run()
    half = parts.learner(l2_pull, ("linear", "lda"))
    half.run(stop=first_task_steps(half) + 2)
    rest = parts.loaded(parts.learner(l2_pull, ("linear", "lda")), parts.saved(half)).run()
    assert not parts.difference(whole.state(), rest.state())


def test_without_the_pull_it_is_sequential_fine_tuning(l2_pull):
    free = parts.learner(l2_pull, ("linear",), options={"lam": 0.0}).run()
    plain = parts.learner("sequential", ("linear",)).run()
    assert all(torch.equal(value, plain.body.parameters[key]) for key, value in free.body.parameters.items())


def test_the_command_line_shows_it(l2_pull):
    shown = catalogue.describe(l2_pull)
    assert shown["table"] == "bodies" and shown["summary"].startswith("Full weights, pulled back")


def first_task_steps(learner):
    train = learner.train
    return train.epochs * -(-len(learner.stream.tasks[0].train) // train.batch_size)
