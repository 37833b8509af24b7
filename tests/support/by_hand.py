"""Federated averaging written out over stock transformers and peft: every client trains, the server takes the mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedpeft.adapters import folder
from fedpeft.adapters.flat import flatten_adapter
from fedpeft.data.encode import Encoded
from fedpeft.run.world import World


def average(
    world: World,
    make: Callable[[], Any],
    loss: Callable[[Any, Encoded], Tensor],
    shares: Callable[[int], Mapping[str, Encoded]],
    steps: int,
    lr: float,
    place: Path,
) -> dict[str, Tensor]:
    """The adapter after all rounds, of plain SGD over all of a client's records in each step.

    Args:
        make: the base model.
        loss: of a model over a client's records.
        shares: the records of each client in a round.
        place: an empty folder.
    """
    folder.save(flatten_adapter(world.start.adapter), place / "0", base="base", task=world.config.model.task)
    for number in range(1, world.config.run.rounds + 1):
        ends, weights = [], []
        for share in shares(number).values():
            model = peft.PeftModel.from_pretrained(make(), place / str(number - 1), is_trainable=True).eval()
            optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=lr)
            for _ in range(steps):
                loss(model, share).backward()
                optimizer.step()
                optimizer.zero_grad()
            ends.append(peft.get_peft_model_state_dict(model))
            weights.append(len(share))
        mean = {
            key: sum(weight * end[key] for weight, end in zip(weights, ends, strict=True)) / sum(weights)
            for key in ends[0]
        }
        peft.set_peft_model_state_dict(model, mean)
        model.save_pretrained(place / str(number))
    return load_file(place / str(world.config.run.rounds) / "adapter_model.safetensors")


def compare(run: Path, place: Path, by_hand: dict[str, Tensor]) -> None:
    """The run's adapter is the one by hand, which is another than the first one in every tensor."""
    ours, first = (load_file(path / "adapter_model.safetensors") for path in (run / "adapter", place / "0"))
    assert ours.keys() == by_hand.keys()
    for key, value in by_hand.items():
        torch.testing.assert_close(ours[key], value, atol=2e-5, rtol=1e-3)
        assert (value - first[key]).abs().max() > 1e-3, key
