"""Packages that only some runs need; the core installation does not have them."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from fedpeft.errors import InputError

if TYPE_CHECKING:
    from fedpeft.config import Config

EXTRAS = {  # package -> the extra that has it
    "ray": "ray",
    "opacus": "opacus",
    "bitsandbytes": "quantized",
    "tensorboard": "trackers",
    "wandb": "trackers",
    "mlflow": "trackers",
}


def require(package: str, what: str) -> None:
    """Refuse `what` where its package is not installed; says which extra has it."""
    # Looked for and not imported, which takes seconds for some.
    if importlib.util.find_spec(package) is None:
        named = f'"fedpeft[{EXTRAS[package]}]"' if package in EXTRAS else package
        raise InputError(f"{what} needs the package {package}, which is not installed. Run: pip install {named}")


def require_of_run(config: Config) -> None:
    """Refuse a run whose engine, accountant or kernels are not installed, before anything is loaded."""
    if config.run.engine == "ray":
        require("ray", "run.engine=ray")
    if config.privacy.unit != "none" and config.privacy.accountant == "prv":
        require("opacus", "privacy.accountant=prv")
    if config.model.quantization is not None:
        require("bitsandbytes", f"model.quantization={config.model.quantization}")
