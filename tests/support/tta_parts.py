"""Small models, streams and options that every method runs with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedpeft.data.encode import Encoded
from fedpeft.tta.deployed import Deployed, deploy
from fedpeft.tta.method import TTAMethod, make
from support.fingerprint import fingerprint_modules

CLASSES = 3
# So small that a stream takes milliseconds, so lenient that random models pass the filters.
OPTIONS: dict[str, dict[str, Any]] = {
    "aug_average": {"views": 2},
    "rdumb": {"period": 2, "base_options": {"fisher_weight": 0.0, "margin": 2.0, "redundancy": 2.0}},
    "eata": {"margin": 2.0, "redundancy": 2.0},
    "sar": {"margin": 2.0, "reset_below": 0.0},
    "rotta": {"capacity": 8, "update_every": 6},
    "memo": {"views": 3},
    "cotta": {"views": 2, "threshold": 0.9},
    "petal": {"views": 2, "threshold": 0.9, "snapshots": 3, "snapshot_steps": 1, "restore": 0.2, "lr": 1e-2},
    "lsa": {"steps": 5},
    "itta": {"align_steps": 2},
    "lame": {"k": 2},
    "tlm": {"label_words": [70, 71, 72]},
    "ear": {"threshold": 0.999, "domains": 3},
    "atp": {"learn_lr": 0.1, "learn_batch": 8, "mode": "online"},
    "fedthe": {"head_lr": 0.1, "steps": 3, "memo_steps": 1, "views": 2, "memo_lr": 0.05},
}
LANGUAGE = {"tlm"}  # methods that read tokens


class Net(nn.Module):
    """Convolution, batch norm, head; its running statistics are far from any batch's."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        )
        self.head = nn.Linear(4, CLASSES)
        draws = torch.Generator().manual_seed(seed)
        for name, value in self.state_dict().items():
            if value.is_floating_point():
                value.copy_(0.5 * torch.randn(value.shape, generator=draws))
            if name.endswith(("running_var", "1.weight")):
                value.abs_().add_(0.5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.blocks(pixel_values).mean((2, 3)) * 4)


def conv() -> Deployed:
    return deploy(Net(), head="head")


def vit(folder: Any) -> Deployed:
    """A LoRA model of ours, its factors not zero."""
    from support import small_models

    model = small_models.adapted(folder, "vit")
    model.write(small_models.randomised(model))
    return deploy(model)


def language(folder: Any, kind: str) -> Deployed:
    """A causal language model of ours with a LoRA, its factors not zero."""
    from support import small_models

    model = small_models.adapted(folder, kind)
    model.write(small_models.randomised(model))
    return deploy(model)


def inputs(model: Deployed, rows: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """A batch that the model takes."""
    return images(rows, seed) if model.output is None else texts(rows, seed)


def texts(rows: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Token ids of 2 to 7 bytes, padded on the right."""
    from support import small_models

    return small_models.texts(rows, causal=True, seed=seed).inputs


def images(rows: int = 7, seed: int = 0) -> dict[str, Tensor]:
    return {"pixel_values": torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed))}


def stream(batches: int = 5, rows: int = 7, seed: int = 10, model: Deployed | None = None) -> list[dict[str, Tensor]]:
    """Batches of images, or of what the model takes."""
    return [
        images(rows, seed + number) if model is None else inputs(model, rows, seed + number)
        for number in range(batches)
    ]


def source(rows: int = 24) -> Encoded:
    """Labelled source data, more of class 0."""
    return Encoded(images(rows, 99), torch.arange(rows) % 4 % CLASSES)


def method(name: str, model: Deployed, **options: Any) -> TTAMethod:
    return make(name, model, {**OPTIONS.get(name, {}), **options}, seed=3, source=source())


def play(given: TTAMethod, batches: list[dict[str, Tensor]]) -> Tensor:
    """Predictions of a stream [rows, K]."""
    return torch.cat([given.step(batch)[0] for batch in batches])


def fingerprint(model: Deployed) -> str:
    """What hangs on the model, see `fingerprint_modules`."""
    return fingerprint_modules(model.modules.items())


def without_cost(state: dict[str, Any]) -> dict[str, Any]:
    """A state without what a look at it changes."""
    return {
        key: without_cost(value) if key == "base" else value
        for key, value in state.items()
        if key not in ("cost", "classes")
    }


def same(one: Any, two: Any) -> bool:
    """Equality of plain data, bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and one.shape == two.shape and bool(one.eq(two).all())
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)
