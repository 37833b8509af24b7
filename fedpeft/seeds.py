"""Seeds are derived, never consumed: every random draw names its purpose, so order and workers do not matter.

>>> derive(0, "round", 7, "client", "site-3") == derive(0, "round", 7, "client", "site-3")
True
>>> derive(0, "round", 7) == derive(0, "round", 8)
False
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def derive(root: int, *path: str | int) -> int:
    """Hash `root` and a path of names and numbers to an integer in [0, 2**63)."""
    # As JSON, in which "round", 7 is no other path's text.
    text = json.dumps([root, *path], separators=(",", ":"))
    # One bit less than eight bytes have, so that it fits a signed integer of 64.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(root: int, *path: str | int) -> np.random.Generator:
    """A numpy generator seeded by `derive(root, *path)`."""
    import numpy as np

    return np.random.default_rng(derive(root, *path))


def torch_generator(root: int, *path: str | int) -> torch.Generator:
    """A CPU torch generator seeded by `derive(root, *path)`."""
    import torch

    return torch.Generator().manual_seed(derive(root, *path))
