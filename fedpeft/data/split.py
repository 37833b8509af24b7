"""split.json: which client has which training records, and their label histogram; saved once, reused by later runs.

Where clients are the owners of records by a natural column, `owners` says which client is whom, and `left_out` which
records are no client's.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.config import Config, to_tree
from fedpeft.data import answers
from fedpeft.data.partition import find_owners, find_unowned
from fedpeft.data.records import Records
from fedpeft.data.skipped import Skipped
from fedpeft.errors import InputError
from fedpeft.files import write_bytes

LONGEST = 120  # bytes of a client's name: with what is added it must be a file's name


def client_name(index: int) -> str:
    """The stable name of a simulated client; sorts like its index.

    >>> client_name(7)
    'client-007'
    """
    return f"client-{index:03d}"


def owner_names(owners: Sequence[Any]) -> list[str]:
    """Names of clients that are the owners of their records: as the data have them, but safe as names of files.

    What is no letter, digit, or one of `-_.@` and the space is escaped as %XX; so are a dot or space at an end. Long
    names are cut. Names that a file system may take for one another (by case, or by how an accent is written), and cut
    ones, end in ~ and a hash of the owner. Different owners never have the same name.

    >>> owner_names(["Ward 3", "../etc", "a+b", "north", "North"])
    ['Ward 3', '%2E.%2Fetc', 'a%2Bb', 'north~cebd708c', 'North~22dc2a67']
    """
    plain = [_escape_name(str(owner)) for owner in owners]
    alike = Counter(_fold_name(name) for name in plain)
    return [
        f"{_cut_name(name)}~{hashlib.sha256(repr(owner).encode()).hexdigest()[:8]}"
        if alike[_fold_name(name)] > 1 or _cut_name(name) != name
        else name
        for name, owner in zip(plain, map(str, owners), strict=True)
    ]


def is_name(text: str) -> bool:
    """Whether a client's name is as safe as those of `client_name` and `owner_names`."""
    body = re.sub("~[0-9a-f]{8}$", "", text)
    return (
        bool(body)
        and len(text.encode()) <= LONGEST + 9
        and body[0] not in ". "
        and text[-1] not in ". "
        and all(_is_kept(char) or char == "%" for char in body)
    )


def _escape_name(text: str) -> str:
    if not text:
        return "%"
    last = len(text) - 1
    return "".join(
        char
        if _is_kept(char) and not (char in ". " and place in (0, last))
        else "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogatepass"))
        for place, char in enumerate(text)
    )


def _is_kept(char: str) -> bool:
    return char in "-_.@ " or unicodedata.category(char)[0] in "LNM"


def _fold_name(name: str) -> str:
    # Again after folding, which may leave letters that decompose.
    return unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", _cut_name(name)).casefold())


def _cut_name(name: str) -> str:
    # A letter that the cut went through is left out.
    return name.encode()[:LONGEST].decode(errors="ignore")


def histogram(parts: Mapping[str, Sequence[int]], labels: np.ndarray, label_names: Sequence[str]) -> np.ndarray:
    """Records per client and class, int64 [clients, classes]."""
    return np.stack([np.bincount(labels[np.asarray(part)], minlength=len(label_names)) for part in parts.values()])


def _count_labels(parts: Mapping[str, Sequence[int]], train: Records) -> np.ndarray:
    if train.targets is None:
        return histogram(parts, train.labels, train.label_names)
    return np.stack([answers.counts(train.targets[np.asarray(part)]) for part in parts.values()])


def save(path: Path, parts: Mapping[str, Sequence[int]], train: Records, config: Config) -> None:
    """Write client name -> numbers of its training records, with what made them and what data they are of."""
    tree: dict[str, Any] = {
        "fingerprint": train.fingerprint,
        "records": len(train),
        "seed": config.run.seed,
        "partition": to_tree(config.data.partition),
        "histogram": {
            "labels": train.label_names,
            "counts": _count_labels(parts, train).tolist(),
        },
        "clients": {client: [int(index) for index in part] for client, part in parts.items()},
    }
    column = config.data.partition.options.get("column")
    if column is not None and column in train.columns:
        values = train.columns[column]
        tree["owners"] = find_owners(values, parts)
        tree["left_out"] = [entry.tree() for entry in find_unowned(column, values, list(parts.values()))]
    write_bytes(path, (json.dumps(tree) + "\n").encode())


def client_names(path: Path) -> list[str]:
    """The clients of a saved split, in their order.

    Raises:
        InputError: not a split file, or a name that no client can have: files are named after it.
    """
    found = list(_read_split(path)[2])
    wrong = [name for name in found if not is_name(name)] or found * (len({*map(_fold_name, found)}) < len(found))
    if wrong:
        raise InputError(
            f"data.split: {path}: no client can have the name {', '.join(map(repr, wrong[:3]))}: files "
            "are named after it, and file systems take some names for one another."
        )
    return found


def load(path: Path, fingerprint: str, clients: Sequence[str]) -> dict[str, list[int]]:
    """Client name -> numbers of its records, from a saved split of the same data over the same clients.

    Raises:
        InputError: not a split file, a split of other data or over other clients, or numbers that are no split.
    """
    found, records, parts = _read_split(path)
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


def owners_of(path: Path) -> dict[str, str]:
    """Client -> whose records it has, as a split that `save` wrote says; empty where there is no split (real sites)."""
    found: dict[str, str] = json.loads(path.read_text()).get("owners", {}) if path.exists() else {}
    return found


def left_out(path: Path) -> tuple[Skipped, ...]:
    """What a split that `save` wrote gives to no client."""
    found = json.loads(path.read_text()).get("left_out", [])
    return tuple(map(Skipped.of, found))


def _read_split(path: Path) -> tuple[str, int, dict[str, list[int]]]:
    try:
        tree = json.loads(path.read_text())
        parts = {str(client): [int(index) for index in part] for client, part in tree["clients"].items()}
        return str(tree["fingerprint"]), int(tree["records"]), parts
    except OSError as error:
        raise InputError(f"data.split: cannot read {path}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"data.split: {path} is no split.json: {error!r}.") from error
