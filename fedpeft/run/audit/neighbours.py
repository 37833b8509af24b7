"""Sets of records that differ by one, chosen to make the difference large: what a sensitivity is measured on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from fedpeft.adapters.adapted import Adapted
from fedpeft.clients import train as training
from fedpeft.data.encode import Encoded
from fedpeft.objectives.base import IGNORE


def neighbours(model: Adapted, data: Encoded, count: int) -> Iterator[tuple[Encoded, list[Encoded]]]:
    """Sets of records, and each set with one record more: an ordinary one, or an adversary's.

    The sets: none; one or `count` records labelled with what the model answers, whose gradients are small, and near
    zero where it is sure; `count` as they are. The adversary's records: one of the set with the runner-up as its label,
    which pulls against it; the least likely label; inputs out of all proportion, or not numbers; texts of full length,
    or of one token; no label, and so no gradient.
    """
    first, last = data.view(np.arange(1)), data.view(np.array([len(data) - 1]))
    # Without the last, which is the one that is added.
    many = data.view(np.arange(min(count, len(data) - 1)))
    sets = [data.view(np.arange(0)), labelled(model, first, best), labelled(model, many, best), many]
    more = [
        last,
        labelled(model, first, second),
        labelled(model, last, worst),
        remove_labels(last),
        *(labelled(model, record, worst) for record in extreme(last)),
    ]
    for some in sets:
        yield some, [joined(some, record) for record in more]


def gradients(clip: float, width: int = 64) -> list[tuple[Tensor, list[Tensor]]]:
    """Cases as per-sample gradients [N, P]: aligned ones of several norms, and an adversary's against them."""
    axis, corner = torch.eye(1, width) * clip, torch.full((1, width), -clip)
    adversary = [-1e6 * axis, -axis, corner, 1e-3 * axis, math.nan * axis, math.inf * corner, 0.0 * axis]
    # Norms below, at and far above the clip.
    alike = [(size * axis).repeat(count, 1) for size in (1e-2, 1.0, 1e3) for count in (0, 1, 20)]
    return [(some, [torch.cat([some, one]) for one in adversary]) for some in alike]


def best(logits: Tensor) -> Tensor:
    """The likeliest class of logits [..., K], int64 [...]."""
    return logits.argmax(-1)


def second(logits: Tensor) -> Tensor:
    """The second likeliest class of logits [..., K], int64 [...]."""
    return logits.topk(2).indices[..., 1]


def worst(logits: Tensor) -> Tensor:
    """The least likely class of logits [..., K], int64 [...]."""
    return logits.argmin(-1)


# The same among numbers, for whose loss the model's own is the best, or near it.
PULLS: dict[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] = {
    best: lambda logits: logits,
    second: lambda logits: -logits,
    worst: lambda logits: 1e3 - logits,
}


@torch.no_grad()
def labelled(model: Adapted, data: Encoded, choose: Callable[[Tensor], Tensor]) -> Encoded:
    """The records with labels chosen from the model's own logits; of each token where tokens have labels."""
    device, labels = next(iter(model.parameters.values())).device, data.labels.clone()
    for index in range(len(data)):
        inputs, _ = training.on_device(data, np.array([index]), device)
        logits = model.logits(inputs).cpu()
        answer = choose(logits)[0]
        if labels.ndim == 1:
            labels[index] = answer
        elif labels.is_floating_point():
            labels[index] = PULLS[choose](logits[0].float())
        elif model.base.objective.causal:
            # What a causal model says at a token is of the next one.
            labels[index, 1 : len(answer)] = answer[:-1]
        else:
            labels[index, : len(answer)] = answer
    return Encoded(data.inputs, labels, end=data.end)


def remove_labels(data: Encoded) -> Encoded:
    """The records with every label IGNORE, so that they teach nothing."""
    labels = data.labels
    nothing = math.nan if labels.is_floating_point() else IGNORE
    return Encoded(data.inputs, torch.full_like(labels, nothing), end=data.end)


def extreme(record: Encoded) -> list[Encoded]:
    """A record with inputs that no honest client has."""
    inputs, labels = record.inputs, record.labels
    if "attention_mask" in inputs:
        # Ids are places in a table and cannot be scaled; how many of them count can be changed.
        mask = inputs["attention_mask"]
        first = torch.zeros_like(mask)
        first[:, 0] = 1
        return [
            Encoded({**inputs, "attention_mask": value}, labels, end=record.end)
            for value in (torch.ones_like(mask), first)
        ]
    return [
        Encoded({name: factor * value for name, value in inputs.items()}, labels) for factor in (1e3, -1e3, math.nan)
    ]


def joined(some: Encoded, record: Encoded) -> Encoded:
    """The records and after them one more, as a neighbouring data set."""
    more = record.inputs
    return Encoded(
        {name: torch.cat([value, more[name]]) for name, value in some.inputs.items()},
        torch.cat([some.labels, record.labels]),
        end=some.end,
    )
