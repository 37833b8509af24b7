"""What a data set is made of, once for all of its views: tensors, tokens in flat arrays, or pictures to be decoded.

A storage gives the inputs and labels of the records that it is asked for, texts padded on the right to its longest.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedpeft.data.ragged import BLOCK, Ragged, map_ragged
from fedpeft.objectives.base import IGNORE, by_token


class Stored(Protocol):
    """All records of a data set. Its views read them, and none copies them."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each record without padding, int64 [N]; 1 for records without a mask, such as images."""

    @property
    def teaches(self) -> np.ndarray:
        """Whether each record has something to predict, bool [N]; a text of one token in causal-lm has not."""

    def inputs_of(self, rows: np.ndarray | None) -> dict[str, Tensor]:
        """Model inputs by name [n, ...] of these records; None is all."""

    def labels_of(self, rows: np.ndarray | None) -> Tensor:
        """Labels [n], [n, T] or [n, K] of these records; None is all. No input is touched."""


class Tensors:
    """A data set that is in memory, texts padded."""

    def __init__(self, inputs: dict[str, Tensor], labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray:
        mask = self.inputs.get("attention_mask")
        return np.ones(len(self.labels), dtype=np.int64) if mask is None else mask.sum(1).numpy()

    @cached_property
    def teaches(self) -> np.ndarray:
        if not by_token(self.labels):
            return labelled(self.labels)
        return (self.labels[:, 1:] != IGNORE).any(1).numpy()

    def inputs_of(self, rows: np.ndarray | None) -> dict[str, Tensor]:
        return {name: choose_rows(value, rows) for name, value in self.inputs.items()}

    def labels_of(self, rows: np.ndarray | None) -> Tensor:
        return choose_rows(self.labels, rows)


class Tokens:
    """Texts as flat arrays of token ids, which may be mapped from files: 2 bytes a token, and no padding.

    Args:
        columns: model inputs in the tokenizer's order; the ids, and others that are alike in all tokens as that number.
        fillers: of the columns that are not filled up with 0.
        labels: int64 [N]; float32 [N, K]; or rows, filled up with IGNORE, as long as the texts (in causal-lm the ids
            themselves).
        since: the first place whose label is predicted: 1 where that is done from the token before.
    """

    def __init__(
        self, columns: Mapping[str, Ragged | int], fillers: Mapping[str, int], labels: Tensor | Ragged, since: int = 1
    ) -> None:
        self.columns, self.fillers, self.labels, self.since = dict(columns), dict(fillers), labels, since
        ids = columns["input_ids"]
        assert isinstance(ids, Ragged)
        self.ids, self.longest = ids, ids.longest

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        return self.ids.lengths

    @cached_property
    def teaches(self) -> np.ndarray:
        if isinstance(self.labels, Tensor):
            return labelled(self.labels)
        if self.labels is self.ids:
            return self.lengths > 1
        blocks = np.split(np.arange(len(self)), range(BLOCK, len(self), BLOCK))
        return np.concatenate([(self.labels_of(block)[:, self.since :] != IGNORE).any(1).numpy() for block in blocks])

    def inputs_of(self, rows: np.ndarray | None) -> dict[str, Tensor]:
        rows = np.arange(len(self)) if rows is None else rows
        found = {}
        for name, column in self.columns.items():
            filler = self.fillers.get(name, 0)
            if isinstance(column, int):
                there = np.arange(self.longest) < self.lengths[rows][:, None]
                table = np.where(there, np.int64(column), np.int64(filler))
            else:
                table = column.padded(rows, self.longest, filler)
            found[name] = torch.from_numpy(table)
        return found

    def labels_of(self, rows: np.ndarray | None) -> Tensor:
        if isinstance(self.labels, Tensor):
            return choose_rows(self.labels, rows)
        rows = np.arange(len(self)) if rows is None else rows
        return torch.from_numpy(self.labels.padded(rows, self.longest, IGNORE))


def labelled(labels: Tensor) -> np.ndarray:
    """Whether each record has a label [N]; of numbers [N, K] at least one that is no NaN."""
    if not labels.is_floating_point():
        return np.ones(len(labels), dtype=bool)
    return (~labels.isnan()).any(1).numpy()


def choose_rows(value: Tensor, rows: np.ndarray | None) -> Tensor:
    """The rows of a tensor with these numbers, copies; None is the tensor itself."""
    return value if rows is None else value[torch.from_numpy(rows)]


# On disk --------------------------------------------------------------------------------------------------------------


def describe_tokens(stored: Tokens, folder: Path) -> dict[str, Any]:
    """What `open_tokens` needs beside the columns' files, which lie in the folder; writes the labels beside them."""
    columns = {
        name: column if isinstance(column, int) else str(column.values.dtype) for name, column in stored.columns.items()
    }
    labels: Any = "input_ids"
    if isinstance(stored.labels, Tensor):
        values = stored.labels.numpy()
        (folder / "labels.values").write_bytes(values.tobytes())
        labels = {"dtype": str(values.dtype), "shape": list(values.shape)}
    elif stored.labels is not stored.ids:
        labels = str(stored.labels.values.dtype)
    return {"columns": columns, "fillers": stored.fillers, "labels": labels, "since": stored.since}


def open_tokens(folder: Path, tree: dict[str, Any]) -> Tokens:
    """Tokens that were described, mapped from their folder."""
    columns = {
        name: map_ragged(folder / name, column) if isinstance(column, str) else column
        for name, column in tree["columns"].items()
    }
    labels: Any
    if isinstance(tree["labels"], dict):
        values = np.fromfile(folder / "labels.values", dtype=tree["labels"]["dtype"])
        labels = torch.from_numpy(values.reshape(tree["labels"]["shape"]))
    else:
        labels = (
            columns["input_ids"] if tree["labels"] == "input_ids" else map_ragged(folder / "labels", tree["labels"])
        )
    return Tokens(columns, tree["fillers"], labels, tree["since"])
