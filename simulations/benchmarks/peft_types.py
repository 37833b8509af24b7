"""What averaging and privacy make of each of peft's tuners, at the embedded text model; docs/methods.md has the table.

    python -m fedpeft.simulations.benchmarks.peft_types      writes fedpeft/assets/peft_types.json anew (2 minutes)
    python docs/make.py                                      puts it into docs/methods.md

`average` is `adapters.peft_measure.measure_average`, `start` the largest change of a logit before training, `values`
what a client uploads beside the head (4 bytes each), `per_sample` how the gradient of one record is had under
sample-level DP, `cohort` whether clients train together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpeft.adapters.adapted import Adapted, build
from fedpeft.adapters.peft_measure import measure_average
from fedpeft.adapters.peft_types import MEASURED, allowed_types
from fedpeft.clients.cohort.engine import why_not_cohort
from fedpeft.clients.inputs import verify_gradients
from fedpeft.config import AdapterConfig, ModelConfig
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from fedpeft.files import write_bytes
from fedpeft.models.loading import load
from fedpeft.privacy.gradients import linear_owners, ruled_owners

ROLES, LABELS, LENGTH = ("peft", "head"), 4, 12
MODEL = ModelConfig(name="tiny-bert", task="sequence-classification")
Row = dict[str, Any]
# Options without which a type does not fit the model: sizes that divide its width of 64, and which tokens.
NEEDED: dict[str, Row] = {
    "TRAINABLE_TOKENS": {"token_indices": list(range(3, 20))},
    "VBLORA": {"vector_length": 64},
    "C3A": {"block_size": 16},
}
VARIANTS: list[tuple[str, Row]] = [
    ("LORA", {"use_dora": True}),
    ("LORA", {"init_lora_weights": "pissa"}),
    ("LORA", {"init_lora_weights": "olora"}),
    ("LORA", {"init_lora_weights": "orthogonal"}),
    ("LORA", {"init_lora_weights": "mica"}),
    ("MISS", {"init_weights": "bat"}),
]


def cases() -> list[tuple[str, Row]]:
    """Every type that can be had, with the options that it needs, and variants."""
    return [*((name, NEEDED.get(name, {})) for name in allowed_types()), *VARIANTS]


def inputs() -> dict[str, Tensor]:
    """Four drawn texts of one length."""
    ids = torch.randint(3, 250, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def make(name: str, options: Row) -> Adapted:
    """The model with an adapter of the type."""
    return build(MODEL, AdapterConfig(name="peft", options={"type": name, "options": options}), LABELS, 0)


def measure(name: str, options: Row) -> Row:
    """The row of one type."""
    return {"type": name, "options": options, **measure_model(make(name, options), ROLES)}


@torch.no_grad()
def measure_model(model: Adapted, roles: tuple[str, ...]) -> Row:
    """What is measured of an untrained adapter.

    Args:
        roles: of what trains, the head last.
    """
    model.write(model.state())
    start = float((model.logits(inputs()) - load(MODEL, LABELS, 0).forward(inputs())).abs().max())
    return {
        "start": float(f"{start:.1e}"),
        "values": model.form.select(roles[:-1]).parameters,
        "average": float(f"{measure_average(model, inputs(), roles[:-1]):.2g}"),
        "per_sample": find_way(model, roles),
        "cohort": why_not_cohort(model, roles) is None,
    }


def find_way(model: Adapted, roles: tuple[str, ...]) -> str:
    """How the gradient of one record is had: in one pass, in one of its own, or not."""
    with torch.enable_grad():
        try:
            verify_gradients(model, Encoded(inputs(), torch.arange(LABELS)), roles, LENGTH)
        except InputError:
            return "none"
    parts = model.base.modules, model.train_roles(roles)
    return "alone" if linear_owners(*parts) is None and ruled_owners(*parts) is None else "together"


def write(path: Path = MEASURED) -> None:
    """All rows, a line each."""
    rows = [json.dumps(measure(*case)) for case in cases()]
    write_bytes(path, ("[\n" + ",\n".join(rows) + "\n]\n").encode())


if __name__ == "__main__":
    write()
