"""Noise that is too small somewhere, has another shape, comes again, or hangs together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fedpeft.clients.guard import Guard
from fedpeft.privacy.noise import OperatingSystem, Seeded
from fedpeft.privacy.plan import Plan
from support.audit_faults import FAULTS, HEAD, fault, planned


def noisy(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`noised_mean` with the noise, in its own deviations, that `make(total, noise, source)` turns it into."""

    def noised_mean(plan, total, source):
        noise = make(total, torch.from_numpy(source.normal(total.numel())).to(total), source)
        return (total + plan.noise_multiplier * plan.clip * noise) / plan.expected_batch

    return noised_mean


def step_of(source) -> int:
    """How often this source has been asked before, while its round lasts."""
    source.asked = getattr(source, "asked", -1) + 1
    return source.asked


def of_noise(check: str):
    """A fault of the noise vector, in both engines."""

    def note(make):
        name = make.__name__
        FAULTS[name] = "rounds", check, lambda put: put(Plan, "noised_mean", noisy(make))
        return make

    return note


@of_noise("noise of each part")
def half_with_records(total, noise, source):
    return noise * (0.5 if bool(total.any()) else 1.0)


@of_noise("noise of each part")
def nothing_with_records(total, noise, source):
    return noise * (not bool(total.any()))


@of_noise("noise size")
def two_percent_less(total, noise, source):
    return 0.98 * noise


@of_noise("noise size")
def half(total, noise, source):
    return 0.5 * noise


@of_noise("noise of each value")
def one_value_bare(total, noise, source):
    noise[200] = 0
    return noise


@of_noise("noise of each value")
def one_value_half(total, noise, source):
    noise[-1] *= 0.5
    return noise


@of_noise("noise of each value")
def one_value_bare_with_records(total, noise, source):
    if bool(total.any()):
        noise[7] = 0
    return noise


@of_noise("noise of each part")
def head_bare(total, noise, source):
    noise[:HEAD] = 0
    return noise


@of_noise("noise of each part")
def one_layer_bare(total, noise, source):
    noise[HEAD : HEAD + 32] = 0
    return noise


@of_noise("noise of each part")
def second_step_bare(total, noise, source):
    return noise * (step_of(source) != 1)


@of_noise("noise of each part")
def second_step_weaker(total, noise, source):
    return noise * (0.9 if step_of(source) == 1 else 1.0)


@of_noise("noise shape")
def uniform(total, noise, source):
    return 12**0.5 * (torch.special.ndtr(noise) - 0.5)


@of_noise("noise shape")
def laplace(total, noise, source):
    share = torch.special.ndtr(noise.double()) - 0.5
    return (-share.sign() * torch.log1p(-2 * share.abs()) / 2**0.5).to(noise)


@of_noise("noise tails")
def cut_off_at_three(total, noise, source):
    return noise.clamp(-3.0, 3.0)


@of_noise("coordinates are apart")
def one_value_is_another(total, noise, source):
    noise[300] = noise[11]
    return noise


@of_noise("coordinates are apart")
def two_values_cancel(total, noise, source):
    noise[-1] = -noise[-2]
    return noise


@of_noise("nothing in common")
def neighbours_alike(total, noise, source):
    return (noise + noise.roll(1)) / 2**0.5


@of_noise("nothing in common")
def one_value_in_all(total, noise, source):
    return 0.96**0.5 * noise + 0.2 * noise[0]


@of_noise("noise is fresh")
def second_half_is_the_first(total, noise, source):
    """The noise of the first step in half of the second's values, with other signs."""
    if step_of(source) == 0:
        source.first = noise.clone()
    else:
        noise[HEAD:] = -source.first[HEAD:]
    return noise


@of_noise("noise is fresh")
def the_step_before_is_in_it(total, noise, source):
    if step_of(source) == 0:
        source.first = noise.clone()
        return noise
    return 0.75**0.5 * noise + 0.5 * source.first


@of_noise("noise is not reordered")
def the_step_before_turned(total, noise, source):
    if step_of(source) == 0:
        source.first = noise.clone()
        return noise
    return source.first.roll(5)


@of_noise("noise is fresh")
def the_bias_again(total, noise, source):
    """Ten values of the last step's: too few to be seen in one pair."""
    if step_of(source) == 0:
        source.first = noise.clone()
    else:
        noise[:10] = source.first[:10]
    return noise


def again_after_two(put):
    """Of four steps, the noise of the first two comes again."""

    def make(total, noise, source):
        source.line = [*getattr(source, "line", []), noise]
        return source.line[len(source.line) - 3] if len(source.line) > 2 else noise

    put(Plan, "noised_mean", noisy(make))


FAULTS["again_after_two"] = "long_rounds", "noise is fresh", again_after_two


@fault("rounds", "noise of each part")
def one_client_bare(put):
    real = Guard.source
    put(
        Guard,
        "source",
        lambda guard, client, *rest: (
            Bare(real(guard, client, *rest)) if client == "client-002" else real(guard, client, *rest)
        ),
    )


@fault("rounds", "noise of each part")
def one_round_bare(put):
    real = Guard.source
    put(
        Guard,
        "source",
        lambda guard, client, number, *rest: (
            Bare(real(guard, client, number, *rest)) if number == 2 else real(guard, client, number, *rest)
        ),
    )


class Bare:
    """Next to no noise; with none at all a round without records would move nothing, and fail."""

    def __init__(self, source):
        self.uniform, self.real = source.uniform, source

    def normal(self, count):
        return 1e-3 * self.real.normal(count)


@fault("rounds", "noise is fresh")
def clients_share_noise(put):
    put(Guard, "source", lambda guard, client, number, *_: Seeded(guard.config.run.seed, "round", number))


@fault("rounds", "noise is fresh")
def rounds_share_noise(put):
    put(Guard, "source", lambda guard, client, number, *_: Seeded(guard.config.run.seed, "client", client))


@fault("rounds", "noise is fresh")
def runs_share_noise(put):
    put(Guard, "source", lambda guard, client, number, *_: Seeded(0, "client", client, number))


@fault("exact_rounds", "noise is fresh")
def clients_share_a_part(put):
    class Mixed(Seeded):
        def __init__(self, seed, client, number):
            super().__init__(seed, client, number)
            self.common = Seeded(seed, number)

        def normal(self, count):
            return 0.9**0.5 * super().normal(count) + 0.1**0.5 * self.common.normal(count)

    put(Guard, "source", lambda guard, client, number, *_: Mixed(guard.config.run.seed, client, number))


@fault("exact_rounds", "noise of each part")
def two_percent_less_in_a_cohort(put):
    planned(put, "cohort", noise_multiplier=lambda plan: 0.98 * plan.noise_multiplier)


@fault("exact_rounds", "noise of each part")
def two_percent_less_alone(put):
    planned(put, "alone", noise_multiplier=lambda plan: 0.98 * plan.noise_multiplier)


@fault("rounds", "noise of each part")
def noise_divided_twice_alone(put):
    planned(put, "alone", noise_multiplier=lambda plan: plan.noise_multiplier / plan.expected_batch)


@fault("streams", "streams of noise")
def public_noise_at_sites(put):
    put(Guard, "source", lambda guard, client, number, *_: Seeded(guard.config.run.seed, client, number))


@fault("streams", "streams of noise")
def one_stream_of_each_process(put):
    generator = np.random.default_rng(0)
    put(OperatingSystem, "normal", lambda self, count: generator.standard_normal(count))


@fault("streams", "streams of noise")
def one_stream_begun_when_asked(put):
    line = []

    def normal(self, count):
        line.append(line[-1] if line else np.random.default_rng(7))
        return line[-1].standard_normal(count)

    put(OperatingSystem, "normal", normal)


@fault("streams", "streams of noise")
def one_stream_of_each_round(put):
    put(OperatingSystem, "normal", lambda self, count: np.random.default_rng(0).standard_normal(count))


@fault("streams", "streams of samples")
def one_stream_of_samples(put):
    generator = np.random.default_rng(3)
    put(OperatingSystem, "uniform", lambda self, count: generator.random(count))
    put(OperatingSystem, "normal", lambda self, count: np.random.default_rng().standard_normal(count))
