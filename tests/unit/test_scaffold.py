"""SCAFFOLD's client half: control variates by hand, and as mean gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.clients.train import on_device, per_sample_loss, train
from fedpeft.config import ClientConfig
from fedpeft.state import AdapterState
from fedpeft.strategies.client import Visit, client_halves
from fedpeft.strategies.wrappers.scaffold import CONTROL, Scaffold
from support import small_models as small

SGD = ClientConfig(optimizer="sgd", lr=0.1, local_steps=1, local_epochs=None, batch_size=100)
ROLES = ["A", "B", "head"]


def half():
    (found,) = [one for one in client_halves(Scaffold()) if one.sends]
    return found


def visit(start, extra, kept, steps):
    return Visit("a", SGD, None, AdapterState({}, extra=extra), start, kept, None, 0, steps)


def test_the_new_control_by_hand():
    """Option II: c_k+ = c_k - c + (theta_0 - theta) / (steps lr); c_k+ - c_k is sent, c_k+ is kept."""
    given = visit(
        AdapterState({"q/A": torch.tensor([3.0, 4.0])}),
        {"control:q/A": torch.tensor([0.5, -1.0])},
        {"control:q/A": torch.tensor([1.0, 2.0])},
        steps=5,
    )
    sent, kept = half().finish(given, AdapterState({"q/A": torch.tensor([2.0, 4.5])}))
    torch.testing.assert_close(kept["control:q/A"], torch.tensor([1.0 - 0.5 + 2.0, 2.0 + 1.0 - 1.0]))
    torch.testing.assert_close(sent["control:q/A"], kept["control:q/A"] - torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(half().gradient_offset(given)["q/A"], torch.tensor([0.5 - 1.0, -1.0 - 2.0]))


def test_the_control_of_a_tensor_that_rests_rests_too():
    """A body of tasks may fix a factor, or train the head alone for a round: nothing was met of the others."""
    known = {"control:q/A": torch.tensor([1.0, 2.0]), "control:q/B": torch.tensor([5.0])}
    start = AdapterState({"q/A": torch.tensor([3.0, 4.0]), "q/B": torch.tensor([7.0])})
    given = visit(start, {"control:q/A": torch.tensor([0.5, -1.0]), "control:q/B": torch.tensor([0.5])}, known, steps=5)
    sent, kept = half().finish(given, AdapterState({"q/B": torch.tensor([6.0])}))
    assert torch.equal(sent["control:q/A"], torch.zeros(2)) and torch.equal(kept["control:q/A"], known["control:q/A"])
    torch.testing.assert_close(kept["control:q/B"], torch.tensor([5.0 - 0.5 + 2.0]))


def test_the_new_control_is_the_mean_gradient(tmp_path, monkeypatch):
    """With plain SGD, option II recovers the mean gradient that was met (theta_0 - theta = lr sum of g + c - c_k)."""
    model = small.adapted(small.save("bert", tmp_path / "bert"), "bert")
    model.write(small.randomised(model))
    for module in model.base.backbone.modules():
        if isinstance(module, torch.nn.Dropout):  # it would draw other masks for the second gradient
            monkeypatch.setattr(module, "p", 0.0)
    start = model.state()
    zero = {f"{CONTROL}{key}": torch.zeros_like(value) for key, value in start.tensors.items()}
    train(model, small.texts(), ROLES, SGD, 7)
    _, new = half().finish(visit(start, zero, {}, 1), model.state())
    model.write(start)
    trained = model.train_roles(ROLES)
    loss = per_sample_loss(model, *on_device(small.texts(), np.arange(10), torch.device("cpu"))).mean()
    for key, gradient in zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True):
        torch.testing.assert_close(new[f"{CONTROL}{key}"], gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("steps", [1, 4])
def test_two_clients_with_one_gradient_have_one_control(steps):
    """Who moved by the same mean gradient knows the same, however many steps it took."""
    start = AdapterState({"q/A": torch.tensor([3.0])})
    _, kept = half().finish(
        visit(start, {"control:q/A": torch.zeros(1)}, {}, steps),
        AdapterState({"q/A": torch.tensor([3.0 - steps * SGD.lr * 0.7])}),
    )
    torch.testing.assert_close(kept["control:q/A"], torch.tensor([0.7]))
