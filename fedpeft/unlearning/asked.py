"""What is asked to be forgotten: a client, a task of a sequence, or the records of a file, as numbers of records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedpeft import registry
from fedpeft.config import Config
from fedpeft.continual import curriculum
from fedpeft.data import pictures, source, tables
from fedpeft.data.photos import Pictures
from fedpeft.data.records import Records
from fedpeft.errors import InputError
from fedpeft.objectives.base import load_objective

CLIENT, TASK, RECORDS = "client", "task", "records"
NUMBER = "record"  # the one column of a file of numbers
SHOWN = 10  # rows, or names, of an error


@dataclass(frozen=True)
class Asked:
    """What is to be forgotten.

    Attributes:
        kind: CLIENT, TASK or RECORDS.
        name: of the client, number of the task, or path of the file.
        numbers: of the training records that go, as split.json counts them, sorted.
        words: for readers.
    """

    kind: str
    name: str
    numbers: np.ndarray
    words: str

    def fingerprint(self, config_text: str) -> str:
        """Tells apart what is asked of which run: of its config and the numbers of the records."""
        return hashlib.sha256(json.dumps([config_text, self.kind, self.numbers.tolist()]).encode()).hexdigest()

    def without(self, parts: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """A split without these records; clients of which nothing is left are not in it."""
        gone = set(self.numbers.tolist())
        kept = {client: [number for number in part if number not in gone] for client, part in parts.items()}
        return {client: part for client, part in kept.items() if part}


def require_one(client: str | None, task: int | None, records: str | Path | None) -> None:
    """Refuse a request of nothing, or of several kinds."""
    given = {"--client": client, "--task": task, "--records": records}
    named = [flag for flag, value in given.items() if value is not None]
    if len(named) != 1:
        what = " and ".join(named) if named else "none of them is given"
        raise InputError(f"{', '.join(given)}: give exactly one; here: {what}.")


def seeker(
    config: Config, client: str | None, task: int | None, records: str | Path | None
) -> Callable[[Records, dict[str, list[int]]], Asked]:
    """What finds, among the run's training records and its clients' shares, the one thing that is given."""

    def find(train: Records, parts: dict[str, list[int]]) -> Asked:
        if client is not None:
            return find_client(client, parts)
        if task is not None:
            return find_task(task, config, train)
        return find_records(Path(str(records)), config, train)

    return find


def find_client(name: str, parts: Mapping[str, Sequence[int]]) -> Asked:
    """All records of a client.

    Raises:
        InputError: there is none of that name, or no other.
    """
    if name not in parts:
        raise InputError(registry.unknown("--client", name, parts))
    if len(parts) == 1:
        raise InputError(f"--client {name}: it is the run's only client, so nothing is left to learn from.")
    return Asked(CLIENT, name, np.sort(np.array(parts[name])), _say_client(name))


def _say_client(name: str) -> str:
    """
    >>> _say_client("client-003"), _say_client("north")
    ('client-003', 'client north')
    """
    return name if name.lower().startswith("client") else f"client {name}"


def find_task(number: int, config: Config, train: Records) -> Asked:
    """All records of the classes of a task, counted from 0.

    Raises:
        InputError: the run has no tasks, no task of that number, or no other.
    """
    section = config.continual
    if section.body is None:
        raise InputError(
            f"--task {number}: the run has no tasks (continual.body=null). Give --client NAME or --records FILE."
        )
    plan = curriculum.make_curriculum(section, len(train.label_names), config.run.rounds, config.run.seed)
    names = [", ".join(train.label_names[label] for label in plan.classes(task)) for task in range(len(plan.groups))]
    if not 0 <= number < len(names):
        there = "; ".join(f"{task}: {text}" for task, text in enumerate(names))
        raise InputError(f"--task {number}: the run's tasks are {there}.")
    if len(names) == 1:
        raise InputError(f"--task {number}: it is the run's only task, so nothing is left to learn.")
    return Asked(TASK, str(number), plan.of(train.labels, number), f"task {number} (classes {names[number]})")


def find_records(path: Path, config: Config, train: Records) -> Asked:
    """The records of a file: of the form of `data.source`, or their numbers, in a single column `record`.

    A record that the training set has several times is forgotten as often.

    Raises:
        InputError: a row is no training record; names the rows.
    """
    if not path.exists():
        raise InputError(f"--records {path}: there is no such file.")
    listed = _read_numbers(path)
    rows = _by_content(path, config, train) if listed is None else [[number] for number in listed]
    wrong = [place for place, found in enumerate(rows, 1) if not found or not 0 <= found[0] < len(train)]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise InputError(
            f"--records {path}: row {', '.join(map(str, wrong[:SHOWN]))}{more} of {len(rows)} is none of the run's "
            f"{len(train)} training records (data.source={config.data.source}). A row has the same content and label "
            f"as there; or the file has one column `{NUMBER}` with numbers from 0 to {len(train) - 1}, as split.json."
        )
    numbers = np.unique(np.concatenate([np.array(found) for found in rows])) if rows else np.empty(0, dtype=np.int64)
    if not len(numbers):
        raise InputError(f"--records {path}: there is no record in it.")
    return Asked(RECORDS, str(path), numbers, f"the {len(numbers)} records of {path.name}")


def _read_numbers(path: Path) -> list[int] | None:
    """The numbers of a file that has one column of them; None of any other."""
    if not path.is_file():
        return None
    columns = tables.local(str(path)).train.columns
    if set(columns) != {NUMBER}:
        return None
    try:
        return [int(str(value)) for value in columns[NUMBER]]
    except ValueError as error:
        raise InputError(f"--records {path}: column `{NUMBER}` holds what is no whole number: {error}.") from error


def _by_content(path: Path, config: Config, train: Records) -> list[list[int]]:
    """For each record of the file, the numbers of the training records that it is."""
    places: dict[bytes, list[int]] = {}
    objective = load_objective(config.model.task)
    named = objective.labelled != "none"
    for number, key in enumerate(content(train, named)):
        places.setdefault(key, []).append(number)
    # The run's names, so that labels that are numbers mean the same.
    data = replace(config.data, labels=train.label_names) if objective.headed else config.data
    given = source.whole(str(path), "--records", data, config.model.task)
    return [places.get(key, []) for key in content(given, named)]


def content(records: Records, named: bool) -> list[bytes]:
    """What each record is: a hash of its input, and where it has one of its label by name, or of its targets."""
    found = []
    for number in range(len(records)):
        digest = hashlib.sha256()
        if isinstance(records.inputs, Pictures):
            digest.update(records.inputs.hashes[number].tobytes())
        else:
            value = records.inputs[number]
            digest.update(value.encode() if isinstance(value, str) else pictures.as_bytes(value))
        if named:
            # Apart from the input, which may end in what a label begins with.
            digest.update(b"\0" + records.label_names[records.labels[number]].encode())
        if records.targets is not None:
            digest.update(np.ascontiguousarray(records.targets[number]).data)
        found.append(digest.digest())
    return found
