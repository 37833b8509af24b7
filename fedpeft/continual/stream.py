"""Streams: tasks that arrive one after another, from any labelled records, with a manifest that fixes every choice.

    class     disjoint classes, no task id at test time
    task      the same, and the task id is given: only the task's classes compete
    domain    the same classes in every task, shifted inputs
    blurry    classes overlap between tasks
    free      one pass, and no boundary is shown to the body

The manifest has the class order, the record numbers of every task's training and test set, the seed, and a hash of the
records, so that a saved stream is the same one everywhere or refused.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft import registry, seeds
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from fedpeft.files import write_bytes

SCENARIOS = ("class", "task", "domain", "blurry", "free")
VERSION = 1


@dataclass(frozen=True)
class Task:
    """One task: its name, the classes that it trains on (sorted), its training and its test records."""

    name: str
    classes: tuple[int, ...]
    train: Encoded
    test: Encoded


@dataclass(frozen=True)
class Stream:
    """A sequence of tasks over `classes` classes in all.

    Attributes:
        scenario: one of SCENARIOS.
        manifest: JSON-ready; what `load` needs beside the records.
    """

    name: str
    scenario: str
    classes: int
    tasks: tuple[Task, ...]
    manifest: dict[str, Any]

    @property
    def boundaries(self) -> bool:
        """Whether a body is told when a task begins."""
        return self.scenario != "free"

    def seen(self, index: int) -> list[int]:
        """Classes of the tasks up to and with this one, sorted."""
        return sorted({label for task in self.tasks[: index + 1] for label in task.classes})


def plan(
    name: str,
    scenario: str,
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    groups: list[list[int]],
    seed: int,
    names: list[str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The manifest of a stream whose tasks are groups of classes."""
    if scenario not in SCENARIOS:
        raise InputError(registry.unknown("stream.scenario", scenario, SCENARIOS))
    tasks = [
        {
            "name": names[number] if names else f"task-{number}",
            "classes": sorted(group),
            "train": np.flatnonzero(np.isin(train_labels, group)).tolist(),
            "test": np.flatnonzero(np.isin(test_labels, group)).tolist(),
        }
        for number, group in enumerate(groups)
    ]
    return {
        "version": VERSION,
        "name": name,
        "scenario": scenario,
        "seed": seed,
        "classes": int(max(train_labels.max(), test_labels.max())) + 1,
        **more,
        "tasks": tasks,
    }


def group_classes(
    classes: int, tasks: int, seed: int, shuffle: bool = True, key: str = "stream.tasks"
) -> list[list[int]]:
    """Classes in random order, cut into `tasks` groups that differ by at most one class.

    Args:
        key: the config key to blame.

    Raises:
        InputError: more tasks than classes.
    """
    if tasks < 1 or tasks > classes:
        raise InputError(f"{key}={tasks}: {classes} classes make 1 to {classes} tasks.")
    order = seeds.numpy_generator(seed, "classes").permutation(classes) if shuffle else np.arange(classes)
    return [part.tolist() for part in np.array_split(order, tasks)]


def build(manifest: dict[str, Any], train: Encoded, test: Encoded) -> Stream:
    """The stream of a manifest over these records; the records' hash is added, or checked where it is there.

    Raises:
        InputError: another version, or other records.
    """
    if manifest.get("version") != VERSION:
        raise InputError(f"stream manifest: version {manifest.get('version')} is not known; this is {VERSION}.")
    found = _hash_sets(train, test)
    if manifest.setdefault("records_sha256", found) != found:
        raise InputError(f"stream manifest: '{manifest['name']}' was made from other records than these.")
    tasks = tuple(
        Task(
            task["name"],
            tuple(task["classes"]),
            train.view(np.array(task["train"], dtype=np.int64)),
            test.view(np.array(task["test"], dtype=np.int64)),
        )
        for task in manifest["tasks"]
    )
    for task in tasks:
        if len(task.train) == 0:
            raise InputError(f"stream '{manifest['name']}': {task.name} has no training records.")
    return Stream(manifest["name"], manifest["scenario"], manifest["classes"], tasks, manifest)


def save_stream(stream: Stream, path: Path) -> None:
    """Write a stream's manifest as JSON; the records themselves stay where they are."""
    write_bytes(path, (json.dumps(stream.manifest) + "\n").encode())


def load(path: Path, train: Encoded, test: Encoded) -> Stream:
    """The stream of a saved manifest.

    Raises:
        InputError: no such file, no manifest, or one of other records.
    """
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a stream manifest: {error}") from error
    return build(manifest, train, test)


def _hash_sets(train: Encoded, test: Encoded) -> str:
    digest = hashlib.sha256()
    for data in (train, test):
        for name, value in [*sorted(data.inputs.items()), ("labels", data.labels)]:
            # Names, dtypes and shapes too: the bytes alone can be read as other records.
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
