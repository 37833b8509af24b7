"""Jobs of a cohort's clients, and the reference: every client trained by itself."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch

from fedpeft import seeds
from fedpeft.clients.cohort.engine import Job, train_cohort
from fedpeft.clients.train import Private, train
from fedpeft.config import ClientConfig
from fedpeft.data.encode import Encoded
from fedpeft.privacy.ledger import Budget
from fedpeft.privacy.noise import Seeded
from fedpeft.privacy.plan import Plan
from fedpeft.state import AdapterState
from support import small_models as small

SGD = ClientConfig(optimizer="sgd", lr=0.2, local_steps=4, local_epochs=None, batch_size=4)
HEAVY = replace(SGD, momentum=0.9, weight_decay=0.05)
ADAMW = replace(SGD, optimizer="adamw", lr=0.01, weight_decay=0.1)
EPOCHS = replace(HEAVY, local_steps=None, local_epochs=2)  # clients leave at different steps, their moments with them
ALL, AB = ["A", "B", "head"], ["A", "B"]
EVEN, UNEVEN = (8, 8, 8, 8), (9, 3, 8, 1)
EXACT = 1e-12
FEW, WIDE = 40, 10**6  # tokens: chunks and passes of one or two clients; everything at once


def records(kind, count, seed):
    if kind == "vit":
        draw = seeds.torch_generator(seed, "images")
        images = torch.randn(count, 1, 8, 8, generator=draw, dtype=torch.float64)
        return Encoded({"pixel_values": images}, torch.randint(0, small.LABELS, (count,), generator=draw))
    return small.texts(count, small.KINDS[kind][0] == small.LM, seed)


def make_jobs(model, sizes, kind="bert", **options):
    return [
        Job(
            dict(small.randomised(model, seed=10 + k, scale=0.3).tensors),
            records(kind, size, k),
            seed=100 + k,
            **options,
        )
        for k, size in enumerate(sizes)
    ]


def one_by_one(model, jobs, trains, config):
    """What `train` makes of each job."""
    ends = []
    for job in jobs:
        model.write(AdapterState(job.start, model.sites))
        steps, loss = train(model, job.data, trains, config, job.seed, **job.settings)
        ends.append((model.read(AdapterState(job.start, model.sites).select(trains)).tensors, steps, loss))
    return ends


def private(sigma, rate, k, clip=0.5, expected=4.0):
    return Private(Plan(rate, expected, clip, sigma, 100, Budget(8.0, 1e-5, "rdp")), Seeded(k, "source"))


def difference(done, ends):
    """Largest difference of a value or a loss."""
    worst = 0.0
    for mine, (after, steps, loss) in zip(done, ends, strict=True):
        assert mine.steps == steps and mine.after.keys() == after.keys()
        assert math.isnan(loss) == math.isnan(mine.loss)
        worst = max(worst, 0.0 if math.isnan(loss) else abs(mine.loss - loss))
        for key, value in after.items():
            assert mine.after[key].shape == value.shape and mine.after[key].device.type == "cpu"
            worst = max(worst, float((mine.after[key] - value).abs().max()))
    return worst


def check(model, jobs, trains, config, tokens=(WIDE, FEW), limit=EXACT):
    twin = [replace(job, private=copy.deepcopy(job.private)) for job in jobs]
    ends = one_by_one(model, twin, trains, config)
    for job, (after, steps, _) in zip(jobs, ends, strict=True):  # equal because nothing happened would prove nothing
        for key, value in after.items():
            assert not steps or not torch.equal(value, job.start[key].to(value)), key
    for budget in tokens:
        again = [replace(job, private=copy.deepcopy(job.private)) for job in jobs]
        assert difference(train_cohort(model, again, trains, config, budget), ends) < limit
