"""A run depends on what its folder does not hold: base model, records, and what the processor makes of them.

    identity.json   name (of the run in its ledgers), versions, fingerprints

A resumed run whose base or data has become another one would mix two runs without a word, so it is refused. A name
that was written down stays that of the ledgers when the folder is moved.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpeft import registry
from fedpeft.config import Config
from fedpeft.data.encode import Encoded
from fedpeft.data.images import Images
from fedpeft.errors import InputError
from fedpeft.files import write_bytes
from fedpeft.models import loading
from fedpeft.models.base import Base

log = logging.getLogger("fedpeft")
FILE = "identity.json"
SOME = 64  # pictures
CLOSE = 1e-4  # relative: processors of images round otherwise on another machine
UNLEARNING = "unlearning"  # of a folder that `fedpeft unlearn` has made: what was asked, and whether it runs again
PACKAGES = ("fedpeft", "torch", "transformers", "peft")


def begin(run: Path, device: str | None = None) -> None:
    """Write the run's name and what it runs on."""
    found = {} if device is None else {"device": device}
    _write_identity(run, {"name": run.name, "versions": versions(), **found, "fingerprints": {}})


def name_of(run: Path) -> str:
    """The run's name in ledgers: that of its folder when it began."""
    return str(_read_identity(run).get("name") or run.name)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages on which a result's bits depend."""
    return {"python": platform.python_version(), **{package: metadata.version(package) for package in PACKAGES}}


def hold(run: Path, found: dict[str, Any], config: Config) -> None:
    """Write fingerprints down, or compare them with those that the folder has.

    Raises:
        InputError: one differs; says which, and what to do.
    """
    tree = _read_identity(run)
    known = tree.get("fingerprints") or {}
    wrong = [key for key, value in found.items() if key in known and not _are_equal(known[key], value)]
    if wrong:
        raise InputError(refusal(run, wrong[0], known[wrong[0]], found[wrong[0]], config))
    if set(found) - set(known):
        if (run / "checkpoints").exists():
            log.warning(
                "%s has no fingerprint of %s: whether they are those that it began with is not known.",
                run,
                " and ".join(sorted(set(found) - set(known))),
            )
        # What is there comes last and wins: the ledgers go by the name that the folder had when the run began.
        _write_identity(run, {"name": run.name, "versions": versions(), **tree, "fingerprints": {**known, **found}})


def compare_versions(run: Path) -> None:
    """Say where a run goes on with other software: it then need not end with the same bits."""
    then, now = _read_identity(run).get("versions") or {}, versions()
    changed = [f"{name} {then[name]} then, {now[name]} now" for name in now if then.get(name, now[name]) != now[name]]
    if changed:
        log.warning(
            "%s: %s. The result may differ from that of a run that was not interrupted.", run, "; ".join(changed)
        )


def fingerprint_of(run: Path, key: str) -> Any:
    """What a run's folder has as its fingerprint of `key`; None where it has none, or is no run's."""
    return (_read_identity(run).get("fingerprints") or {}).get(key)


def refusal(run: Path, key: str, known: Any, value: Any, config: Config) -> str:
    """Why a run cannot go on: what `key` names is another than when it began (`known`), and what to do."""
    what = {
        "base model": f"model.name={config.model.name}: another base model lies there than",
        "training records": f"data.source={config.data.source}: its training records are not those",
        "test records": f"data.test={config.data.test or config.data.source}: the test records are not those",
        "processed inputs": f"model.name={config.model.name}: its tokenizer or image processor makes other inputs of "
        "the same records than it did",
        "adapter to start from": f"adapter.start={config.adapter.start}: its content is another than",
    }[key]
    return (
        f"{what} when {run} began (fingerprint {_shorten_value(known)} then, {_shorten_value(value)} now). Put back "
        "what was there, or start a new run in a new folder."
    )


def of_base(base: Base, config: Config) -> str:
    """Hash of all weights that a run does not train; those of an embedded model are fedpeft's own."""
    if config.model.name in registry.EMBEDDED:
        return config.model.name
    return loading.fingerprint(base, heads=not config.adapter.train_head)


def of_inputs(*parts: Encoded) -> list[Any]:
    """Token ids by hash; pixels by their mean and standard deviation."""
    return [_hash_input(part, name) for part in parts for name in sorted(part.view(np.arange(0)).inputs)]


def _hash_input(data: Encoded, name: str) -> Any:
    form = data.view(np.arange(0)).inputs[name]
    if form.is_floating_point():
        # Of pictures that are decoded at every look some stand for all; their bytes are in the records' fingerprint.
        few = isinstance(data.stored, Images) and data.stored.ready is None
        value = (data.view(np.arange(min(SOME, len(data)))) if few else data).inputs[name]
        return [list(value.shape), *(float(number) for number in torch.std_mean(value, correction=0))]
    digest = hashlib.sha256(f"{(len(data), *form.shape[1:])}".encode())
    for block in data.blocks():
        digest.update(block.inputs[name].contiguous().numpy().data)
    return digest.hexdigest()


def _are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_are_equal, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=CLOSE, abs_tol=CLOSE)
    return bool(one == other)


def _shorten_value(value: Any) -> str:
    return value[:12] if isinstance(value, str) else hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _read_identity(run: Path) -> dict[str, Any]:
    try:
        found = json.loads((run / FILE).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(
            f"{run / FILE}: not readable: {error}. Without it nobody knows what the run depends on."
        ) from error
    return found if isinstance(found, dict) else {}


def _write_identity(run: Path, tree: dict[str, Any]) -> None:
    write_bytes(run / FILE, (json.dumps(tree, indent=1) + "\n").encode())
