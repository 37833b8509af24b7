"""split.json: which client has which training records, and their label histogram; saved once, reused by later runs.

Where clients are the owners of records by a natural column, `owners` says which client is whom, and `left_out` which
records are no client's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.config import Config, to_tree
from fedpeft.data.partition import owners, unowned
from fedpeft.data.skipped import Skipped
from fedpeft.data.source import Records
from fedpeft.errors import InputError
from fedpeft.files import write_bytes


def client_name(index: int) -> str:
    """The stable name of a simulated client; sorts like its index.

    >>> client_name(7)
    'client-007'
    """
    return f"client-{index:03d}"


def histogram(parts: Mapping[str, Sequence[int]], labels: np.ndarray, label_names: Sequence[str]) -> np.ndarray:
    """Records per client and class, int64 [clients, classes]."""
    return np.stack([np.bincount(labels[np.asarray(part)], minlength=len(label_names)) for part in parts.values()])


def save(path: Path, parts: Mapping[str, Sequence[int]], train: Records, config: Config) -> None:
    """Write client name -> numbers of its training records, with what made them and what data they are of."""
    tree: dict[str, Any] = {
        "fingerprint": train.fingerprint,
        "records": len(train),
        "seed": config.run.seed,
        "partition": to_tree(config.data.partition),
        "histogram": {
            "labels": train.label_names,
            "counts": histogram(parts, train.labels, train.label_names).tolist(),
        },
        "clients": {client: [int(index) for index in part] for client, part in parts.items()},
    }
    column = config.data.partition.options.get("column")
    if column in train.columns:
        values = train.columns[column]
        tree["owners"] = owners(values, parts)
        tree["left_out"] = [entry.tree() for entry in unowned(column, values, list(parts.values()))]
    write_bytes(path, (json.dumps(tree) + "\n").encode())


def load(path: Path, fingerprint: str, clients: Sequence[str]) -> dict[str, list[int]]:
    """Client name -> numbers of its records, from a saved split of the same data over the same clients.

    Raises:
        InputError: not a split file, a split of other data or over other clients, or numbers that are no split.
    """
    try:
        tree = json.loads(path.read_text())
        found, records = str(tree["fingerprint"]), int(tree["records"])
        parts = {str(client): [int(index) for index in part] for client, part in tree["clients"].items()}
    except OSError as error:
        raise InputError(f"data.split: cannot read {path}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"data.split: {path} is no split.json: {error!r}.") from error
    if found != fingerprint:
        raise InputError(
            f"data.split: {path} splits other training records (data fingerprint {found[:12]}; these have "
            f"{fingerprint[:12]}). Use the data.source, data.test, data.test_fraction, data.limit and run.seed that it "
            "was made with, or set data.split=null."
        )
    if len(parts) != len(clients):
        raise InputError(
            f"data.split: {path} has {len(parts)} clients, data.clients={len(clients)}. Set data.clients={len(parts)}."
        )
    if list(parts) != list(clients):
        wrong = next(name for name, expected in zip(parts, clients, strict=True) if name != expected)
        raise InputError(
            f"data.split: {path} has a client '{wrong}'; expected {clients[0]} to {clients[-1]} in this order."
        )
    for client, part in parts.items():
        if not part or min(part) < 0 or max(part) >= records:
            raise InputError(
                f"data.split: {path}: {client} must list record numbers from 0 to {records - 1}, at least one."
            )
    everything = [index for part in parts.values() for index in part]
    if len(set(everything)) < len(everything):
        raise InputError(f"data.split: {path} gives a record to a client twice, or to two clients.")
    return parts


def left_out(path: Path) -> tuple[Skipped, ...]:
    """What a split that `save` wrote gives to no client."""
    found = json.loads(path.read_text()).get("left_out", [])
    return tuple(Skipped(**{**entry, "examples": tuple(entry["examples"])}) for entry in found)
