"""Clips that are not there, for one engine, one tensor or one record; samples that are not Poisson."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fedpeft.clients import local, train
from fedpeft.clients.cohort import chunk
from fedpeft.clients.guard import Guard
from fedpeft.clients.train import Private
from fedpeft.privacy.gradients import per_sample_gradients
from fedpeft.privacy.plan import Plan
from support.audit_faults import FAULTS, HEAD, fault, planned

# Clip -----------------------------------------------------------------------------------------------------------------


def finite(gradients):
    return torch.nan_to_num(gradients, 0, 0, 0)


def of_clip(part: str, check: str):
    def note(clip):
        FAULTS[clip.__name__] = (
            part,
            check,
            lambda put: put(Plan, "clipped_sum", lambda plan, gradients, losses=None: clip(plan, gradients)),
        )
        return clip

    return note


REAL = Plan.clipped_sum


@of_clip("sensitivity", "sensitivity")
def nothing_clipped(plan, gradients):
    return finite(gradients).sum(0)


@of_clip("sensitivity", "sensitivity")
def batch_mean_clipped(plan, gradients):
    mean = finite(gradients).mean(0)
    return mean * min(1.0, plan.clip / float(mean.norm() + 1e-6))


@of_clip("sensitivity", "sensitivity")
def twice_the_clip(plan, gradients):
    return REAL(replace(plan, clip=2 * plan.clip), gradients)


@of_clip("sensitivity", "sensitivity")
def divided_by_the_size_drawn(plan, gradients):
    return REAL(plan, gradients) * plan.expected_batch / max(1, len(gradients))


@of_clip("rounds", "clipped sums")
def divided_by_the_size_drawn_in_rounds(plan, gradients):
    return REAL(plan, gradients) * plan.expected_batch / max(1, len(gradients))


@of_clip("sensitivity", "sensitivity")
def not_a_number_spoils_the_sum(plan, gradients):
    return (plan.clip / (gradients.norm(dim=1) + 1e-6)).clamp(max=1.0) @ gradients


@of_clip("rounds", "clipped sums")
def last_record_not_clipped(plan, gradients):
    return REAL(plan, gradients[:-1]) + finite(gradients[-1])


@fault("rounds", "clipped sums")
def not_clipped_alone(put):
    planned(put, "alone", clip=lambda plan: 1e9 * plan.clip, noise_multiplier=lambda plan: plan.noise_multiplier / 1e9)


def of_cohort(part: str, check: str):
    """`add_clipped` with other clips, or with factors for each of its parts."""

    def note(change):
        real = chunk.add_clipped
        FAULTS[change.__name__] = (
            part,
            check,
            lambda put: put(chunk, "add_clipped", lambda *given: change(real, *given)),
        )
        return change

    return note


@of_cohort("sensitivity", "sensitivity in a cohort")
def twice_the_clip_in_a_cohort(real, total, slopes, losses, clients, clips):
    real(total, slopes, losses, clients, 2 * clips)


@of_cohort("rounds", "clipped sums")
def nothing_clipped_in_a_cohort(real, total, slopes, losses, clients, clips):
    real(total, slopes, losses, clients, 1e9 * clips)


@of_cohort("rounds", "clipped sums")
def each_tensor_clipped_in_a_cohort(real, total, slopes, losses, clients, clips):
    sizes = [slope[0].numel() for slope in slopes]
    for part, slope in zip(total.split(sizes, dim=1), slopes, strict=True):
        real(part, [slope], losses, clients, clips)


@of_cohort("rounds", "clipped sums")
def mean_of_those_drawn_in_a_cohort(real, total, slopes, losses, clients, clips):
    counts = torch.bincount(clients, minlength=len(total)).clamp(min=1)
    fresh = torch.zeros_like(total)
    real(fresh, slopes, losses, clients, clips)
    total += 6 * fresh / counts[:, None]


@of_cohort("rounds", "clipped sums")
def a_client_gets_anothers_records(real, total, slopes, losses, clients, clips):
    real(total, slopes, losses, clients.clamp(max=2), clips)


def faulty_steps(clip):
    """`private_steps` with another way from per-sample gradients [N, P] and the sizes of the tensors to their sum."""

    def private_steps(model, data, parameters, config, private, device):
        plan, source = private.plan, private.source
        sizes = [value.numel() for value in parameters.values()]
        for _ in range(config.local_steps):
            total = torch.zeros(sum(sizes))
            drawn = plan.sample(len(data), source)
            if len(drawn):
                gradients, _ = per_sample_gradients(
                    model.base.modules,
                    parameters,
                    lambda *batch: train.per_sample_loss(model, *batch),
                    *train.on_device(data, drawn, device),
                )
                total = clip(plan, finite(gradients), sizes)
            pieces = plan.noised_mean(total, source).split(sizes)
            yield {key: piece.view_as(parameters[key]) for key, piece in zip(parameters, pieces, strict=True)}, []

    return private_steps


@fault("sensitivity", "sensitivity")
def head_escapes_the_clip(put):
    put(
        train,
        "private_steps",
        faulty_steps(lambda plan, rows, sizes: torch.cat([rows[:, :HEAD].sum(0), plan.clipped_sum(rows[:, HEAD:])])),
    )


@fault("sensitivity", "sensitivity")
def each_tensor_clipped(put):
    put(
        train,
        "private_steps",
        faulty_steps(
            lambda plan, rows, sizes: torch.cat([plan.clipped_sum(part) for part in rows.split(sizes, dim=1)])
        ),
    )


@fault("rounds", "clipped sums")
def mean_clipped_in_the_step(put):
    put(train, "private_steps", faulty_steps(lambda plan, rows, sizes: plan.clipped_sum(rows.mean(0, keepdim=True))))


# Sampling -------------------------------------------------------------------------------------------------------------


def of_sample(part: str, check: str):
    def note(sample):
        FAULTS[sample.__name__] = part, check, lambda put: put(Plan, "sample", sample)
        return sample

    return note


DRAW = Plan.sample


@of_sample("rounds", "batch size")
def batches_of_one_size(plan, count, source):
    return np.sort(np.argsort(source.uniform(count))[: round(count * plan.sample_rate)])


@of_sample("rounds", "batches are independent")
def the_same_batch_in_all_steps(plan, count, source):
    if not hasattr(source, "batch"):
        source.batch = DRAW(plan, count, source)
    return source.batch


@of_sample("rounds", "batches are independent")
def every_record_once_in_two_steps(plan, count, source):
    if not hasattr(source, "left"):
        source.left = source.uniform(count)
        return np.flatnonzero(source.left < plan.sample_rate)
    return np.flatnonzero((source.left >= plan.sample_rate) & (source.left < 2 * plan.sample_rate))


@of_sample("rounds", "sampling rate")
def rate_a_third_higher(plan, count, source):
    return DRAW(replace(plan, sample_rate=min(1.0, 1.3 * plan.sample_rate)), count, source)


@of_sample("exact_rounds", "batch size spread")
def records_in_pairs(plan, count, source):
    return np.flatnonzero(np.repeat(source.uniform(-(-count // 2)), 2)[:count] < plan.sample_rate)


@of_sample("rounds", "rate of each part")
def first_record_always(plan, count, source):
    return np.union1d(DRAW(plan, count, source), np.arange(min(1, count) * (plan.sample_rate > 0)))


@of_sample("rounds", "once in a batch")
def records_twice(plan, count, source):
    return np.sort((source.uniform(round(count * plan.sample_rate)) * count).astype(int))


@of_sample("empty", "empty batches")
def empty_batches_drawn_again(plan, count, source):
    drawn = DRAW(plan, count, source)
    while len(drawn) == 0 and count and plan.sample_rate:
        drawn = DRAW(plan, count, source)
    return drawn


@fault("rounds", "sampling rate")
def twice_the_rate_at_the_client(put):
    planned(put, "alone", sample_rate=lambda plan: 2 * plan.sample_rate)


@fault("rounds", "rounds")
def twice_the_rate_paid_for(put):
    """The ledger gets the rate that was used, so the second round is over budget."""
    put(local, "Private", lambda plan, source: Private(replace(plan, sample_rate=2 * plan.sample_rate), source))


@fault("rounds", "rate of each part")
def twice_the_rate_in_a_cohort(put):
    planned(put, "cohort", sample_rate=lambda plan: 2 * plan.sample_rate)


class Sampled:
    """Samples of one seed, noise of another."""

    def __init__(self, samples, noise):
        self.uniform, self.normal = samples.uniform, noise.normal


@fault("rounds", "batches are independent")
def rounds_share_batches(put):
    real = Guard.source
    put(
        Guard,
        "source",
        lambda guard, client, number, *rest: Sampled(real(guard, client, 1), real(guard, client, number, *rest)),
    )


@fault("rounds", "batches are independent")
def clients_share_batches(put):
    real = Guard.source
    put(
        Guard,
        "source",
        lambda guard, client, number, *rest: Sampled(real(guard, "all", number), real(guard, client, number, *rest)),
    )


@fault("empty", "empty batches")
def empty_steps_left_out(put):
    real = train.private_steps

    def private_steps(model, data, parameters, config, private, device):
        for released in real(model, data, parameters, config, private, device):
            if released[1]:
                yield released

    put(train, "private_steps", private_steps)
