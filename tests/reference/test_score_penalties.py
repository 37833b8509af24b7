"""Penalties over scores: against their formula by a second, bare model; each record's own; in both engines."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.clients.cohort.engine import Job
from fedpeft.clients.train import per_sample_loss, train
from fedpeft.errors import InputError
from support import own_adapters, per_sample
from support import small_models as small
from support.cohort_jobs import SGD, UNEVEN, check, private, records

WEIGHTS = {"consistency": 0.7, "diversity": 0.4}
CASES = [("gpt2", "lora"), ("llama", "paca"), ("llama", "bottleneck")]


@pytest.fixture
def make(tmp_path):
    def made(kind, adapter, weights=WEIGHTS):
        section = {} if weights is None else {"penalty": "ba_lora", "penalty_options": weights}
        return own_adapters.in_double(tmp_path, kind, adapter, **section)

    return made


def trained_of(adapter):
    return ["A", "B"] if adapter == "lora" else list(registry.load("adapters", adapter).averages)


def start_of(model, adapter, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return {
        key: value + 0.2 * torch.randn(value.shape, generator=draw, dtype=value.dtype)
        for key, value in model.state().select(trained_of(adapter)).tensors.items()
    }


@pytest.mark.parametrize(("kind", "adapter"), CASES)
def test_a_records_term_is_that_of_the_formula(kind, adapter, make):
    model, plain, bare = make(kind, adapter), make(kind, adapter, None), make(kind, adapter, None)
    start = start_of(model, adapter)
    for one in (model, plain):
        one.write(one.state().replace(start))
    inputs, labels = per_sample.batch(records(kind, 5, 1))
    term = per_sample_loss(model, inputs, labels) - per_sample_loss(plain, inputs, labels)
    scores, targets = plain.base.objective.pair(plain.logits(inputs), labels)
    before, _ = plain.base.objective.pair(bare.logits(inputs), labels)
    for n, wanted in enumerate(term):
        each = []
        for score, old, target in zip(scores[n], before[n], targets[n], strict=True):
            if int(target) != -100:
                p, q = score.softmax(-1), old.softmax(-1)
                each.append(0.7 * (q * (q / p).log()).sum() + 0.4 * (p * p.log()).sum())
        torch.testing.assert_close(wanted, torch.stack(each).mean(), rtol=1e-9, atol=1e-10)
    assert float(term.abs().min()) > 1e-3


@pytest.mark.parametrize(("kind", "adapter"), CASES)
def test_a_cohort_is_one_after_another_and_records_have_their_own_gradients(kind, adapter, make):
    model = make(kind, adapter)
    trains = trained_of(adapter)
    jobs = [
        Job(start_of(model, adapter, 10 + k), records(kind, size, k), seed=100 + k) for k, size in enumerate(UNEVEN)
    ]
    config = replace(SGD, lr=0.05, local_steps=2)
    check(model, jobs, trains, config, limit=1e-10)
    jobs = [replace(job, private=private(1.5, 0.5, k)) for k, job in enumerate(jobs)]
    check(model, jobs, trains, config, limit=1e-10)
    model.write(model.state().replace(start_of(model, adapter)))
    per_sample.compare(model, model.train_roles(trains), per_sample.records(kind))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_base_alone_is_the_base_whatever_has_been_learned_and_nothing_stays_switched(kind, make, tmp_path):
    model, untrained = make(kind, "lora"), make(kind, "lora", None)
    inputs = small.inputs(kind)
    model.write(model.state().replace(start_of(model, "lora")))
    learned = model.logits(inputs)
    model.base.backbone.train()
    torch.testing.assert_close(model.bare_logits(inputs), untrained.logits(inputs), rtol=1e-9, atol=1e-10)
    assert model.base.backbone.training and float((learned - untrained.logits(inputs)).abs().max()) > 1e-2
    model.base.backbone.eval()
    torch.testing.assert_close(model.logits(inputs), learned, rtol=0, atol=0)


def test_consistency_keeps_a_model_near_its_base(make):
    data, config = records("gpt2", 8, 1), replace(SGD, lr=0.3, local_steps=30)
    moved = {}
    for name, weights in {"free": None, "held": {"consistency": 5.0, "diversity": 0.0}}.items():
        model = make("gpt2", "lora", weights)
        train(model, data, ["A", "B"], config, seed=1)
        inputs = small.inputs("gpt2")
        moved[name] = float((model.logits(inputs) - model.bare_logits(inputs)).square().mean())
    assert moved["held"] < 0.5 * moved["free"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"adapter\.penalty=ba_lora: it compares what a language model says.*model\.task=image-classification"),
        ({"model": {"name": "tiny-llama", "task": "causal-lm"}, "strategy": "flora"}, "strategy flora moves the base"),
        (
            {"model": {"name": "tiny-llama", "task": "causal-lm"}, "adapter": {"name": "soma", "penalty": "ba_lora"}},
            r"adapter\.name=soma moves the base weights",
        ),
    ],
)
def test_what_it_cannot_be_compared_with_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        configs.load({"adapter": {"penalty": "ba_lora"}, **changes})
