"""A cohort against its clients trained one after another, in float64: every client ends where it would have ended."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.adapters.grouped import Pass, find_layers, with_parameters
from fedpeft.clients.cohort.engine import train_cohort, why_not_cohort
from fedpeft.clients.rates import Clock
from fedpeft.clients.train import per_sample_loss
from fedpeft.errors import InputError
from fedpeft.privacy.gradients import per_sample_gradients
from support import small_models as small
from support.cohort_jobs import (
    AB,
    ADAMW,
    ALL,
    EPOCHS,
    EVEN,
    EXACT,
    HEAVY,
    SGD,
    UNEVEN,
    WIDE,
    check,
    difference,
    make_jobs,
    one_by_one,
    private,
    records,
)
from support.sample import sampled

# Step by step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, case",
    sampled(
        ["bert", "roberta", "vit", "llama", "gpt2"],
        [*product(["sgd", "momentum", "adamw", "epochs"], ["even", "uneven"])],
        keep=2,
    ),
)
def test_equals_clients_one_by_one(build, kind, case):
    model, (config, sizes) = build(kind), case
    config = {"sgd": SGD, "momentum": HEAVY, "adamw": ADAMW, "epochs": EPOCHS}[config]
    sizes = {"even": EVEN, "uneven": UNEVEN}[sizes]
    check(model, make_jobs(model, sizes, kind), ALL if small.HEADS[kind] else AB, config)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_equal_after_every_step(build, steps):
    model = build()
    check(model, make_jobs(model, EVEN), ALL, replace(ADAMW, local_steps=steps))


def test_moments_stay_with_those_who_go_on(build):
    model = build()
    check(model, make_jobs(model, UNEVEN), ALL, replace(ADAMW, local_steps=None, local_epochs=3))


@pytest.mark.parametrize(
    "method, trains",
    [
        ("lora", ["B", "head"]),
        ("lora", ["A"]),
        ("lora", ["B"]),
        ("lora", ["head"]),
        ("lora_sb", ["R", "head"]),
        ("lora_sb", ["R"]),
    ],
)
@pytest.mark.parametrize("same", [True, False], ids=["shared", "own"])
def test_what_does_not_train_is_the_clients_own(build, method, trains, same):
    model = build(method=method)
    jobs = make_jobs(model, UNEVEN)
    if same:
        frozen = {key for key in model.parameters if key not in model.form.select(trains).tensors}
        jobs = [replace(job, start={**job.start, **{key: jobs[0].start[key] for key in frozen}}) for job in jobs]
    check(model, jobs, trains, SGD)
    check(model, jobs, trains, replace(EPOCHS, batch_size=1))  # one sample of each client: factors are not gathered


def test_proximal_term_control_and_norm(build):
    model = build()
    jobs = [
        replace(job, proximal=mu, offset=control)
        for job, mu, control in zip(
            make_jobs(model, UNEVEN),
            (0.0, 0.5, 2.0, 0.1),
            (None, small.offsets(model), small.offsets(model, seed=8), None),
            strict=True,
        )
    ]
    check(model, jobs, ALL, SGD)
    check(model, jobs, ALL, replace(EPOCHS, max_grad_norm=0.3))


@pytest.mark.parametrize("over", ["rounds", "steps", "round"])
def test_rates_of_a_schedule(build, over):
    """Clients with unlike numbers of steps have unlike rates where steps count."""
    model, config = build(), replace(EPOCHS, schedule="cosine", schedule_over=over, min_lr=0.01, warmup_rounds=0.4)
    jobs = [replace(job, clock=Clock(2, 3)) for job in make_jobs(model, UNEVEN)]
    check(model, jobs, ALL, config)
    constant = one_by_one(model, jobs, ALL, EPOCHS)
    scheduled = train_cohort(model, jobs, ALL, config, WIDE)
    assert all(
        any(not torch.allclose(done.after[key], after[key]) for key in after)
        for done, (after, *_) in zip(scheduled, constant, strict=True)
    )


def test_nesterov(build):
    model = build()
    config = replace(HEAVY, optimizer_options={"nesterov": True})
    check(model, make_jobs(model, UNEVEN), ALL, replace(config, local_steps=None, local_epochs=2))


def test_norm_is_a_clients_own(build):
    """One client's huge gradient does not shrink another's."""
    model = build()
    jobs = make_jobs(model, EVEN)
    huge = {key: 1e6 * value for key, value in small.offsets(model).items()}
    config = replace(SGD, max_grad_norm=0.5)
    alone = train_cohort(model, jobs[:1], ALL, config, WIDE)[0]
    beside = train_cohort(model, [jobs[0], replace(jobs[1], offset=huge)], ALL, config, WIDE)[0]
    assert max(float((alone.after[key] - beside.after[key]).abs().max()) for key in alone.after) < EXACT


def test_unequal_ranks(build):
    model = build()
    jobs = make_jobs(model, UNEVEN)
    for job, rank in zip(jobs, (1, 4, 2, 3), strict=True):
        for key, value in job.start.items():
            if key.endswith("/A"):
                job.start[key] = value[:rank]
            if key.endswith("/B"):
                job.start[key] = value[:, :rank]
        job.offset = {key: 0.05 * value for key, value in job.start.items()}
    check(model, jobs, ALL, SGD)
    check(model, jobs, ALL, ADAMW)


def test_clients_do_not_touch_each_other(build):
    """Order and company of the jobs do not matter."""
    model = build()
    jobs = make_jobs(model, UNEVEN)
    together = train_cohort(model, jobs, ALL, EPOCHS, WIDE)
    backwards = train_cohort(model, jobs[::-1], ALL, EPOCHS, WIDE)[::-1]
    alone = [train_cohort(model, [job], ALL, EPOCHS, WIDE)[0] for job in jobs]
    for one, two, three in zip(together, backwards, alone, strict=True):
        assert all(torch.allclose(one.after[key], two.after[key], rtol=0, atol=EXACT) for key in one.after)
        assert all(torch.allclose(one.after[key], three.after[key], rtol=0, atol=EXACT) for key in one.after)
    for i in range(len(jobs)):
        for j in range(i):
            assert (
                min(float((together[i].after[key] - together[j].after[key]).abs().max()) for key in together[i].after)
                > 1e-3
            )


@settings(deadline=None, max_examples=15)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), batch=st.integers(1, 5), tokens=st.integers(1, 120))
def test_any_cohort(build, sizes, batch, tokens):
    model = build()
    check(model, make_jobs(model, sizes), ALL, replace(EPOCHS, local_epochs=1, batch_size=batch), (tokens,))


# Differential privacy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, sigma", sampled(["bert", "roberta", "vit", "llama"], [0.0, 1.5]))
def test_private_equals_clients_one_by_one(build, kind, sigma):
    model = build(kind)
    jobs = [
        replace(job, private=private(sigma, rate, k, clip))
        for k, (job, rate, clip) in enumerate(
            zip(make_jobs(model, (9, 6, 30, 5), kind), (0.5, 0.2, 0.6, 1.0), (0.05, 0.5, 5.0, 0.5), strict=True)
        )
    ]
    trains = ALL if small.HEADS[kind] else AB
    check(model, jobs, trains, SGD)
    check(model, jobs, trains, replace(ADAMW, max_grad_norm=0.4))


def test_empty_samples_are_steps_of_noise(build):
    model = build()
    jobs = [
        replace(job, private=private(1.0, 0.0 if k < 2 else 0.05, k)) for k, job in enumerate(make_jobs(model, EVEN))
    ]
    check(model, jobs, ALL, SGD)
    done = train_cohort(model, [replace(job, private=private(0.0, 0.0, 0)) for job in jobs[:2]], ALL, SGD, WIDE)
    assert all(math.isnan(one.loss) and one.steps == 4 for one in done)
    assert all(
        torch.equal(one.after[key], job.start[key].double())
        for one, job in zip(done, jobs, strict=False)
        for key in one.after
    )


def test_private_and_other_jobs_in_one_call(build):
    model = build()
    jobs = make_jobs(model, EVEN)
    jobs[1].private = private(1.0, 0.5, 1)
    jobs[2].private = private(1.0, 0.2, 2)
    check(model, jobs, ALL, SGD)


def test_record_without_a_finite_gradient_has_no_influence(build):
    model = build("vit")
    jobs = [replace(job, private=private(0.0, 1.0, k)) for k, job in enumerate(make_jobs(model, (5, 5), "vit"))]
    clean = train_cohort(model, [replace(jobs[0], data=jobs[0].data.view(np.arange(4))), jobs[1]], ALL, SGD, WIDE)
    jobs[0].data.inputs["pixel_values"][4] = math.nan
    spoiled = train_cohort(model, jobs, ALL, SGD, WIDE)
    for one, two in zip(clean, spoiled, strict=True):
        assert all(torch.allclose(one.after[key], two.after[key], rtol=0, atol=EXACT) for key in one.after)


@pytest.mark.parametrize(
    "kind, method", [("bert", "lora"), ("roberta", "lora"), ("vit", "lora"), ("llama", "lora"), ("bert", "lora_sb")]
)
def test_per_sample_gradients_are_autograds(build, kind, method):
    """Each sample's gradient in its own copy of the factors, against the sample alone and the hooks of privacy."""
    model = build(kind, method)
    state = small.randomised(model, scale=0.3)
    model.write(state)
    trained = model.train_roles([role for role in ("A", "B", "R", "head") if model.form.select([role]).tensors])
    data = records(kind, 5, 0)
    inputs, labels = data.batch(np.arange(5))
    leaves = {key: value.detach().expand(5, *value.shape).clone().requires_grad_() for key, value in trained.items()}
    with with_parameters(find_layers(model.base.modules, model.parameters), Pass(5, 5, leaves)):
        losses = per_sample_loss(model, inputs, labels)
        mine = torch.cat([slope.flatten(1) for slope in torch.autograd.grad(losses.sum(), list(leaves.values()))], 1)
    hooks, each = per_sample_gradients(
        model.base.modules, trained, lambda *batch: per_sample_loss(model, *batch), inputs, labels
    )
    alone = []
    for n in range(5):
        loss = per_sample_loss(model, {key: value[n : n + 1] for key, value in inputs.items()}, labels[n : n + 1])
        alone.append(torch.cat([slope.flatten() for slope in torch.autograd.grad(loss.sum(), list(trained.values()))]))
    assert float((losses.detach() - each).abs().max()) < EXACT
    assert float((mine - torch.stack(alone)).abs().max()) < EXACT
    assert float((mine - hooks).abs().max()) < EXACT
    assert float(mine.abs().amax(1).min()) > 1e-3


# Precision ------------------------------------------------------------------------------------------------------------


def test_float32(build):
    model = build(dtype=torch.float32)
    check(model, make_jobs(model, UNEVEN), ALL, SGD, limit=1e-6)


def test_bfloat16_base_keeps_adapters_in_float32(build, tmp_path):
    single = build(dtype=torch.float32)
    half = small.adapted(small.save("bert", tmp_path), "bert", model={"dtype": "bfloat16"}, r=4)
    half.training_mode = lambda: None
    jobs = make_jobs(single, UNEVEN)
    for options in ({}, {"private": private(0.0, 1.0, 0)}):
        chosen = [replace(job, **options) for job in jobs]
        one, two = (train_cohort(model, chosen, ALL, replace(SGD, lr=0.05), WIDE) for model in (single, half))
        for job, exact, rough in zip(jobs, one, two, strict=True):
            assert all(value.dtype == torch.float32 for value in rough.after.values())
            moved = torch.cat([(exact.after[key] - job.start[key]).flatten() for key in exact.after])
            error = torch.cat([(exact.after[key] - rough.after[key]).flatten() for key in exact.after])
            assert 0 < float(error.norm()) < 0.05 * float(moved.norm())


# The model stays what it is -------------------------------------------------------------------------------------------


def snapshot(model, jobs):
    values = [parameter for root in model.base.modules for parameter in root.parameters()]
    values += model.parameters.values()
    return (
        [value.detach().clone() for value in values],
        [value.requires_grad for value in values],
        [{key: value.clone() for key, value in job.start.items()} for job in jobs],
    )


def test_nothing_is_changed(build):
    model = build()
    jobs = make_jobs(model, UNEVEN)
    before = snapshot(model, jobs)
    train_cohort(model, jobs, ALL, SGD, WIDE)
    after = snapshot(model, jobs)
    assert all(torch.equal(one, two) for one, two in zip(before[0], after[0], strict=True)) and before[1] == after[1]
    assert all(torch.equal(one[key], two[key]) for one, two in zip(before[2], after[2], strict=True) for key in one)
    assert not any("forward" in vars(module) for root in model.base.modules for module in root.modules())


def test_forwards_come_back_after_an_exception(build, monkeypatch):
    model = build()
    inputs = small.inputs("bert")
    expected = model.logits(inputs)

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("fedpeft.clients.cohort.chunk.per_sample_loss", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        train_cohort(model, make_jobs(model, EVEN), ALL, SGD, WIDE)
    assert torch.equal(model.logits(inputs), expected)


def test_dropout_is_a_function_of_the_jobs(build, tmp_path):
    model = small.adapted(small.save("bert", tmp_path), "bert", r=4, dropout=0.2)
    jobs = make_jobs(model, EVEN)
    state = torch.get_rng_state()
    one, two = (train_cohort(model, jobs, ALL, SGD, WIDE) for _ in range(2))
    other = train_cohort(model, [replace(jobs[0], seed=jobs[0].seed + 1), *jobs[1:]], ALL, SGD, WIDE)
    assert torch.equal(torch.get_rng_state(), state) and not model.base.backbone.training
    assert all(torch.equal(a.after[key], b.after[key]) for a, b in zip(one, two, strict=True) for key in a.after)
    assert not torch.equal(one[1].after["classifier/weight"], other[1].after["classifier/weight"])
    assert difference(train_cohort(model, jobs[:1], ALL, SGD, WIDE), one_by_one(model, jobs[:1], ALL, SGD)) < 2e-6


def test_no_jobs(build):
    assert train_cohort(build(), [], ALL, SGD, WIDE) == []


# Refusals -------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_batched_is_named(build, tmp_path):
    model = build()
    assert why_not_cohort(model, ALL) is None and why_not_cohort(build(method="lora_sb"), ["R", "head"]) is None
    assert "R" in why_not_cohort(model, ["R"])
    model = small.adapted(small.save("bert", tmp_path), "bert", r=4)
    norm = model.base.backbone.bert.encoder.layer[0].output.LayerNorm
    model.parameters["norm/head"] = norm.weight
    assert "LayerNorm" in why_not_cohort(model, ALL)
    with pytest.raises(InputError, match="LayerNorm"):
        train_cohort(model, make_jobs(build(), EVEN), ALL, SGD, WIDE)


def test_layer_that_does_not_keep_samples_apart_is_named(build):
    model = build()
    now = Pass(rows=2, groups=2, values=dict(model.parameters))
    found = find_layers(model.base.modules, model.parameters)
    with with_parameters(found, now), pytest.raises(InputError, match="rows"):
        found[0].module(torch.zeros(6, small.WIDTH, dtype=torch.float64))
