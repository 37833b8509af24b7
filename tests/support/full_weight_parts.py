"""Hand-sized bases, records and bodies for the tests of full-weight bodies.

The base is one linear layer (identity) that the classifier reads, so that every gradient can be written down.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedpeft import config as configs
from fedpeft.continual import stream as streams
from fedpeft.continual.body import Body, Classifier, TrainConfig
from fedpeft.continual.learner import Learner
from fedpeft.continual.model import Plastic
from fedpeft.data.encode import Encoded
from fedpeft.models.base import Base

WIDTH, CLASSES = 4, 6
BODIES = {
    "coso": [
        {"r1": 2, "r2": 2},
        {
            "side": "in",
            "r1": 3,
            "r2": 2,
            "refresh": 2,
            "svd": "randomized",
            "deltas": "svd",
            "delta_rank": 1,
            "rotate_moments": True,
        },
    ],
    "ewc": [{"lam": 3.0}, {"form": "lora", "labels": "model", "decay": 0.5}],
    "lwf": [{}, {"form": "film"}],
    "er": [{"capacity": 7, "replay": 3}, {"form": "lora", "r": 2}],
    "joint": [{}],
    "classp": [{}, {"power": 2.0}],
    "fsa": [{}, {"form": "lora"}, {"form": "film"}],
}
CASES = [(body, number) for body, options in BODIES.items() for number in range(len(options))]


def plastic(width: int = WIDTH, classes: int = CLASSES) -> Plastic:
    """x [N, width] through an identity layer, a norm that does nothing yet, and the head."""
    layer, norm, head = nn.Linear(width, width, bias=False), nn.LayerNorm(width), nn.Linear(width, classes)
    layer.weight.data = torch.eye(width)
    net = nn.Sequential(layer, norm, head).requires_grad_(False)
    return Plastic(Base(net, lambda batch: net(batch["x"]), {"2": head}, None, "", "image-classification"), ["0"])


def bare(width: int = 2, classes: int = 2) -> Plastic:
    """Features are (I + dW) x."""
    layer, head = nn.Linear(width, width, bias=False), nn.Linear(width, classes)
    layer.weight.data = torch.eye(width)
    net = nn.Sequential(layer, head).requires_grad_(False)
    return Plastic(Base(net, lambda batch: net(batch["x"]), {"1": head}, None, "", "image-classification"), ["0"])


def records(labels: list[int], width: int = WIDTH, seed: int = 0) -> Encoded:
    drawn = torch.Generator().manual_seed(seed)
    found = torch.tensor(labels)
    centre = torch.randn(CLASSES, width, generator=drawn)
    return Encoded({"x": centre[found] + 0.3 * torch.randn(len(labels), width, generator=drawn)}, found)


def three_tasks() -> streams.Stream:
    train, test = records([0, 1, 2, 3, 4, 5] * 5), records([0, 1, 2, 3, 4, 5] * 3, seed=0)
    groups = [[0, 1], [2, 3], [4, 5]]
    return streams.build(
        streams.plan("three", "class", train.labels.numpy(), test.labels.numpy(), groups, 0), train, test
    )


def made(
    name: str, model: Plastic, data: Encoded, classes: tuple[int, ...] = (0, 1), lr: float = 0.1, **options: object
) -> Body:
    """A body at the beginning of its first task."""
    body: Body = configs.method(
        "bodies", name, dict(options), "body", model=model, seed=0, train=TrainConfig(epochs=1, batch_size=4, lr=lr)
    )
    body.classifier = Classifier(model.base.classes, model.base.width, 0, 1e-3)
    body.feed(0, streams.Task("task-0", classes, data, data), list(classes))
    body.start()
    return body


def learner(name: str, options: dict[str, object], seed: int = 0) -> Learner:
    train = TrainConfig(epochs=2, batch_size=4, lr=0.01)
    return Learner(three_tasks(), plastic(), name, {"linear": {}}, train, seed, options)


def flat(value: object) -> list[object]:
    """All leaves of nested plain data, with their keys."""
    if isinstance(value, dict):
        return [item for key in value for item in (key, *flat(value[key]))]
    if isinstance(value, list | tuple):
        return [item for one in value for item in flat(one)]
    return [value.tolist() if isinstance(value, Tensor) else value]


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
