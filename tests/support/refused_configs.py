"""Configs that `load` refuses."""

from __future__ import annotations

import pytest

from fedpeft.config import load
from fedpeft.errors import InputError


def refused(tree, overrides=(), *words):
    """The message of the InputError, checked to hold every word."""
    with pytest.raises(InputError) as error:
        load(tree, overrides)
    message = str(error.value)
    for word in words:
        assert word in message, f"{word!r} not in: {message}"
    return message
