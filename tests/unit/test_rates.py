"""The learning rate of every step, against transformers' schedules and by hand; what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import transformers

from fedpeft.clients.rates import Clock
from fedpeft.config import ClientConfig, load
from fedpeft.errors import InputError

BASE = ClientConfig(lr=0.3)
ROUNDS, STEPS = 5, 7


def of_run(config, steps=STEPS, rounds=ROUNDS):
    return [rate for number in range(1, rounds + 1) for rate in Clock(number, rounds).rates(config, steps)]


def of_transformers(make, count, **options):
    """The rates that a loop of `optimizer.step(); scheduler.step()` has."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE.lr)
    schedule, rates = make(optimizer, **options), []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 2.5])
@pytest.mark.parametrize("min_lr", [0.0, 0.02])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("over", ["steps", "round"])
def test_over_steps_it_is_the_schedule_of_transformers(schedule, min_lr, warmup, over):
    if over == "round":
        warmup /= 5
    rises = int(warmup > 0)  # with a warm-up transformers' first step has a rate of 0; ours begins at the second
    count = STEPS * (ROUNDS if over == "steps" else 1) + rises
    common = {"num_warmup_steps": math.ceil(warmup * STEPS) + rises, "num_training_steps": count}
    if schedule == "constant":
        make = transformers.get_constant_schedule_with_warmup
        common.pop("num_training_steps")
    elif schedule == "linear":  # transformers' linear one falls to 0; its polynomial of power 1 to `lr_end`
        make = transformers.get_linear_schedule_with_warmup
        if min_lr:
            make, common = transformers.get_polynomial_decay_schedule_with_warmup, {**common, "lr_end": min_lr}
    else:
        make = transformers.get_cosine_schedule_with_warmup
        if min_lr:
            make, common = transformers.get_cosine_with_min_lr_schedule_with_warmup, {**common, "min_lr": min_lr}
    expected = of_transformers(make, count, **common)[rises:] * (1 if over == "steps" else ROUNDS)
    config = replace(BASE, schedule=schedule, schedule_over=over, warmup_rounds=warmup, min_lr=min_lr)
    found = of_run(config)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert schedule == "constant" or max(found) > 2 * min(found)


def test_over_rounds_it_is_flowertunes_cosine():
    """lr_min + (lr_max - lr_min) (1 + cos(pi t / T)) / 2, t the round of T, constant inside a round."""
    config = ClientConfig(lr=5e-5, min_lr=1e-6, schedule="cosine")
    for number in (1, 7, 100, 199, 200):
        rates = Clock(number, 200).rates(config, 10)
        by_hand = 1e-6 + (5e-5 - 1e-6) * (1 + math.cos(math.pi * number / 200)) / 2
        assert len(rates) == 10 and len(set(rates)) == 1 and rates[0] == pytest.approx(by_hand, rel=1e-12)
    assert Clock(200, 200).rates(config, 1) == [1e-6]


def test_over_rounds_by_hand():
    linear = ClientConfig(lr=1.0, min_lr=0.1, schedule="linear", warmup_rounds=2)
    assert of_run(linear, steps=2, rounds=5) == pytest.approx([0.5, 0.5, 1, 1, 0.7, 0.7, 0.4, 0.4, 0.1, 0.1])
    held = ClientConfig(lr=1.0, warmup_rounds=4)
    assert of_run(held, steps=1, rounds=5) == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("over", ["steps", "round"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_no_step_of_a_round_of_one_step_is_at_a_rate_of_zero(over, schedule):
    """A client with one batch: lr / 2 where the step is the warm-up's only one."""
    rates = of_run(replace(BASE, schedule=schedule, schedule_over=over, warmup_rounds=0.5), steps=1)
    assert rates[0] == pytest.approx(BASE.lr / 2) and min(rates) > 0


def test_a_constant_rate_is_the_configs_to_the_bit():
    assert of_run(BASE) == [0.3] * ROUNDS * STEPS
    for steps in range(1, 50):  # SCAFFOLD divides by it, as it divided by steps x lr
        assert Clock(3, 9).total(BASE, steps) == steps * 0.3


@pytest.mark.parametrize(
    ("client", "words"),
    [
        ({"schedule": "cosin"}, ("client.schedule", "Did you mean 'cosine'?")),
        ({"schedule": "cosine"}, ("client.min_lr", "2e-05", "schedule_over=steps")),
        ({"schedule": "linear", "min_lr": 0.1}, ("client.min_lr=0.1", "client.lr=0.001")),
        ({"min_lr": 1e-5}, ("client.min_lr", "client.schedule")),
        ({"schedule_over": "steps"}, ("client.schedule_over=steps", "client.schedule")),
        ({"warmup_rounds": 11}, ("client.warmup_rounds=11", "run.rounds=10", "at most 10")),
        ({"warmup_rounds": 10, "schedule_over": "steps"}, ("client.warmup_rounds=10", "below 10")),
        ({"warmup_rounds": 1, "schedule_over": "round"}, ("client.warmup_rounds=1", "below 1")),
        (
            {"warmup_rounds": 0.5, "schedule_over": "round", "local_steps": 1, "local_epochs": None},
            ("client.warmup_rounds", "client.local_steps"),
        ),
    ],
)
def test_what_is_no_schedule_is_refused(client, words):
    with pytest.raises(InputError) as error:
        load({"client": client, "run": {"rounds": 10}})
    assert all(word in str(error.value) for word in words), error.value


def test_what_is_one_is_taken():
    for client in ({"warmup_rounds": 10}, {"schedule": "cosine", "schedule_over": "steps", "warmup_rounds": 0.5}):
        assert load({"client": client, "run": {"rounds": 10}}).client.warmup_rounds == client["warmup_rounds"]
