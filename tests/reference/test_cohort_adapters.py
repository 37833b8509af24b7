"""Adapters that are no plain LoRA in a cohort, in float64: every client ends where it would have ended alone, and a
record's gradient in its own copy of the parameters is autograd's on the record alone.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedpeft.adapters import peft_rules
from fedpeft.clients.cohort.engine import Job, train_cohort, why_not_cohort
from fedpeft.privacy.gradients import linear_owners, ruled_owners
from support import per_sample
from support.cohort_jobs import ADAMW, EXACT, SGD, UNEVEN, WIDE, check, private, records
from support.peft_types import FITTING, ROLES, adapted

BAT = {"r": 4, "init_weights": "bat"}
CASES = [
    ("bert", "LORA", {"use_dora": True}),
    ("llama", "LORA", {"use_dora": True}),
    ("bert", "LORA", {"init_lora_weights": "mica"}),
    ("bert", "IA3", {}),
    ("bert", "IA3", {"target_modules": ["query", "value"], "feedforward_modules": ["value"]}),
    ("gpt2", "IA3", {}),
    ("bert", "BEFT", {}),
    ("bert", "LN_TUNING", {}),
    ("llama", "LN_TUNING", {}),
    ("bert", "VERA", {}),
    ("vit", "VERA", {}),
    ("bert", "DELORA", {}),
    ("bert", "MISS", {}),
    ("bert", "MISS", {"r": 5}),  # 16 inputs are no blocks of 5
    ("bert", "MISS", {"r": 4, "init_weights": "mini", "mini_r": 2}),
    ("bert", "FOURIERFT", {}),
    ("vit", "SHIRA", {}),
]
# Of these peft, or transformers, computes a part in float32 whatever the dtype is.
SINGLE = {("bert", "FOURIERFT"): 1e-5, ("llama", "LN_TUNING"): 1e-5}


@pytest.fixture(scope="module")
def make(folder):
    def made(kind, name, options):
        model = adapted(folder(kind), name, {**FITTING.get(name, {}), **options}, kind)
        per_sample.as_double(model)
        per_sample.without_dropout(model)
        return model

    return made


def moved(model, seed, scale=0.2):
    draw, state = torch.Generator().manual_seed(seed), model.state().select(ROLES)
    return {
        key: value + scale * torch.randn(value.shape, generator=draw, dtype=value.dtype)
        for key, value in state.tensors.items()
    }


def jobs_of(model, kind, sizes=UNEVEN):
    return [Job(moved(model, seed=k), records(kind, size, k), seed=100 + k) for k, size in enumerate(sizes)]


@pytest.mark.parametrize(("kind", "name", "options"), CASES)
def test_clients_end_where_they_would_alone(make, kind, name, options):
    model = make(kind, name, options)
    jobs, trains = jobs_of(model, kind), [role for role in ROLES if model.form.select([role]).tensors]
    assert why_not_cohort(model, trains) is None
    limit = SINGLE.get((kind, name), EXACT)
    check(model, jobs, trains, SGD, limit=limit)
    check(model, [replace(job, private=private(1.5, 0.5, k)) for k, job in enumerate(jobs)], trains, SGD, limit=limit)


def test_adamw_too(make):
    model = make("bert", "IA3", {})
    check(model, jobs_of(model, "bert"), ROLES, ADAMW)


@pytest.mark.parametrize(("kind", "name", "options"), CASES)
def test_gradients_of_records_are_autograds_in_one_pass(make, kind, name, options):
    model = make(kind, name, options)
    parameters, data = model.train_roles(ROLES), per_sample.records(kind)
    model.write(model.state().replace(moved(model, 1)))
    assert linear_owners(model.base.modules, parameters) is None or options.get("init_lora_weights") == "mica"
    assert ruled_owners(model.base.modules, parameters) is not None
    loss = per_sample.loss_of(model)
    fast, losses = per_sample.per_sample_gradients(
        model.base.modules, parameters, loss, *per_sample.batch(data), model.base.objective.rows
    )
    slow, expected = per_sample.one_by_one(parameters, loss, data)
    tolerance = SINGLE.get((kind, name), EXACT) * float(slow.abs().max())
    assert float(slow.abs().amax(1).min()) > 1e-3
    torch.testing.assert_close(fast, slow, atol=tolerance, rtol=0)
    torch.testing.assert_close(losses, expected, atol=tolerance, rtol=0)


def test_the_norm_of_dora_is_that_of_the_dense_sum():
    draw = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((7, 5), (3, 2, 5), (3, 7, 2)))
    norms = peft_rules.norm_rows(W, A, B, 1.7)
    torch.testing.assert_close(norms, torch.linalg.norm(W + 1.7 * B @ A, dim=-1), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("MISS", BAT, "has no rule for many clients"),
        ("PEANUT", {}, "has no rule for many clients"),
        ("LORA", {"bias": "lora_only"}, "trains base_layer.bias, which its kind has no rule for"),
        ("LORA", {"use_dora": True, "lora_dropout": 0.1}, "has no rule for many clients"),
    ],
)
def test_what_has_no_rule_is_named(make, name, options, said):
    model = make("bert", name, options)
    assert said in str(why_not_cohort(model, ROLES))
    with pytest.raises(Exception, match=r"run\.engine=cohort: .*rule"):
        train_cohort(model, jobs_of(model, "bert"), ROLES, SGD, WIDE)
