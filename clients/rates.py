"""A client's part of ATP: better adaptation rates from its own labelled records, at the adapter that it received."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedpeft.clients.test_time import by_name
from fedpeft.data.encode import Encoded
from fedpeft.models.adapted import Adapted
from fedpeft.tta.deployed import deploy
from fedpeft.tta.methods.atp import ATP


def learned(model: Adapted, rates: dict[str, Tensor], data: Encoded, options: dict[str, Any],
            seed: int) -> dict[str, Tensor]:
    """New rates under the same names (`rates:site/role`), the model being what was received. It is left as it is.

    Args:
        options: lr, epochs, batch_size and scale of the `atp` strategy.
    """
    deployed = deploy(model)
    before = {key: float(value) for key, value in rates.items()}
    names = dict(zip(by_name(model, deployed, before), before, strict=True))
    method = ATP(deployed)
    after = method.learn(by_name(model, deployed, before), data, options["lr"], options["epochs"],
                         options["batch_size"], options["scale"], seed)
    return {names[name]: torch.tensor([value], dtype=torch.float32) for name, value in after.items()}
