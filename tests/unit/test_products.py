"""Products of a frozen base by oneDNN are torch's but for rounding, and only where they are for."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedpeft.clients.cohort.engine import train_cohort
from fedpeft.models import products
from support import small_models as small
from support.cohort_jobs import ALL, EVEN, SGD, WIDE, difference, make_jobs, one_by_one, private

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="a torch without oneDNN")
ROUNDING = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def calls(monkeypatch):
    """The shapes of what oneDNN multiplies, on whatever processor this is."""
    seen, forward = [], products._Product.forward

    def watch(ctx, x, weight, bias):
        seen.append((x.numel() // x.shape[-1], *weight.shape))
        return forward(ctx, x, weight, bias)

    monkeypatch.setattr(products, "gains_by_onednn", lambda: True)
    monkeypatch.setattr(products._Product, "forward", staticmethod(watch))
    return seen


@pytest.fixture
def of_any_size(monkeypatch):
    monkeypatch.setattr(products, "LEAST", 1)
    monkeypatch.setattr(products, "ROWS", 4)


def layer(outputs=256, inputs=256, bias=True):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("shape", [(128, 256), (4, 50, 256), (2, 3, 90, 256), (1300, 256)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_of_both_orders_are_those_of_float64(calls, shape, bias):
    module, x = layer(320, bias=bias), torch.randn(shape, requires_grad=True)
    products.hasten_products(module)
    upstream = torch.randn(*shape[:-1], 320)

    def all_of(module, x, upstream):
        y = module(x)
        (slope,) = torch.autograd.grad(y.square(), x, upstream, create_graph=True)
        return y, slope, *torch.autograd.grad(slope.square().sum(), x)

    exact = copy.deepcopy(layer(320, bias=bias)).double()
    for own, other in zip(
        all_of(module, x, upstream), all_of(exact, x.detach().double().requires_grad_(), upstream.double()), strict=True
    ):
        torch.testing.assert_close(own.double(), other, **ROUNDING)
    rows = x.numel() // 256
    assert calls[:2] == [(rows, 320, 256), (rows, 256, 320)]


def test_rows_are_filled_up_to_few_numbers(calls, monkeypatch):
    given = []
    op = SimpleNamespace(_linear_pointwise=lambda x, *_: given.append(len(x)) or x.new_zeros(len(x), 256))
    monkeypatch.setattr(torch.ops, "mkldnn", op, raising=False)
    for rows in range(128, 4097):
        assert products.multiply(torch.zeros(rows, 256), layer().weight).shape == (rows, 256)
        assert rows <= given[-1] <= max(rows + 127, rows * 1.125)
    assert len(set(given)) <= 24


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.ones(127, 256), torch.ones(512, 256)),  # few rows
        (torch.ones(128, 128), torch.ones(128, 128)),  # little work
        (torch.ones(4096, 256), torch.ones(63, 256)),  # few columns
        (torch.ones(256, 256).double(), torch.ones(256, 256).double()),
        (torch.ones(256, 256).bfloat16(), torch.ones(256, 256).bfloat16()),
        (torch.ones(0, 256), torch.ones(256, 256)),
    ],
)
def test_all_else_is_torchs(calls, x, weight):
    assert torch.equal(products.multiply(x, weight), functional.linear(x, weight)) and not calls


def test_what_is_trained_is_multiplied_and_differentiated_by_torch(calls):
    module = layer()
    products.hasten_products(module)
    for parameter in module.parameters():
        parameter.requires_grad_()
        module(torch.ones(256, 256)).sum().backward()
        assert not calls and float(parameter.grad.sum()) == pytest.approx(256 * parameter.numel())
        parameter.requires_grad_(False)


def test_a_weight_that_is_written_into_counts_and_copies_have_their_own(calls):
    module = layer()
    products.hasten_products(module)
    twin, x = copy.deepcopy(module), torch.ones(128, 256)
    module.weight.zero_(), module.bias.fill_(2.0)
    assert torch.equal(module(x), torch.full((128, 256), 2.0)) and not torch.equal(twin(x), module(x))
    assert len(calls) == 3


def test_other_kinds_of_layers_narrow_ones_and_other_processors_are_left_alone(calls, monkeypatch):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(256, 256), nn.Linear(256, 63), nn.LayerNorm(63))
    products.hasten_products(model)
    monkeypatch.setattr(products, "gains_by_onednn", lambda: False)
    products.hasten_products(model.append(layer()))
    assert not any("forward" in vars(module) for module in model.modules())
    products.multiply(torch.ones(256, 256), layer().weight)
    assert not calls


@pytest.mark.parametrize(
    ("about", "capability", "gains"),
    [
        ("vendor_id : AuthenticAMD", "AVX512", True),
        ("vendor_id : AuthenticAMD", "AVX2", False),
        ("vendor_id : GenuineIntel", "AVX512", False),
    ],
)
@pytest.mark.parametrize("listed", [True, False])
def test_the_processor_decides(monkeypatch, about, capability, gains, listed):
    file = SimpleNamespace(is_file=lambda: listed, read_text=lambda: about)
    monkeypatch.setattr(products, "Path", lambda path: file)
    monkeypatch.setattr(products.platform, "processor", lambda: about)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products.gains_by_onednn.__wrapped__() == gains


@pytest.mark.parametrize("dp", [False, True])
def test_a_cohort_and_its_clients_one_by_one_end_alike(calls, of_any_size, tmp_path, dp):
    model = small.adapted(small.save_wide("bert", tmp_path), "bert", r=2)
    model.training_mode = lambda: None  # without dropout
    config = replace(SGD, lr=0.01)  # rounding grows with the steps

    def jobs():
        return [
            replace(job, private=private(0.5, 0.5, k) if dp else None) for k, job in enumerate(make_jobs(model, EVEN))
        ]

    ends, alone = one_by_one(model, jobs(), ALL, config), len(calls)
    apart = difference(train_cohort(model, jobs(), ALL, config, WIDE), ends)
    moved = [
        max(float((after[key] - job.start[key]).abs().max()) for key in after)
        for job, (after, *_) in zip(jobs(), ends, strict=True)
    ]
    assert apart < min(moved) / 100 and alone and len(calls) > alone
