"""Many clients trained at once over one frozen base, exactly: each ends where `clients.train` would have ended.

The trained values of K clients are the rows of one matrix [K, P]. A step runs the batches of all clients through the
model as one, every layer with the factors of the client that a sample is of (`adapters.grouped`), takes the gradient of
all rows in one backward pass and updates the matrix with one optimizer, which acts on every entry alone and so is K
optimizers. Under DP-SGD each sample carries its own copy of its client's factors: their gradients are the per-sample
gradients, clipped and summed per client. A client that has taken its steps leaves; the others go on.

Jobs are taken in chunks of so many clients that a step has no more tokens than there is room for (`room`), and a step
whose batch comes out longer, or uneven in length, is taken in pieces whose gradients add up. So memory does not grow
with the number of jobs.

Layers of the last block that work for tokens nobody reads are spared them (`fedpeft.adapters.tail`), here as in
`clients.train`.

Sums are taken in another order than one client at a time takes them, so results agree to rounding (1e-12 in float64),
also between chunk sizes. Dropout draws from one generator for the chunk: other masks than one client at a time would
get, from the same distribution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedpeft import progress
from fedpeft.adapters.adapted import Adapted
from fedpeft.adapters.grouped import Pass, find_layers, with_parameters
from fedpeft.adapters.tail import first_token
from fedpeft.clients.cohort.chunk import Chunk, Done, Job
from fedpeft.clients.cohort.passes import token_counts
from fedpeft.clients.cohort.room import most_tokens, shared_tokens
from fedpeft.clients.optimizers.base import count_of
from fedpeft.clients.train import find_taught
from fedpeft.config import ClientConfig
from fedpeft.errors import InputError

__all__ = ["Done", "Job", "train_cohort", "why_not_cohort"]

TYPICAL = 0.9  # quantile of a client's text lengths that chunks are planned with


def why_not_cohort(model: Adapted, trains: Sequence[str]) -> str | None:
    """Why these roles cannot be trained in a cohort; None if they can."""
    if not model.form.select(trains).tensors:
        return f"no parameter has a role of {', '.join(trains)}"
    try:
        find_layers(model.base.modules, model.parameters)
    except InputError as error:
        return str(error)
    return None


def train_cohort(
    model: Adapted, jobs: list[Job], trains: Sequence[str], config: ClientConfig, tokens: int | None = None
) -> list[Done]:
    """What `model.write(job.start)` and `train` do, of all jobs; the model's own values stay as they are.

    Args:
        tokens: that a pass over the model should have, padding included; a chunk has at least one client. None is what
            there is room for.

    Raises:
        InputError: the model cannot be trained so (`cannot`, or a layer that does not keep samples apart).
        RunError: no record of a job has something to predict.
    """
    if not jobs:
        return []
    jobs = [replace(job, data=find_taught(job.data, job.private)) for job in jobs]
    problem = why_not_cohort(model, trains)
    if problem:
        raise InputError(f"run.engine=cohort: {problem}.")
    found, now = find_layers(model.base.modules, model.parameters), Pass()
    done: dict[int, Done] = {}
    model.training_mode()
    try:
        with first_token(model, jobs[0].data):
            # Typical, not longest: one long record would make every chunk small, and a pass is cut by tokens anyway.
            widths = [int(np.quantile(token_counts(model, job.data), TYPICAL)) if len(job.data) else 1 for job in jobs]
            most = most_tokens(model) if tokens is None else tokens
            shared = shared_tokens(model, jobs[0].data, tuple(trains), max(widths)) if tokens is None else tokens
            with with_parameters(found, now):
                for chunk in _split_chunks(jobs, widths, config, shared):
                    own = most if len(chunk) == 1 else shared
                    results = Chunk(model, [jobs[index] for index in chunk], trains, config, own, now).run()
                    done |= dict(zip(chunk, results, strict=True))
                    progress.step("clients", len(done), len(jobs))
    finally:
        model.base.backbone.eval()
    return [done[index] for index in range(len(jobs))]


def _split_chunks(jobs: list[Job], widths: list[int], config: ClientConfig, tokens: int) -> Iterator[list[int]]:
    """Indices of jobs that train together: like ones in steps and length, those with the most steps first.

    Args:
        widths: tokens of a long record of each job.
    """
    sizes = [min(config.micro_batch or config.batch_size, len(job.data)) for job in jobs]
    kinds = [_kind_of_job(job, config) for job in jobs]
    # Most steps first, as those that go on are a chunk's first rows.
    order = sorted(range(len(jobs)), key=lambda i: (kinds[i], -jobs[i].steps(config), -widths[i]))
    chunk: list[int] = []
    for index in order:
        together = [*chunk, index]
        rows = sum(sizes[i] for i in together) * max(widths[i] for i in together)
        if chunk and (rows > tokens or kinds[index] != kinds[chunk[0]]):
            yield chunk
            together = [index]
        chunk = together
    if chunk:
        yield chunk


def _kind_of_job(job: Job, config: ClientConfig) -> tuple[Any, ...]:
    """What all jobs of a chunk have in common: whether steps are private, the rate of each, and the steps before them
    that their optimizer counts.
    """
    rates = [] if config.schedule_over == "rounds" else job.clock.rates(config, job.steps(config))
    return job.private is None, count_of(job.moments), rates
