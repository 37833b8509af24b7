"""The check before private training: what we ship passes, what mixes records or escapes the hooks is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedpeft.errors import InputError
from fedpeft.privacy.gradients import verify
from support import small_models as small
from support.per_sample import ADAPTERS, KINDS, Net, batch, loss_of, records, roles_of, single, toy


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_we_ship_passes_and_is_as_before(kind, method, folder):
    adapted = small.adapted(folder(kind), kind, method=method)  # fresh: B or R is zero
    adapted.training_mode()
    before = {key: value.clone() for key, value in adapted.base.backbone.state_dict().items()}
    modes = [module.training for module in adapted.base.backbone.modules()]
    assert any(modes)
    data = single(records(kind, 3))
    torch.manual_seed(0)
    random = torch.get_rng_state()
    for roles in roles_of(method, adapted):
        verify(adapted.base.modules, adapted.train_roles(roles), loss_of(adapted), *batch(data))
    assert all(torch.equal(value, before[key]) for key, value in adapted.base.backbone.state_dict().items())
    assert [module.training for module in adapted.base.backbone.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


class Mean(nn.Module):
    """Subtracts a share of the mean over the batch, always or in training only."""

    def __init__(self, share=1.0, always=True):
        super().__init__()
        self.share, self.always = share, always

    def forward(self, x):
        return x - self.share * x.mean(0, keepdim=True) if self.training or self.always else x


def refused(net, names, loss=None):
    """The check names one of these parameters, and leaves parameters and modes alone."""
    modules, parameters, plain, inputs, labels = toy(net)
    before = {key: value.detach().clone() for key, value in parameters.items()}
    modes = [module.training for module in net.modules()]
    with pytest.raises(InputError) as caught:
        verify(modules, parameters, loss(net) if loss else plain, inputs, labels)
    assert any(name in str(caught.value) for name in names), str(caught.value)
    assert all(torch.equal(parameters[key], value) for key, value in before.items())
    assert [module.training for module in net.modules()] == modes


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_module_that_mixes_records_is_refused(mode):
    refused(Net(Mean()).train(mode), ["one."])


def test_a_module_that_mixes_records_only_in_training_is_refused():
    """Training is what the guarantee is about: looking at the model in evaluation mode does not show it."""
    refused(Net(Mean(always=False)).train(), ["one."])


def test_a_batch_norm_left_in_training_mode_is_refused():
    net = Net(lambda net, x: net.norm(x.transpose(1, 2)).transpose(1, 2))
    net.norm = nn.BatchNorm1d(4, affine=False)
    refused(net.train(), ["one."])


def test_a_little_mixing_is_mixing():
    """Half a percent of each record in every other one's gradient is far above the rounding of float64."""
    refused(Net(Mean(share=0.005)), ["one."])


def test_a_loss_that_divides_by_the_tokens_of_the_batch_is_refused():
    def loss(net):
        def value(inputs, labels):
            logits = net(inputs["x"])
            each = nn.functional.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(5), reduction="none")
            return each.reshape(len(labels), 5).sum(1) / each.numel()  # of the batch, not of the record

        return value

    refused(Net(), ["one.", "two."], loss)


def test_a_weight_used_behind_its_layers_back_is_refused():
    net = Net(lambda net, x: nn.functional.linear(net.inner(x), net.inner.weight))
    net.inner = nn.Linear(4, 4)
    refused(net, ["inner.weight"])


def test_the_output_layer_of_torchs_attention_is_refused():
    """It is a linear layer whose weight is used without calling it."""
    net = Net(lambda net, x: net.attention(x, x, x, need_weights=False)[0])
    net.attention = nn.MultiheadAttention(4, 2, batch_first=True)
    net.attention.in_proj_weight.requires_grad_(False)
    net.attention.in_proj_bias.requires_grad_(False)
    refused(net, ["attention.out_proj"])


@pytest.mark.parametrize(
    "middle",
    [
        lambda net, x: net.inner(x.flatten(0, 1)).reshape(x.shape),
        lambda net, x: net.inner(x.transpose(0, 1)).transpose(0, 1),
        lambda net, x: x + net.inner(torch.ones(1, 5, 4, dtype=x.dtype)),
    ],
    ids=["folded", "tokens first", "shared by all"],
)
def test_a_layer_that_does_not_keep_records_first_is_refused(middle):
    net = Net(middle)
    net.inner = nn.Linear(4, 4)
    refused(net, ["inner"])


def test_records_in_another_order_are_refused():
    net = Net(lambda net, x: net.inner(x.flip(0)).flip(0))
    net.inner = nn.Linear(4, 4)
    refused(net, ["inner"])


def test_tokens_first_with_as_many_tokens_as_records_is_refused():
    """The first dimension has the right length by chance."""
    net = Net(lambda net, x: net.inner(x.transpose(0, 1)).transpose(0, 1))
    net.inner = nn.Linear(4, 4)
    modules, parameters, loss, inputs, labels = toy(net)
    with pytest.raises(InputError, match="inner"):
        verify(modules, parameters, loss, {"x": inputs["x"][:, :4]}, labels)


def test_a_record_that_is_not_a_number_does_not_hide_mixing():
    """NaN reaches the gradients of all records: that is mixing at its plainest, though NaN compares with nothing."""
    modules, parameters, loss, inputs, labels = toy(Net(Mean()))
    inputs["x"][0] = torch.nan
    with pytest.raises(InputError, match=r"one\."):
        verify(modules, parameters, loss, inputs, labels)
