"""Rows of the federated benchmark's tables beside the methods: what no federation at all reaches on the same worlds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedpeft.simulations.baselines import fit_logistic
from fedpeft.simulations.benchmarks.toy import World


def baselines(experiment: str, worlds: Sequence[World]) -> list[dict[str, Any]]:
    """Test accuracy of the frozen net, and of logistic regressions on pooled frozen features and on raw inputs.

    The regressions see all clients' records in one place and have no privacy: reference points, not rivals.
    """
    rows = []
    for world in worlds:
        features, held_features = (world.x @ world.W.T).relu(), (world.held_x @ world.W.T).relu()
        y, held_y = world.y.numpy(), world.held_y.numpy()
        found = {
            "no adaptation": float(((held_features @ world.V.T).argmax(1) == world.held_y).double().mean()),
            "frozen features + logistic regression": fit_logistic(features.numpy(), y, held_features.numpy(), held_y),
            "raw inputs + logistic regression": fit_logistic(world.x.numpy(), y, world.held_x.numpy(), held_y),
        }
        rows += [
            {"experiment": experiment, "method": name, "seed": world.seed, "accuracy": value}
            for name, value in found.items()
        ]
    return rows
