"""Federated and continual fine-tuning of peft adapters.

>>> import fedpeft
>>> callable(fedpeft.simulate)
True
"""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`simulate` and `resume`, imported when first used: importing fedpeft alone stays cheap."""
    if name in ("simulate", "resume"):
        return getattr(importlib.import_module("fedpeft.simulations.run"), name)
    raise AttributeError(f"module 'fedpeft' has no attribute '{name}'")
