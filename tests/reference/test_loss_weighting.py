"""client.loss_weighting=token: a step's gradient is that of the mean over all tokens of its batch, in both engines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedpeft import config as configs
from fedpeft.clients.cohort.engine import Job, train_cohort
from fedpeft.clients.train import index_batches, plain_steps, train
from fedpeft.config import ClientConfig
from fedpeft.errors import InputError
from fedpeft.seeds import numpy_generator
from support import small_models as small

ROLES = ("A", "B")


@pytest.fixture
def model(tmp_path):
    adapted = small.adapted(small.save("llama", tmp_path / "llama"), "llama")
    for value in [*adapted.base.backbone.parameters(), *adapted.parameters.values()]:
        value.data = value.data.double()
    for key, value in small.randomised(adapted).tensors.items():
        adapted.parameters[key].data = value.double()
    return adapted


def config(**more):
    options = {"optimizer": "sgd", "lr": 0.1, "batch_size": 4, "local_steps": 2, "local_epochs": None}
    return ClientConfig(**{**options, "loss_weighting": "token", **more})


def token_mean(model, data, index):
    """Cross-entropy of each text by itself, summed over its tokens; the sum of all over the number of all."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in index:
        inputs, labels = data.batch(np.array([row]))
        logits = model.base.forward(inputs)[0, :-1]
        total = total + F.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
        count += int((labels[0, 1:] != -100).sum())
    return total / count


@pytest.mark.parametrize("micro", [None, 1, 3])
def test_the_gradient_is_that_of_the_mean_over_all_tokens_of_the_batch(model, micro):
    data, setting = small.texts(9, causal=True), config(micro_batch=micro, local_steps=1)
    parameters = model.train_roles(ROLES)
    (index,) = index_batches(len(data), setting, numpy_generator(3, "batches"))
    expected = torch.autograd.grad(token_mean(model, data, index), list(parameters.values()))
    steps = plain_steps(model, data, parameters, setting, numpy_generator(3, "batches"), torch.device("cpu"))
    gradients, losses = next(steps)
    for value, key in zip(expected, parameters, strict=True):
        assert torch.allclose(gradients[key], value, rtol=1e-10, atol=1e-13)
    assert float(sum(losses)) == pytest.approx(float(token_mean(model, data, index).detach()))


def trained(model, data, setting):
    start = model.state()
    steps, loss = train(model, data, ROLES, setting, 5)
    after = model.state()
    model.write(start)
    return after.tensors, steps, loss


@pytest.mark.parametrize("micro", [None, 2])
def test_the_cohort_ends_where_one_client_after_another_ends(model, micro):
    parts, setting = [small.texts(7, causal=True), small.texts(5, causal=True, seed=2)], config(micro_batch=micro)
    alone = [trained(model, data, setting) for data in parts]
    start = {key: value.detach().clone() for key, value in model.parameters.items()}
    together = train_cohort(model, [Job(start, data, 5) for data in parts], ROLES, setting, 40)
    for (after, steps, loss), done in zip(alone, together, strict=True):
        assert done.steps == steps and done.loss == pytest.approx(loss)
        for key, value in done.after.items():
            assert torch.allclose(value.double(), after[key].double(), rtol=1e-6, atol=1e-9)


def test_records_and_tokens_weigh_differently(model):
    data = small.texts(7, causal=True)
    one, other = (trained(model, data, config(loss_weighting=how))[0] for how in ("record", "token"))
    assert any(not torch.allclose(one[key], other[key], rtol=1e-4) for key in one)


def test_token_weighting_is_refused_where_records_are_protected_and_where_there_are_no_tokens():
    lm = {"model": {"name": "tiny-llama", "task": "causal-lm"}, "client": {"loss_weighting": "token"}}
    private = {"privacy": {"unit": "sample", "noise_multiplier": 1.0}}
    with pytest.raises(InputError, match=r"client\.loss_weighting=token: with privacy\.unit=sample"):
        configs.load(
            {**lm, **private}, {"client.local_steps": 2, "client.local_epochs": None, "strategy.weighting": "uniform"}
        )
    with pytest.raises(InputError, match=r"client\.loss_weighting=token: of language models"):
        configs.load({"client": {"loss_weighting": "token"}})
    with pytest.raises(InputError, match=r"evaluation\.generate\.records=3: of language models"):
        configs.load({"evaluation": {"generate": {"records": 3}}})
