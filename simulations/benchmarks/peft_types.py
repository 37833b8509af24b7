"""What averaging and privacy make of each of peft's tuners, at the embedded text model; docs/methods.md has the table.

    python -m fedpeft.simulations.benchmarks.peft_types      writes fedpeft/assets/peft_types.json anew (2 minutes)
    python docs/make.py                                      puts it into docs/methods.md

`average` is `adapters.peft_measure.measure_average`, `start` the largest change of a logit before training, `values`
what a client uploads beside the head (4 bytes each), `upload` their formula for a layer (`adapter_sizes`), `per_sample`
how the gradient of one record is had under sample-level DP, `cohort` whether clients train together, `merges` what puts
it into the base weights: `fedpeft export --merge`, peft's own layers, or nothing.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpeft.adapters import folder
from fedpeft.adapters.adapted import Adapted, build
from fedpeft.adapters.flat import flatten_adapter
from fedpeft.adapters.peft_measure import measure_average, move_randomly
from fedpeft.adapters.peft_rules import is_tuner
from fedpeft.adapters.peft_types import MEASURED, allowed_types
from fedpeft.clients.cohort.engine import why_not_cohort
from fedpeft.clients.inputs import verify_gradients
from fedpeft.config import AdapterConfig, ModelConfig
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from fedpeft.files import write_bytes
from fedpeft.models.loading import load
from fedpeft.privacy.gradients import linear_owners, ruled_owners
from fedpeft.run.export import read_mergeable
from fedpeft.simulations.benchmarks.adapter_sizes import formula_of_type

ROLES, LABELS, LENGTH = ("peft", "head"), 4, 12
CLOSE = 1e-4  # of logits: a merged weight is rounded once more
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
    upload = formula_of_type(name, options)
    return {"type": name, "options": options, "upload": upload, **measure_model(make(name, options), ROLES)}


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
        "merges": find_merge(model, roles[:-1]),
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


@torch.no_grad()
def find_merge(model: Adapted, roles: tuple[str, ...]) -> str:
    """What puts a trained adapter into the base weights so that logits stay: export, peft, or no."""
    state = move_randomly(model.state(), roles, 0)
    model.write(state)
    model.base.backbone.eval()
    wanted = model.logits(inputs())
    with tempfile.TemporaryDirectory() as place:
        folder.save(flatten_adapter(state), Path(place), base=MODEL.name, task=MODEL.task, settings=model.folder)
        try:
            base = load(MODEL, LABELS, 0)
            read_mergeable(Path(place))(base)
            if torch.allclose(base.forward(inputs()), wanted, atol=CLOSE):
                return "export"
        except InputError:
            pass
    layers: list[Any] = [module for module in model.base.backbone.modules() if is_tuner(module)]
    try:
        for layer in layers:
            layer.merge()
    except (AttributeError, NotImplementedError, RuntimeError, ValueError, TypeError):
        return "no"
    apart = not layers or not all(getattr(layer, "merged", False) for layer in layers)
    return "no" if apart or not torch.allclose(model.logits(inputs()), wanted, atol=CLOSE) else "peft"


def write(path: Path = MEASURED) -> None:
    """All rows, a line each."""
    rows = [json.dumps(measure(*case)) for case in cases()]
    write_bytes(path, ("[\n" + ",\n".join(rows) + "\n]\n").encode())


if __name__ == "__main__":
    write()
