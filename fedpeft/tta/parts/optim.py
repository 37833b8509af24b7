"""SGD and Adam as functions of plain tensors: an optimiser's moments are data like the rest of a method's state.

>>> import torch
>>> params, moments = {"w": torch.tensor([1.0])}, fresh()
>>> params = step("sgd", params, {"w": torch.tensor([2.0])}, moments, lr=0.25)
>>> params["w"].tolist()
[0.5]
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def fresh() -> dict[str, Any]:
    """Moments before the first step."""
    return {"steps": 0, "first": {}, "second": {}}


def step(
    kind: str,
    params: dict[str, Tensor],
    gradients: dict[str, Tensor],
    moments: dict[str, Any],
    lr: float,
    momentum: float = 0.0,
) -> dict[str, Tensor]:
    """New parameters after one step; `moments` is updated in place, and tensors without a gradient stay as they are.

    `adam` is Kingma and Ba's, without weight decay; `sgd` has heavy-ball momentum, its first step being the gradient.
    """
    moments["steps"] += 1
    first, second = moments["first"], moments["second"]
    # The old dict stays as it is: a method goes back to it where a step is refused.
    new = dict(params)
    for name, gradient in gradients.items():
        if kind == "sgd":
            if momentum:
                gradient = first[name] = gradient + momentum * first[name] if name in first else gradient.clone()
            new[name] = params[name] - lr * gradient
            continue
        zero = gradient.new_zeros(gradient.shape)
        first[name] = BETA1 * first.get(name, zero) + (1 - BETA1) * gradient
        second[name] = BETA2 * second.get(name, zero) + (1 - BETA2) * gradient.square()
        mean = first[name] / (1 - BETA1 ** moments["steps"])
        spread = (second[name] / (1 - BETA2 ** moments["steps"])).sqrt()
        new[name] = params[name] - lr * mean / (spread + EPSILON)
    return new
