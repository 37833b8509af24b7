"""Packages that only some runs need; the core installation does not have them."""

from __future__ import annotations

import importlib.util

from fedpeft.errors import InputError

EXTRAS = {  # package -> the extra that has it
    "ray": "ray",
    "opacus": "opacus",
    "tensorboard": "trackers",
    "wandb": "trackers",
    "mlflow": "trackers",
}


def require(package: str, what: str) -> None:
    """Refuse `what` where its package is not installed; says which extra has it."""
    if importlib.util.find_spec(package) is None:
        named = f'"fedpeft[{EXTRAS[package]}]"' if package in EXTRAS else package
        raise InputError(f"{what} needs the package {package}, which is not installed. Run: pip install {named}")
