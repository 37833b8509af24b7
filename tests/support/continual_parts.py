"""A small base, a small stream, and what the tests of this folder ask of a learner.

The stream: classes are gaussian clusters in 8 dimensions, two to a task. The base: two residual MLP blocks of width 12
with layer norms, random weights, whose second linear layers (`fc2`, [12, 16]) the bodies adapt.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft import registry
from fedpeft.config import ModelConfig
from fedpeft.continual import stream as streams
from fedpeft.continual.body import Body, TrainConfig
from fedpeft.continual.learner import Learner
from fedpeft.continual.model import Plastic
from fedpeft.data.encode import Encoded
from fedpeft.models import loading
from fedpeft.models.base import Base
from support.fingerprint import fingerprint_modules

INPUTS, WIDTH, HIDDEN, CLASSES = 8, 12, 16, 6
LAYERS = ["fc2"]
TRAIN = {"epochs": 2, "batch_size": 8, "lr": 5e-3, "head_lr": 1e-2}  # 24 records a task: 3 steps an epoch

# Where a default is made for larger models or longer tasks.
BODIES: dict[str, dict[str, Any]] = {
    "lae": {"frozen_epochs": 1},
    "conpet": {"batches": 2},
    "conpet_static": {"batches": 4},
}
HEADS: dict[str, dict[str, Any]] = {"ranpac": {"features": 60}, "aligned": {"samples": 32, "epochs": 4}}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.nn.functional.gelu(self.fc1(self.norm(x))))


class Net(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(INPUTS, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.classifier = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.classifier(self.norm(self.blocks(self.embed(pixel_values))))


def base(classes: int = CLASSES, seed: int = 0) -> Base:
    """Random weights of unit gain in the default dtype."""
    net, draws = Net(classes), torch.Generator().manual_seed(seed)
    for name, value in net.state_dict().items():
        if "norm" not in name:
            value.copy_(torch.randn(value.shape, generator=draws) / math.sqrt(value.shape[-1]))
    net.requires_grad_(False).eval()
    return Base(
        net, lambda batch: net(batch["pixel_values"]), {"classifier": net.classifier}, None, "", "image-classification"
    )


def model(**given: Any) -> Plastic:
    return Plastic(base(**given), LAYERS)


def clusters(classes: int = CLASSES, rows: int = 12, seed: int = 0, part: str = "train") -> Encoded:
    """`rows` records of each class, in mixed order; the centres depend on `seed` only."""
    rng = np.random.default_rng([seed, part == "test"])
    centres = 1.5 * np.random.default_rng(seed).normal(size=(classes, INPUTS))
    labels = rng.permutation(np.repeat(np.arange(classes), rows))
    values = centres[labels] + 0.6 * rng.normal(size=(len(labels), INPUTS))
    return Encoded({"pixel_values": torch.tensor(values, dtype=torch.get_default_dtype())}, torch.from_numpy(labels))


def stream(scenario: str = "class", tasks: int = 3, rows: int = 12, seed: int = 0) -> streams.Stream:
    """Tasks of two classes each; in `domain` all classes in every task, in `blurry` neighbours share a class."""
    classes = 2 * tasks
    train, test = clusters(classes, rows, seed), clusters(classes, 8, seed, "test")
    groups = {
        "domain": [list(range(classes))] * tasks,
        "blurry": [[2 * task, 2 * task + 1, (2 * task + 2) % classes] for task in range(tasks)],
    }
    plain = [[2 * task, 2 * task + 1] for task in range(tasks)]
    return streams.build(
        streams.plan(
            "clusters", scenario, train.labels.numpy(), test.labels.numpy(), groups.get(scenario, plain), seed
        ),
        train,
        test,
    )


def vit() -> Plastic:
    """The embedded vision transformer, queries and values adapted: a base with attention."""
    return Plastic(loading.load(ModelConfig(), CLASSES, 0), None)


def images(tasks: int = 3) -> streams.Stream:
    """The small stream, its records drawn as images [1, 8, 8] for `vit`."""
    plain = stream(tasks=tasks)
    drawn = torch.randn(INPUTS, 64, generator=torch.Generator().manual_seed(0)) / 4

    def picture(data: Encoded) -> Encoded:
        pixels = (data.inputs["pixel_values"].to(torch.float32) @ drawn).sigmoid().reshape(-1, 1, 8, 8)
        return Encoded({"pixel_values": pixels}, data.labels)

    return replace(
        plain, tasks=tuple(replace(task, train=picture(task.train), test=picture(task.test)) for task in plain.tasks)
    )


def heads_of(body: str) -> tuple[str, ...]:
    """All heads that can share one training of this body."""
    local = (name for name in registry.names("heads") if registry.load("heads", name).loss == "local")
    return registry.load("bodies", body).heads or tuple(local)


def learner(
    body: str,
    heads: tuple[str, ...] = ("linear",),
    options: dict[str, Any] | None = None,
    scenario: str = "class",
    seed: int = 0,
    tasks: int = 3,
    given: streams.Stream | None = None,
    plastic: Plastic | None = None,
    **train: Any,
) -> Learner:
    """A learner on the small stream and base (or those given), not yet run."""
    return Learner(
        given or stream(scenario, tasks),
        plastic or model(classes=2 * tasks),
        body,
        {name: HEADS.get(name, {}) for name in heads},
        TrainConfig(**{**TRAIN, **train}),
        seed,
        {**BODIES.get(body, {}), **(options or {})},
    )


def run(body: str, *args: Any, **given: Any) -> Learner:
    return learner(body, *args, **given).run()


def watch(
    given: Learner,
    begun: Callable[[Body], None] = lambda body: None,
    stepped: Callable[[Body, int], None] = lambda body, step: None,
    trained: Callable[[Body], None] = lambda body: None,
) -> Learner:
    """Look at the body when a task has begun, after each step, and when its training is over."""
    body = given.body
    start, after_step, end_task = body.start, body.after_step, body.end_task

    def started() -> None:
        start()
        begun(body)

    def after(step: int) -> None:
        after_step(step)
        stepped(body, step)

    def ended(statistics: dict[str, Tensor]) -> None:
        trained(body)
        end_task(statistics)

    body.start, body.after_step, body.end_task = started, after, ended  # type: ignore[method-assign]
    return given


def begun(body: str, options: dict[str, Any] | None = None, **given: Any) -> Body:
    """A body at the start of its first task, to be driven by hand."""
    made = learner(body, options=options, **given)
    begin(made, 0)
    return made.body


def begin(made: Learner | Body, index: int, given: streams.Stream | None = None) -> None:
    if isinstance(made, Learner):
        made, given = made.body, made.stream
    assert given is not None
    made.feed(index, given.tasks[index], given.seen(index))
    made.start()


def end(body: Body) -> None:
    """The task is over, as a learner tells it."""
    body.end_task(body.statistics(body.records()))


def drive(body: Body, gradients: dict[str, Tensor], step: int = 0) -> None:
    """One step of a body along given gradients; zero for parameters that are not named."""
    for key, value in body.parameters.items():
        value.grad = gradients[key].clone() if key in gradients else torch.zeros_like(value)
    body.after_backward()
    body.step()
    body.after_step(step)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(height: int, columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(noise(height, columns, seed=seed))[0]


def low_rank_gradient(rank: int, seed: int) -> Tensor:
    """Of an adapted layer, [12, 16]."""
    return noise(WIDTH, rank, seed=seed) @ noise(rank, HIDDEN, seed=seed + 1000)


def rows(given: streams.Stream) -> dict[str, Tensor]:
    """The test inputs of all tasks."""
    return {"pixel_values": torch.cat([task.test.inputs["pixel_values"] for task in given.tasks])}


def seen_by(given: Learner) -> list[Tensor]:
    """What the body makes of the test inputs: features of every view, or scores where it predicts by itself.

    The count of passes is left as it was.
    """
    inputs, passes = rows(given.stream), given.model.passes
    with torch.no_grad():
        own = given.body.predict(inputs, given.classifier)
        views = given.body.views().values() if own is None else ()
        found = [given.model.features(inputs, change) for change in views] or [own]
    given.model.passes = passes
    return found


def fingerprint(given: Base) -> str:
    """What hangs on the model, see `fingerprint_modules`."""
    return fingerprint_modules(given.backbone.named_modules())


def saved(given: Learner) -> bytes:
    buffer = io.BytesIO()
    torch.save(given.state(), buffer)
    return buffer.getvalue()


def loaded(given: Learner, state: bytes) -> Learner:
    given.load(torch.load(io.BytesIO(state), weights_only=True))
    return given


def difference(one: Any, two: Any, at: str = "state") -> str:
    """Where two pieces of plain data first differ in a bit, CPU times left out; empty where nowhere."""
    if isinstance(one, Tensor):
        same = isinstance(two, Tensor) and one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
        return "" if same else at
    if isinstance(one, dict):
        if not isinstance(two, dict) or list(map(str, one)) != list(map(str, two)):
            return f"{at}: keys"
        parts = [(one[key], two[key], f"{at}.{key}") for key in one if key != "train_cpu_s"]
    elif isinstance(one, list | tuple):
        if not isinstance(two, list | tuple) or len(one) != len(two):
            return f"{at}: length"
        parts = [(a, b, f"{at}.{number}") for number, (a, b) in enumerate(zip(one, two, strict=True))]
    else:
        return "" if one == two else f"{at}: {one} against {two}"
    return next(filter(None, (difference(*part) for part in parts)), "")
