"""Local optimizers: those of torch are torch's, with every option; what contradicts itself is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedpeft.clients.optimizers.base import Layout, make_optimizer, set_rate
from fedpeft.config import ClientConfig, load
from fedpeft.errors import InputError
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
