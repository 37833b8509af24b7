"""What saves memory changes a step by rounding only: pieces of a batch, and activations that are computed again."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from fedpeft.clients import train as training
from fedpeft.clients.cohort import chunk
from fedpeft.clients.cohort.engine import train_cohort
from fedpeft.config import load
from fedpeft.errors import InputError
from fedpeft.models.loading import load as load_base
from fedpeft.run.audit.watched import without_dropout
from support import small_models as small
from support.cohort_jobs import AB, ADAMW, ALL, EPOCHS, FEW, UNEVEN, WIDE, make_jobs, one_by_one, private
from support.per_sample import as_double

EXACT = 1e-12


def ends(model, jobs, trains, config, tokens=None):
    """Values and losses of all jobs after training, one by one or in a cohort."""
    jobs = [replace(job, private=copy.deepcopy(job.private)) for job in jobs]
    if tokens is None:
        done = one_by_one(model, jobs, trains, config)
        return [(after, loss) for after, _, loss in done]
    return [(one.after, one.loss) for one in train_cohort(model, jobs, trains, config, tokens)]


def apart(some, others):
    return max(
        max(abs(loss - other_loss), *(float((after[key] - other[key]).abs().max()) for key in after))
        for (after, loss), (other, other_loss) in zip(some, others, strict=True)
    )


def moved(done, jobs):
    return min(
        float((after[key] - job.start[key]).abs().max())
        for (after, _), job in zip(done, jobs, strict=True)
        for key in after
    )


# Pieces of a batch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noisy", [False, True], ids=["plain", "private"])
@pytest.mark.parametrize("size", [1, 3])
def test_pieces_of_a_batch_make_the_whole_batchs_step(build, monkeypatch, size, noisy):
    model = build()
    jobs = make_jobs(model, UNEVEN)
    if noisy:
        jobs = [replace(job, private=private(0.7, 0.5, k, clip=0.2)) for k, job in enumerate(jobs)]
    whole = replace(ADAMW, max_grad_norm=0.4) if noisy else replace(EPOCHS, max_grad_norm=0.4)
    pieces = replace(whole, micro_batch=size)
    expected = ends(model, jobs, ALL, whole)
    assert moved(expected, jobs) > 1e-4
    rows, loss_of = [], training.per_sample_loss

    def count(model, inputs, labels):
        rows.append(len(labels))
        return loss_of(model, inputs, labels)

    monkeypatch.setattr(training, "per_sample_loss", count)
    monkeypatch.setattr(chunk, "per_sample_loss", count)
    assert apart(ends(model, jobs, ALL, pieces), expected) < EXACT
    assert max(rows) <= size
    for tokens in (WIDE, FEW):
        rows.clear()
        assert apart(ends(model, jobs, ALL, pieces, tokens), expected) < EXACT
        assert max(rows) <= size * len(jobs)


def test_a_piece_is_not_above_the_batch():
    with pytest.raises(InputError, match=r"client\.micro_batch=17.*client\.batch_size=16"):
        load({"client": {"micro_batch": 17}})


# Activations that are computed again ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpointed(folder):
    """The same small model with checkpointing and without, float64, in training mode (dropout is off in the tests)."""

    def pair(kind):
        return [
            as_double(small.adapted(folder(kind), kind, {"gradient_checkpointing": on}, r=4)) for on in (True, False)
        ]

    return pair


def saved_bytes(model, kind):
    """Bytes that autograd keeps for the backward pass of one batch, and its gradients."""
    total = 0

    def note(tensor):
        nonlocal total
        total += tensor.nbytes
        return tensor

    model.training_mode()
    trained = model.train_roles(["A", "B"])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model.base.forward(
            {key: value.double() if value.is_floating_point() else value for key, value in small.inputs(kind).items()}
        )
    found = torch.autograd.grad(out.square().sum(), list(trained.values()))
    model.base.backbone.eval()
    return total, found


@pytest.mark.parametrize("kind", ["bert", "llama", "vit"])
def test_checkpointing_keeps_less_and_gives_the_same_steps(checkpointed, kind):
    models = checkpointed(kind)
    trains = ALL if small.HEADS[kind] else AB
    jobs = make_jobs(models[0], (5, 3, 4), kind)
    hidden = [replace(job, private=private(0.7, 0.5, k, clip=0.2)) for k, job in enumerate(jobs)]
    with without_dropout():
        for some in (jobs, hidden):
            reference = ends(models[1], some, trains, ADAMW)
            assert moved(reference, some) > 1e-4
            for tokens in (None, WIDE):
                assert apart(ends(models[0], some, trains, ADAMW, tokens), reference) < EXACT
        start = small.randomised(models[0], seed=3, scale=0.3)
        for model in models:
            model.write(start)
        (less, slopes), (all_of_it, others) = (saved_bytes(model, kind) for model in models)
    assert less < all_of_it / 2
    assert max(float((one - other).abs().max()) for one, other in zip(slopes, others, strict=True)) < EXACT


def test_a_model_that_cannot_is_refused(folder, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.BertPreTrainedModel, "supports_gradient_checkpointing", False)
    config = load({"model": {"name": str(folder("bert")), "task": small.TEXT, "gradient_checkpointing": True}})
    with pytest.raises(InputError, match=r"model\.gradient_checkpointing=true: BertForSequence.*micro_batch"):
        load_base(config.model, 3, 0)
