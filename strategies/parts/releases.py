"""A server's release under client-level privacy has a name, and a file where it cannot be made again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fedpeft.files import write_tensors
from fedpeft.state import AdapterState


def name(total: Tensor, unclipped: float | None) -> str:
    """A hash of every bit of a release: the noised sum and, where the clip adapts, the noised count."""
    # `repr` of a float gives back every bit of it.
    return hashlib.sha256(total.numpy().tobytes() + repr(unclipped).encode()).hexdigest()


def read(path: Path, start: AdapterState) -> tuple[Tensor, float | None] | None:
    """The release that was made of a round from this state; None if there is none."""
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        # From another state the same round is another release: this one must not be taken for it.
        if metadata["start"] != start.sha256():
            return None
        total: Tensor = file.get_tensor("total")
        return total.to(torch.float64), json.loads(metadata["unclipped"])


def write(path: Path, start: AdapterState, total: Tensor, unclipped: float | None, history: int) -> None:
    """Keep a release durably, and drop those of rounds that no resume goes back to.

    Args:
        history: rounds back for which a resume may ask.
    """
    write_tensors(path, {"total": total}, {"start": start.sha256(), "unclipped": json.dumps(unclipped)})
    number = int(path.stem.partition("-")[2])
    for old in path.parent.glob("release-*.safetensors"):
        if int(old.stem.partition("-")[2]) < number - history:
            old.unlink(missing_ok=True)
