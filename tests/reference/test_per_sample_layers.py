"""Per-sample gradients of parameters outside of linear layers, and of linear layers used in uncommon ways."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedpeft.data.encode import Encoded
from fedpeft.models.targets import linear_layers, resolve
from fedpeft.privacy.gradients import per_sample_gradients, verify
from support import small_models as small
from support.per_sample import EXACT, KINDS, Net, as_double, compare, one_by_one, records, toy

# Parameters that no linear layer owns ---------------------------------------------------------------------------------


class Scaled(nn.Module):
    """IA3: a learned vector that multiplies a layer's output."""

    def __init__(self, layer, width, scale=None):
        super().__init__()
        self.layer = layer
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, width, dtype=torch.float64)) if scale is None else scale

    def forward(self, x):
        return self.layer(x) * self.scale


def with_scales(adapted, shared=False):
    """Put a scale after every target layer, LoRA included; the parameters by name."""
    found, scale = {}, None
    for name in resolve(adapted.base, None) if not adapted.sites else adapted.form.lora_sites():
        parent, _, child = name.rpartition(".")
        holder = adapted.base.backbone.get_submodule(parent)
        width = adapted.sites[name].shape[0]
        wrapped = Scaled(getattr(holder, child), width, scale if shared else None)
        setattr(holder, child, wrapped)
        scale = wrapped.scale
        found[f"{name}/scale"] = wrapped.scale
    return {next(iter(found)): scale} if shared else found


@pytest.mark.parametrize("kind", KINDS)
def test_raw_parameters_are_exact_too(kind, folder):
    adapted = as_double(small.adapted(folder(kind), kind))
    adapted.write(small.randomised(adapted, scale=0.3).map(lambda value: value.double()))
    adapted.train_roles(())
    compare(adapted, with_scales(adapted), records(kind))


def test_raw_parameters_beside_factors_and_head(folder):
    adapted = as_double(small.adapted(folder("vit"), "vit"))
    adapted.write(small.randomised(adapted, scale=0.3).map(lambda value: value.double()))
    parameters = adapted.train_roles(("A", "B", "head"))
    compare(adapted, {**with_scales(adapted), **parameters}, records("vit"))


def test_one_raw_parameter_in_many_places(folder):
    adapted = as_double(small.adapted(folder("vit"), "vit"))
    adapted.train_roles(())
    compare(adapted, with_scales(adapted, shared=True), records("vit"))


def test_a_raw_parameter_behind_a_branch_on_data():
    """What torch.func cannot run."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.gain if float(x.sum()) > 0 else 2 * x * self.gain

    net = Net(Gated())
    modules, parameters, loss, inputs, labels = toy(net)
    inputs["x"] = inputs["x"].abs()  # one branch for every record, and for all together
    agree(modules, parameters, loss, inputs, labels)


def test_the_targets_of_the_tests_are_layers(model):
    """The raw scales above sit on layers that exist in every architecture."""
    for kind in KINDS:
        base = SimpleNamespace(backbone=small.make(kind), heads={})
        assert {name.rpartition(".")[2] for name in resolve(base, None)} == small.KINDS[kind][1]
        assert set(resolve(base, None)) <= set(linear_layers(base))


# Layers used in uncommon ways -----------------------------------------------------------------------------------------


def agree(modules, parameters, loss, inputs, labels):
    fast, _ = per_sample_gradients(modules, parameters, loss, inputs, labels)
    slow, _ = one_by_one(parameters, loss, Encoded(inputs, labels))
    torch.testing.assert_close(fast, slow, **EXACT)
    verify(modules, parameters, loss, inputs, labels)


def twice(net, x):
    return net.inner(net.inner(x))


def by_name(net, x):
    return net.inner(input=x)


def split_heads(net, x):
    return net.inner(x.reshape(*x.shape[:2], 2, 2)).reshape(x.shape)


@pytest.mark.parametrize(("width", "middle"), [(4, twice), (4, by_name), (2, split_heads)])
def test_a_layer_called_twice_or_by_keyword_or_on_more_dimensions(width, middle):
    net = Net(middle)
    net.inner = nn.Linear(width, width)
    agree(*toy(net))


def test_two_layers_that_share_a_weight():
    net = Net(lambda net, x: net.inner(x))
    net.inner = nn.Linear(4, 4, bias=False)
    net.inner.weight = net.one.weight
    agree(*toy(net))


def test_a_layer_that_is_not_used_has_no_gradient():
    net = Net()
    net.spare = nn.Linear(4, 4)
    modules, parameters, loss, inputs, labels = toy(net)
    agree(modules, parameters, loss, inputs, labels)
    rows, _ = per_sample_gradients(modules, parameters, loss, inputs, labels)
    assert not rows[:, -20:].any() and list(parameters)[-2:] == ["spare.weight", "spare.bias"]
