"""The learning rate of every step: `client.lr`, or a schedule over the rounds of the run, its steps, or each round's.

    x = share of the way after warm-up,  (t - w) / (T - w)
    constant   lr
    linear     min_lr + (lr - min_lr) (1 - x)
    cosine     min_lr + (lr - min_lr) (1 + cos(pi x)) / 2
    warm-up    lr t / w over rounds, lr (t + 1) / (w + 1) over steps,  while t < w

    client.schedule_over   t                                        T                     w
    rounds                 number of the round, from 1              run.rounds            client.warmup_rounds
    steps                  steps before this one in the run, of     rounds x a round's    warm-up rounds x a round's
                           a client that took part in all rounds    steps                 steps, rounded up
    round                  steps before this one in the round       a round's steps       the same

`rounds` is constant inside a round, as FlowerTune and OpenFedLLM have it; with t from 1 it is FlowerTune's formula, and
the last round is at min_lr. `steps` are the schedules of transformers (`get_cosine_schedule_with_warmup`, also with
`min_lr`; `get_linear_schedule_with_warmup`); where there is a warm-up, those of w + 1 and T + 1 steps without their
first, whose rate of 0 would be that of the whole round of a client with one batch, and a private step is paid for. What
a step's rate is follows from the config and the number of the round, so nothing is kept.

    >>> config = ClientConfig(lr=1.0, schedule="cosine", min_lr=0.2)
    >>> [round(Clock(t, 4).rates(config, 1)[0], 3) for t in (1, 2, 3, 4)]
    [0.883, 0.6, 0.317, 0.2]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedpeft.config import ClientConfig
from fedpeft.errors import InputError


@dataclass(frozen=True)
class Clock:
    """Which round of how many a client trains in."""

    round: int = 1
    rounds: int = 1

    def rates(self, config: ClientConfig, steps: int) -> list[float]:
        """The rate of each of a round's steps."""
        if config.schedule_over == "rounds":
            return [_rate_at(config, self.round, self.rounds, config.warmup_rounds)] * steps
        warmup = math.ceil(config.warmup_rounds * steps)
        if config.schedule_over == "round":
            return [_rate_at(config, step, steps, warmup) for step in range(steps)]
        before = (self.round - 1) * steps
        return [_rate_at(config, before + step, self.rounds * steps, warmup) for step in range(steps)]

    def total(self, config: ClientConfig, steps: int) -> float:
        """The sum of a round's rates: how far plain SGD goes along a constant gradient of length 1."""
        return math.fsum(self.rates(config, steps))


ONE_ROUND = Clock()


def _rate_at(config: ClientConfig, time: int, end: int, warmup: float) -> float:
    if time < warmup:
        over_rounds = config.schedule_over == "rounds"
        return config.lr * (time / warmup if over_rounds else (time + 1) / (warmup + 1))
    share = min(1.0, (time - warmup) / max(1, end - warmup))
    if config.schedule == "constant":
        return config.lr
    left = 1.0 - share if config.schedule == "linear" else (1.0 + math.cos(math.pi * share)) / 2
    return config.min_lr + (config.lr - config.min_lr) * left


def require(config: ClientConfig, rounds: int) -> None:
    """Refuse a schedule that is none, or that would train a whole round at a rate of 0."""
    if config.schedule == "constant" and config.min_lr:
        raise InputError(
            f"client.min_lr={config.min_lr:g}, but client.schedule=constant does not fall. Set client.schedule to "
            "linear or cosine, or client.min_lr=0."
        )
    if config.schedule == "constant" and not config.warmup_rounds and config.schedule_over != "rounds":
        raise InputError(
            f"client.schedule_over={config.schedule_over}, but client.schedule=constant without client.warmup_rounds "
            "has nothing to spread. Set client.schedule to linear or cosine, or leave client.schedule_over out."
        )
    if config.min_lr > config.lr:
        raise InputError(f"client.min_lr={config.min_lr:g} is above client.lr={config.lr:g}. Lower it.")
    longest = 1 if config.schedule_over == "round" else rounds
    if config.warmup_rounds >= longest + (config.schedule_over == "rounds"):
        raise InputError(
            f"client.warmup_rounds={config.warmup_rounds:g}: with client.schedule_over={config.schedule_over} and "
            f"run.rounds={rounds} the rate would never reach client.lr. Lower it"
            + (f" below {longest}." if config.schedule_over != "rounds" else f" to at most {rounds}.")
        )
    if config.schedule_over == "rounds" and config.schedule != "constant" and not config.min_lr:
        raise InputError(
            f"client.schedule={config.schedule} with client.min_lr=0: the last of {rounds} rounds would train at a "
            f"rate of 0. Set client.min_lr (for example {config.lr / 50:g}), or client.schedule_over=steps."
        )
    if config.schedule_over == "round" and config.warmup_rounds and config.local_steps == 1:
        raise InputError(
            f"client.warmup_rounds={config.warmup_rounds:g}: with client.schedule_over=round and client.local_steps=1 "
            "every step would be a round's first, and the rate would never reach client.lr. Set client.local_steps to "
            "2 or more, or client.schedule_over to steps or rounds."
        )
