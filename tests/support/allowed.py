"""Policies of a few lines, made whole: of the bounds that a policy has to set, they leave open the others by name."""

from __future__ import annotations

import yaml

from fedpeft.clients.policy import BOUNDS


def opened(text: str) -> str:
    """The policy's text with `unbounded` for each bound that it does not set."""
    tree = yaml.safe_load(text) or {}
    return yaml.safe_dump({**tree, "unbounded": [key for key in BOUNDS if tree.get(key) is None]})
