"""Records as they were read, before any tokenizer or image processor; those of texts as files of a cache."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.data import pictures
from fedpeft.data.columns import Natural
from fedpeft.data.photos import Pictures
from fedpeft.data.ragged import BLOCK, Texts, TextWriter, mapped_texts
from fedpeft.data.skipped import Skipped
from fedpeft.data.wording import Wording


@dataclass(frozen=True)
class Records:
    """Raw labelled records before any tokenizer or image processor.

    Attributes:
        inputs: N texts (`Texts` where they come from files; a conversation is the text that
            `conversations.dump_turns` makes of its turns), or images [N, H, W, C], uint8 or float32 in [0, 1]; a list
            of [H, W, C] where they differ in size; `Pictures` where they are files or bytes.
        labels: int64 [N], indices into `label_names`; zeros where records have no class of their own (language
            modelling, and where there are `targets`).
        columns: natural columns (strings or numbers), each [N].
        kind: "text" or "image".
        skipped: what the source has besides, and is not in the records.
        wording: what the texts are, and how they become tokens.
        augment: what is done to pictures that are trained on.
        targets: [N, K], a column for each of `label_names`: numbers (float32), or which of the names a record has
            (bool); None where a record has one class at most (`fedpeft.data.answers`).
    """

    inputs: Sequence[str] | np.ndarray | Sequence[np.ndarray]
    labels: np.ndarray
    label_names: list[str]
    columns: Mapping[str, np.ndarray]
    kind: str
    skipped: tuple[Skipped, ...] = ()
    wording: Wording = field(default_factory=Wording)
    augment: tuple[str, ...] = ()
    targets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> Records:
        """The records with these numbers, in this order."""
        inputs: Any
        if isinstance(self.inputs, Texts | Pictures):
            inputs = self.inputs.take(indices)
        elif isinstance(self.inputs, np.ndarray):
            inputs = self.inputs[indices]
        else:
            inputs = [self.inputs[index] for index in indices]
        known = self.columns if isinstance(self.columns, Natural) else Natural(self.columns)
        targets = None if self.targets is None else self.targets[indices]
        return replace(self, inputs=inputs, labels=self.labels[indices], columns=known.take(indices), targets=targets)

    def split_every(self, nth: int) -> tuple[Records, Records]:
        """Training records, and every nth one, from the first on, as test set."""
        test = np.arange(len(self)) % nth == 0
        return self.take(np.flatnonzero(~test)), self.take(np.flatnonzero(test))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of inputs, labels and label names: whether a saved split fits. Natural columns may be added later."""
        digest = hashlib.sha256(self.kind.encode())
        if isinstance(self.inputs, np.ndarray):
            digest.update(f"{self.inputs.dtype}{self.inputs.shape}".encode())
            digest.update(np.ascontiguousarray(self.inputs).data)
        elif isinstance(self.inputs, Pictures):
            digest.update(np.ascontiguousarray(self.inputs.hashes).data)
        elif isinstance(self.inputs, Texts):
            for block in self.inputs.raw():
                # With lengths: "ab", "c" are other records than "a", "bc".
                digest.update(b"".join(len(data).to_bytes(8, "big") + data for data in block))
        else:
            for value in self.inputs:
                data = value.encode() if isinstance(value, str) else pictures.as_bytes(value)
                digest.update(len(data).to_bytes(8, "big") + data)
        digest.update(np.ascontiguousarray(self.labels).data)
        if self.targets is not None:
            digest.update(np.ascontiguousarray(self.targets).data)
        digest.update("\0".join(self.label_names).encode())
        return digest.hexdigest()


def save_records(records: Records, folder: Path) -> dict[str, Any]:
    """Write records of texts into a folder, where some of their texts may lie already; what `open_records` needs."""
    known = records.columns.stored if isinstance(records.columns, Natural) else records.columns
    kept: dict[str, Any] = {
        "inputs": _save_texts(records.inputs, folder / "inputs"),
        "columns": [
            [name, *_save_column(values, folder / f"natural-{number}")]
            for number, (name, values) in enumerate(known.items())
        ],
    }
    names = {kept["inputs"], *(file for _, kind, file in kept["columns"] if kind != "values")}
    # The spool has written every column of the file, also those that no record needs.
    for path in folder.iterdir():
        if path.stem not in names:
            path.unlink()
    np.save(folder / "labels.npy", records.labels)
    if records.targets is not None:
        np.save(folder / "targets.npy", records.targets)
    return {
        **kept,
        "label_names": records.label_names,
        "skipped": [entry.tree() for entry in records.skipped],
        "form": records.wording.form,
    }


def open_records(folder: Path, tree: dict[str, Any]) -> Records:
    """Records of texts that were saved; texts are mapped from the folder."""
    columns = {
        name: mapped_texts(folder / file) if kind == "texts" else np.load(folder / f"{file}.npy", allow_pickle=False)
        for name, kind, file in tree["columns"]
        if kind != "values"
    }
    for name, kind, file in tree["columns"]:
        if kind == "values":
            array = np.empty(len(file), dtype=object)
            array[:] = file
            columns[name] = array
    return Records(
        mapped_texts(folder / tree["inputs"]),
        np.load(folder / "labels.npy"),
        tree["label_names"],
        Natural({name: columns[name] for name, _, _ in tree["columns"]}),
        "text",
        tuple(map(Skipped.of, tree["skipped"])),
        Wording(tree["form"]),
        targets=np.load(folder / "targets.npy") if (folder / "targets.npy").is_file() else None,
    )


def _save_texts(texts: Any, path: Path) -> str:
    """The name of a text column's files in the folder."""
    # The file of a view has other texts besides.
    if isinstance(texts, Texts) and texts.rows is None and texts.path is not None and texts.path.parent == path.parent:
        return texts.path.name
    writer = TextWriter(path)
    for start in range(0, len(texts), BLOCK):
        writer.extend(texts[start : start + BLOCK])
    writer.finish()
    return path.name


def _save_column(values: np.ndarray | Texts, path: Path) -> tuple[str, Any]:
    """How a natural column is kept: as texts or an array, under a name, or as the values themselves."""
    if isinstance(values, Texts):
        return "texts", _save_texts(values, path)
    if values.dtype == object:
        return "values", values.tolist()
    np.save(path.with_name(f"{path.name}.npy"), values)
    return "array", path.name
