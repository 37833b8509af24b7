"""Every optimizer of the registry: it learns, goes on bit for bit from what it kept, and keeps clients apart."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedpeft.clients.cohort.engine import train_cohort
from fedpeft.clients.optimizers.base import STEP, find_optimizer, make_optimizer, read_state, set_rate, write_state
from fedpeft.config import load
from fedpeft.errors import InputError
from fedpeft.registry import names
from support import small_models as small
from support.cohort_jobs import ALL, FEW, SGD, WIDE, make_jobs, one_by_one, private
from support.optimizer_steps import (
    IN,
    LAYOUT,
    OUT,
    R,
    after,
    config_of,
    drawn,
    layout_of,
    loss_of_factors,
    near,
    parameters_of,
    take_steps,
)

NAMES = names("optimizers")
STEADY = {"weight_decay": 0.0}
MOMENTUM = {"sgd": {"momentum": 0.9}, "sgdp": {"momentum": 0.9}}  # without it they keep nothing
RATES = {"classp": 0.3}  # its steps get smaller as they go
EXACT = 1e-10  # solves of small systems come before the sums


def flat(name, tensors):
    """What an optimizer trains, as a row of a cohort."""
    return torch.cat([tensors[key].flatten() for key in layout_of(name).shapes])


@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name):
    """Of what a product of factors, from B = 0, and a head can come nearer to targets, at least 19 parts of 20."""
    draw = torch.Generator().manual_seed(7)
    target = torch.randn(OUT, IN, generator=draw, dtype=torch.float64)
    start = {**drawn(0), "q/B": torch.zeros(OUT, R, dtype=torch.float64)}
    if "q/A" in layout_of(name).shapes:
        start["q/A"] /= math.sqrt(IN)
    else:
        target = target @ torch.linalg.pinv(start["q/A"]) @ start["q/A"]
    least = float(torch.linalg.svdvals(target)[R:].square().sum()) / 2

    def excess(weights):
        return loss_of_factors({**start, **weights}, target) - least

    gradients = []
    weights = parameters_of(name, start)
    config = config_of(name, {**STEADY, "lr": RATES.get(name, 0.1)})
    optimizer = make_optimizer(list(weights.values()), config, layout_of(name))
    for _ in range(100):
        gradients.append(dict(zip(weights, torch.autograd.grad(excess(weights), list(weights.values())), strict=True)))
        take_steps(optimizer, weights, gradients[-1:])
    sent = after(name, start, gradients, {**STEADY, "lr": RATES.get(name, 0.1)})
    assert float(excess(sent)) < 0.05 * float(excess(start))


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_on_bit_for_bit_from_what_it_kept(name):
    config = config_of(name, MOMENTUM.get(name))
    if not find_optimizer(config).has_state(config):
        with pytest.raises(InputError, match=rf"client\.keep_optimizer=true: client\.optimizer={name} has no state"):
            load({"client": {"optimizer": name, "keep_optimizer": True}})
        return
    gradients, rates = [drawn(seed) for seed in range(1, 6)], (0.1, 0.05, 0.02, 0.2, 0.1)

    def steps(begin, values, kept):
        """From step `begin` on, two of them before a break."""
        weights = parameters_of(name, values)
        optimizer = make_optimizer(list(weights.values()), config, layout_of(name))
        if kept:
            write_state(optimizer, weights, kept)
        for place in range(begin, 2 if kept is None else 5):
            set_rate(optimizer, rates[place])
            take_steps(optimizer, weights, gradients[place : place + 1])
        return {**values, **{key: weight.detach() for key, weight in weights.items()}}, read_state(optimizer, weights)

    (whole, state), (half, kept) = steps(0, drawn(0), {}), steps(0, drawn(0), None)
    end, last = steps(2, half, kept)
    assert all(torch.equal(end[key], value) for key, value in whole.items())
    assert last.keys() == state.keys() == kept.keys() and all(torch.equal(last[key], state[key]) for key in state)
    anew, _ = steps(2, half, {})
    assert any(not torch.equal(anew[key], value) for key, value in whole.items()), "it would do the same without"
    for key, value in kept.items():
        assert key == STEP or value.shape == LAYOUT.shapes[key.partition(":")[2]], "the cohort cuts it as the weights"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_client_that_diverged_is_alone_with_it(name, value):
    """Of three clients the second is lost; the others take the steps that they take alone."""
    starts, gradients = ([drawn(seed) for seed in seeds] for seeds in ((0, 1, 2), (3, 4, 5)))
    starts[1]["q/B"][0, 0] = gradients[1]["q/B"][0, 0] = value
    weights = nn.Parameter(torch.stack([flat(name, one) for one in starts]))
    weights.grad = torch.stack([flat(name, one) for one in gradients])
    make_optimizer([weights], config_of(name), layout_of(name)).step()
    assert not torch.isfinite(weights[1]).all()
    for k in (0, 2):
        near(weights[k].detach(), flat(name, after(name, starts[k], [gradients[k]])))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = small.adapted(small.save("bert", tmp_path_factory.mktemp("models") / "bert"), "bert", r=4)
    made.base.backbone.to(torch.float64)
    made.training_mode = lambda: None  # no dropout
    return made


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("noisy", [False, True], ids=["plain", "private"])
def test_a_cohort_takes_the_steps_of_each_client(model, name, noisy):
    """Clients leave at different steps; the last has B = 0, as at the start of a run."""
    config = replace(SGD, optimizer=name, lr=0.01, weight_decay=0.1, **MOMENTUM.get(name, {}))
    config = replace(config, local_steps=2) if noisy else replace(config, local_steps=None, local_epochs=2)
    trains = [role for role in ALL if not (role == "A" and find_optimizer(config).reads_fixed_A)]
    jobs = make_jobs(model, (9, 3, 8))
    if "A" not in trains:  # of all clients the same, as a strategy that freezes it has it
        for job in jobs[1:]:
            job.start |= {key: value for key, value in jobs[0].start.items() if key.endswith("/A")}
    jobs[2].start = {key: 0 * value if key.endswith("/B") else value for key, value in jobs[2].start.items()}

    def some():
        """Jobs with noise of their own, which a run uses up."""
        return [
            replace(job, private=private(0.1, 0.5, k) if noisy else None)
            for k, job in enumerate(jobs[:2] if noisy else jobs)
        ]

    ends = one_by_one(model, some(), trains, config)
    for tokens in (WIDE, FEW):
        for mine, (values, steps, _) in zip(train_cohort(model, some(), trains, config, tokens), ends, strict=True):
            assert mine.steps == steps
            for key, value in values.items():
                near(mine.after[key], value, EXACT)
                assert noisy or key.endswith("/A") or not torch.equal(value, some()[0].start[key].to(value))


@pytest.mark.parametrize("name", NAMES)
def test_an_option_of_another_is_refused_with_those_it_has(name):
    with pytest.raises(InputError, match=r"config key client\.optimizer_options\.bate1.*has the options "):
        load({"client": {"optimizer": name, "optimizer_options": {"bate1": 0.9}}})
