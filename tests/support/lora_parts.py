"""Small streams, models and learners for the tests of bodies that are made of LoRAs."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fedpeft.config import ModelConfig
from fedpeft.continual import stream as streams
from fedpeft.continual.body import TrainConfig
from fedpeft.continual.learner import Learner
from fedpeft.continual.model import Plastic
from fedpeft.data.drift import split_digits
from fedpeft.data.encode import Encoded, encode
from fedpeft.models.base import Base
from fedpeft.models.loading import load

TOY = {
    "olora": {"r": 2},
    "owlora": {"r": 2},
    "sdlora": {"r": 2},
    "inflora": {"r": 2, "threshold": 0.6},
    "lae": {"r": 2, "frozen_epochs": 1},
    "conpet_static": {"r": 2, "batches": 4},
    "conpet": {"r": 2, "batches": 4, "top": 2},
    "merging": {"r": 2, "method": "opcm"},
}
VIT = {"lae adapter": {"form": "adapter", "frozen_epochs": 0}, "lae prefix": {"form": "prefix", "frozen_epochs": 0}}
TRAIN = TrainConfig(epochs=2, batch_size=8, lr=0.02, head_lr=0.02)


def toy_model() -> Plastic:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 5), nn.Linear(5, 2)).requires_grad_(False)
    return Plastic(
        Base(net, lambda batch: net(batch["x"]), {"head": net[3]}, None, "", "image-classification"), ["0", "2"]
    )


def toy_stream(rank: int = 6) -> streams.Stream:
    """Three tasks of two classes; the inputs of each task span `rank` dimensions."""
    rng = np.random.default_rng(0)
    labels = np.arange(6).repeat(10)
    spans = rng.normal(size=(3, rank, 6))
    centres = 2 * rng.normal(size=(6, rank))
    codes = centres[labels] + 0.3 * rng.normal(size=(60, rank))
    x = np.stack([code @ spans[label // 2] for code, label in zip(codes, labels, strict=True)])
    data = Encoded({"x": torch.tensor(x, dtype=torch.float32)}, torch.tensor(labels))
    manifest = streams.plan("toy", "class", labels, labels, [[0, 1], [2, 3], [4, 5]], 0)
    return streams.build(manifest, data, data)


def digits_stream() -> streams.Stream:
    train, _ = split_digits()
    data = encode(train, None, "image-classification", 1).view(np.arange(60))
    labels = data.labels.numpy()
    return streams.build(streams.plan("digits", "class", labels, labels, [[0, 1, 2], [3, 4]], 0), data, data)


def vit() -> Plastic:
    return Plastic(load(ModelConfig(), 10, 0), ["layers.0.attention.q_proj", "layers.2.attention.q_proj"])


def learner(name: str, options: dict | None = None, train: TrainConfig = TRAIN, rank: int = 6) -> Learner:
    return Learner(toy_stream(rank), toy_model(), name, {"linear": {}}, train, 3, options or TOY[name])


def begun(one: Learner) -> Learner:
    """The learner with its present task begun, no step made yet."""
    if one.body.index < one.task:
        one._begin()
    return one


def move(one: Learner, steps: int) -> None:
    for _ in range(steps):
        begun(one)._step(one.step_number)
        one.step_number += 1


def stepped(one: Learner, *, tasks: int, steps: int = 0) -> Learner:
    """The learner after so many tasks, and so many steps of the next."""
    while one.task < tasks:
        move(one, begun(one).body.steps() - one.step_number)
        one._end(0.0)
    move(one, steps)
    return one


def same(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def without_times(state: dict) -> dict:
    for row in state["ledger"]:
        row.pop("train_cpu_s")
    return state
