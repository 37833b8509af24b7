"""Local optimizers: those of torch are torch's, with every option; what contradicts itself is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedpeft.cli.catalogue import describe
from fedpeft.clients.optimizers.base import Layout, make_optimizer, set_rate
from fedpeft.clients.optimizers.muon import even_out
from fedpeft.config import ClientConfig, load
from fedpeft.errors import InputError
from fedpeft.other_names import REFUSED
from fedpeft.registry import names
from support.classified import OF_TORCH

LAYOUT = Layout({"q/A": torch.Size([3, 5]), "q/B": torch.Size([4, 3])}, {"q": 2.0})
TORCH = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
}
OPTIONS = {"sgd": {"nesterov": True}, "adamw": {"beta1": 0.8, "beta2": 0.95, "eps": 1e-3}}


@pytest.mark.parametrize("name", OF_TORCH)
def test_it_is_torchs_own_with_all_its_options(name):
    draw = torch.Generator().manual_seed(0)
    pairs = [torch.randn(shape, generator=draw) for shape in LAYOUT.shapes.values()]
    ours, theirs = ([nn.Parameter(value.clone()) for value in pairs] for _ in range(2))
    config = ClientConfig(
        optimizer=name,
        optimizer_options=OPTIONS[name],
        lr=0.05,
        weight_decay=0.1,
        momentum=0.9 if name == "sgd" else 0.0,
    )
    make, options = TORCH[name]
    one, other = make_optimizer(ours, config, LAYOUT), make(theirs, lr=0.05, **options)
    for step in range(3):
        set_rate(one, 0.05 / (step + 1))
        other.param_groups[0]["lr"] = 0.05 / (step + 1)
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = its.grad = torch.randn(mine.shape, generator=draw)
        one.step()
        other.step()
    assert all(torch.equal(mine, its) for mine, its in zip(ours, theirs, strict=True))
    assert not any(torch.equal(mine, value) for mine, value in zip(ours, pairs, strict=True))


def test_options_stand_under_their_own_key():
    config = load({}, ["client.optimizer=sgd", "client.momentum=0.9", "client.optimizer_options.nesterov=yes"])
    assert config.client.optimizer_options == {"nesterov": True}
    with pytest.raises(InputError, match=r"client\.optimizer_options\.beta.*AdamW has the options beta1, beta2, eps"):
        load({"client": {"optimizer_options": {"beta": 0.9}}})
    # Another optimizer drops the options of the one it replaces.
    tree = {"client": {"optimizer": "adamw", "optimizer_options": {"beta1": 0.5}}}
    assert load(tree, {"client.optimizer": "sgd"}).client.optimizer_options == {}


@pytest.mark.parametrize(
    ("client", "words"),
    [
        ({"optimizer": "sgd", "optimizer_options": {"nesterov": True}}, ("nesterov", "client.momentum=0")),
        ({"optimizer": "adamw", "momentum": 0.9}, ("client.momentum=0.9", "sgd", "client.momentum=0")),
        ({"optimizer": "adam"}, ("client.optimizer", "Did you mean 'adamw'?")),
    ],
)
def test_what_contradicts_itself_is_refused(client, words):
    with pytest.raises(InputError) as error:
        load({"client": client})
    assert all(word in str(error.value) for word in words), error.value


def test_those_of_today_come_first():
    assert names("optimizers")[:2] == ["adamw", "sgd"]


@pytest.mark.parametrize("name", REFUSED["client.optimizer"])
def test_a_published_one_that_makes_no_sense_here_is_refused_with_the_reason(name):
    why = REFUSED["client.optimizer"][name]
    assert name not in names("optimizers") and len(why) > 60
    with pytest.raises(InputError) as error:
        load({}, {"client.optimizer": name.upper()})
    assert f"client.optimizer: '{name.upper()}' is not known. It is refused: {why}. Allowed: adamw" in str(error.value)
    with pytest.raises(InputError, match=f"show: {name} is no value of client.optimizer. It is refused"):
        describe(name)


def test_a_factor_has_nothing_for_muon_on_a_projection_to_leave_out():
    """What `trion` is refused for: of a factor's momentum the projection on as many columns of the DCT is all of it."""
    draw = torch.Generator().manual_seed(0)
    momentum, r = torch.randn(1, 3, 16, generator=draw, dtype=torch.float64), 3
    angles = torch.outer(torch.arange(r) + 0.5, torch.arange(r)) * (torch.pi / r)
    basis = torch.cos(angles).double() * (2 / r) ** 0.5
    basis[:, 0] /= 2**0.5
    through = basis @ even_out(basis.T @ momentum, 5)
    assert float((through - even_out(momentum, 5)).abs().max()) < 1e-6
