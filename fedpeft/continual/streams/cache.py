"""A stream keeps what it computed from prepared data beside them, under a hash of all that it depends on.

`fedpeft data prepare NAME` replaces the folder, and the cache with it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fedpeft.data import prepare
from fedpeft.errors import InputError
from fedpeft.files import write_tensors


def tensors(
    what: str, name: str, settings: dict[str, Any], make: Callable[[], dict[str, Tensor]], also: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The tensors that `make` gives, read from disk where it has run before with the same data and settings.

    Args:
        name: prepared data set, whose folder holds the cache.
        settings: JSON-ready; every constant that the result depends on.
        also: further prepared data or models that it depends on.

    Raises:
        InputError: one of them is not prepared.
    """
    from safetensors.torch import load_file

    # What the data were made from is a part of the hash: after `data prepare` of another version nothing old is read.
    facts = {other: about(other) for other in (name, *also)}
    digest = hashlib.sha256(json.dumps([facts, settings], sort_keys=True).encode()).hexdigest()[:16]
    path = prepare.home(name) / "cache" / f"{what}-{digest}.safetensors"
    if not path.exists():
        logging.getLogger("fedpeft").info("%s: computing %s once, for %s", name, what, path)
        write_tensors(path, make())
    return load_file(path)


def about(name: str) -> dict[str, Any]:
    """What `dataset.json` says of prepared data or a prepared model.

    Raises:
        InputError: it is not prepared.
    """
    path = prepare.home(name) / prepare.ABOUT
    if not path.is_file():
        raise InputError(f"{name} is not prepared: there is no {path.parent}. Run: fedpeft data prepare {name}")
    found: dict[str, Any] = json.loads(path.read_text())
    return found
