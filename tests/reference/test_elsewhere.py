"""Training, scores and whole rounds on a device that is not the CPU, without one: nothing is left behind on the CPU.

The device (`elsewhere.py`) computes on the CPU, so results are equal to the last bit; what these tests find is tensors
on two devices in one operation.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import current_thread, main_thread

import pytest
import torch

from fedpeft.clients.cohort.chunk import Chunk
from fedpeft.clients.cohort.engine import train_cohort
from fedpeft.clients.train import evaluate
from support import small_models as small
from support.cohort_jobs import ADAMW, EPOCHS, UNEVEN, WIDE, make_jobs, one_by_one, private, records
from support.elsewhere import ELSEWHERE, There, elsewhere

KINDS = ["bert", "roberta", "vit", "llama"]


def test_the_device_is_another():
    x = torch.arange(6.0).reshape(2, 3)
    with elsewhere():
        there = x.to(ELSEWHERE)
        assert isinstance(there, There) and there.device == ELSEWHERE and x.device.type == "cpu"
        assert torch.equal((2 * there).sum(0).cpu(), 2 * x.sum(0)) and float(there.sum()) == 15
        assert torch.zeros(2, device=ELSEWHERE).device == ELSEWHERE
        for mixed in (
            lambda: there + x,
            lambda: torch.cat([there, x]),
            lambda: there @ x.T,
            lambda: x[there[0].long()],
        ):
            with pytest.raises(RuntimeError, match="on the CPU"):
                mixed()
        with pytest.raises(TypeError, match="array"):
            there.numpy()
        assert torch.equal(there[torch.tensor([1])].cpu(), x[1:])  # a GPU takes indices from the CPU
        leaf = x.clone().requires_grad_()
        leaf.to(ELSEWHERE).square().sum().cpu().backward()
        assert torch.equal(leaf.grad, 2 * x)
        layer = torch.nn.Linear(3, 1)
        weight = layer.weight
        assert layer.to(ELSEWHERE).weight is weight and weight.device == ELSEWHERE
    assert torch.arange(2).device.type == "cpu"


@pytest.fixture
def pair(folder):
    """`pair(kind)`: the same model on the CPU and elsewhere."""

    def make(kind, **adapter):
        models = [small.adapted(folder(kind), kind, r=4, **adapter) for _ in range(2)]
        for model in models:
            for module in model.base.modules:
                module.double()
        with elsewhere() as device:
            models[1].to(device)
        return models

    return make


def equal(some, others):
    return all(torch.equal(one[key], other[key]) for one, other in zip(some, others, strict=True) for key in other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noisy", [False, True])
def test_training(pair, kind, noisy):
    """As a cohort, in pieces and whole, and one after another; with what strategies add to the gradients."""
    here, there = pair(kind)
    trains = ["A", "B", "head"] if small.HEADS[kind] else ["A", "B"]

    def jobs():
        made = make_jobs(here, UNEVEN, kind, proximal=0.1, offset=small.offsets(here))
        return [replace(job, private=private(1.0, 0.4, k) if noisy else None) for k, job in enumerate(made)]

    for config in (replace(ADAMW, max_grad_norm=0.5), EPOCHS) if not noisy else (ADAMW,):
        for tokens in (40, WIDE):
            wanted = train_cohort(here, copy.deepcopy(jobs()), trains, config, tokens)
            with elsewhere():
                done = train_cohort(there, jobs(), trains, config, tokens)
            assert equal([one.after for one in done], [one.after for one in wanted])
            assert [one.loss for one in done] == pytest.approx([one.loss for one in wanted], nan_ok=True)
            assert not any(isinstance(value, There) for one in done for value in one.after.values())
        alone = [after for after, *_ in one_by_one(here, jobs(), trains, config)]
        with elsewhere():
            assert equal([after for after, *_ in one_by_one(there, jobs(), trains, config)], alone)


def test_the_host_draws_noise_while_the_device_computes(pair, monkeypatch):
    """All of a step's noise is under way, on other threads, before its first gradient; on the CPU none is."""
    here, there = pair("bert")
    events: list[str] = []

    def jobs(model):
        made = [replace(job, private=private(1.0, 0.4, k)) for k, job in enumerate(make_jobs(model, UNEVEN, "bert"))]
        for job in made:
            draw = job.private.source.normal
            monkeypatch.setattr(
                job.private.source,
                "normal",
                lambda count, draw=draw: (
                    events.append("own" if current_thread() is main_thread() else "other"),
                    draw(count),
                )[1],
            )
        return made

    slopes = Chunk._slopes
    monkeypatch.setattr(Chunk, "_slopes", lambda *given: (events.append("slopes"), slopes(*given))[1])
    submit = ThreadPoolExecutor.submit
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *given: (events.append("asked"), submit(*given))[1])
    train_cohort(here, jobs(here), ["A", "B"], ADAMW, WIDE)
    assert "own" in events and "slopes" in events and not {"asked", "other"} & set(events)
    events.clear()
    with elsewhere():
        train_cohort(there, jobs(there), ["A", "B"], ADAMW, WIDE)
    assert "own" not in events and events.count("other") == events.count("asked")
    first = [event for event in events if event != "other"]
    assert first.index("slopes") == len(UNEVEN)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_states(pair, kind):
    here, there = pair(kind)
    state = small.with_residual(small.randomised(here, scale=0.3))
    data = records(kind, 9, 0)
    here.write(state)
    wanted = evaluate(here, data)
    with elsewhere():
        there.write(state)
        assert evaluate(there, data) == wanted
        assert there.state().sha256() == here.state().sha256()
