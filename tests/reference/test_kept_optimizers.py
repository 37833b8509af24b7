"""An optimizer that goes on from its kept state takes the steps that one without a break would have taken."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedpeft.clients.cohort.engine import train_cohort
from fedpeft.clients.train import train
from fedpeft.config import load
from fedpeft.errors import InputError
from support.cohort_jobs import ADAMW, ALL, FEW, HEAVY, WIDE, make_jobs, private

EXACT = 1e-12
NESTEROV = replace(HEAVY, optimizer_options={"nesterov": True})
NAMO_D, CLASSP = (replace(ADAMW, optimizer=name) for name in ("namo_d", "classp"))
KEEPING = {"adamw": ADAMW, "nesterov": NESTEROV, "namo_d": NAMO_D, "classp": CLASSP}


def worst(some, others):
    assert some.keys() == others.keys()
    return max(float((some[key] - others[key]).abs().max()) for key in some)


def alone(model, job, config, moments):
    """Values at the end and the state then; `moments` is the state to begin with."""
    model.write(replace(model.form, tensors={**model.state().tensors, **job.start}))
    kept = dict(moments)
    train(model, job.data, ALL, config, job.seed, moments=kept, **job.settings)
    return dict(model.read(model.form.select(ALL)).tensors), kept


@pytest.mark.parametrize("config", [ADAMW, HEAVY, NESTEROV], ids=["adamw", "momentum", "nesterov"])
def test_two_rounds_are_one_of_twice_the_steps(build, config):
    model, batch = build(), replace(config, batch_size=2)
    [job] = make_jobs(model, (8,))
    parts = [replace(job, data=job.data.view(np.arange(*ends)), in_order=True) for ends in ((0, 8), (0, 4), (4, 8))]
    whole, state = alone(model, parts[0], batch, {})
    first, kept = alone(model, parts[1], batch, {})
    second, after = alone(model, replace(parts[2], start=first), batch, kept)
    assert worst(second, whole) < EXACT and worst(after, state) < EXACT
    assert after.get("step", torch.tensor(4.0)) == 4 and kept.get("step", torch.tensor(2.0)) == 2
    anew, _ = alone(model, replace(parts[2], start=first), batch, {})
    assert worst(anew, whole) > 1e-4


@pytest.mark.parametrize("noisy", [False, True], ids=["plain", "private"])
@pytest.mark.parametrize("config", KEEPING.values(), ids=KEEPING)
def test_a_cohort_goes_on_as_each_client_would(build, config, noisy):
    """Clients have taken part unequally often, one never, and take unlike numbers of steps."""
    model, config = (
        build(),
        replace(config, local_steps=4) if noisy else replace(config, **{"local_steps": None, "local_epochs": 2}),
    )
    jobs, before = make_jobs(model, (9, 3, 8, 5)), []
    for k, job in enumerate(jobs):
        kept = {}
        for _ in range((1, 2, 0, 1)[k]):
            _, kept = alone(model, job, config, kept)
        before.append(kept)
    jobs = [replace(job, moments=kept) for job, kept in zip(jobs, before, strict=True)]

    def secret(k):
        return private(0.7, 0.5, k, clip=0.2) if noisy else None

    expected = [alone(model, replace(job, private=secret(k)), config, job.moments) for k, job in enumerate(jobs)]
    for tokens in (WIDE, FEW):
        done = train_cohort(model, [replace(job, private=secret(k)) for k, job in enumerate(jobs)], ALL, config, tokens)
        for mine, (after, kept) in zip(done, expected, strict=True):
            assert worst(mine.after, after) < EXACT and worst(mine.moments, kept) < EXACT
    assert [job.moments for job in jobs] == before
    fresh = train_cohort(
        model, [replace(job, moments=None, private=secret(k)) for k, job in enumerate(jobs)], ALL, config, WIDE
    )
    assert all(
        (worst(mine.after, after) > 1e-6) == bool(kept)
        for mine, (after, _), kept in zip(fresh, expected, before, strict=True)
    )
    assert all(mine.moments is None for mine in fresh)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"client.optimizer": "sgd"}, "client.momentum"),
        ({"strategy": "fedsvd"}, "strategy fedsvd"),
        ({"strategy": "flora"}, "strategy flora"),
        ({"strategy": "rolora"}, "second round"),
        ({"continual.body": "sequential", "continual.tasks": 2}, "continual.body=sequential"),
    ],
)
def test_it_is_refused_where_the_state_would_be_of_something_else(config, words):
    with pytest.raises(InputError, match=rf"client\.keep_optimizer=true: .*{words}"):
        load({}, {**config, "client.keep_optimizer": True})


@pytest.mark.parametrize("strategy", ["fedit", "ffa_lora", "fedsa", "lora_fair", "hetlora"])
def test_it_is_taken_where_the_coordinates_stay(strategy):
    config = {"strategy": strategy, "data.holdout": 0.2, "client.keep_optimizer": True}
    assert load({}, config).client.keep_optimizer
    assert load({}, {**config, "client.optimizer": "sgd", "client.momentum": 0.9}).client.keep_optimizer
