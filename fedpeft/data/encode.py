"""Records as tensors: texts tokenized and padded on the right, images as float32 [N, C, H, W].

>>> import numpy as np
>>> from fedpeft.data.records import Records
>>> images = np.full((2, 4, 4, 1), 255, dtype=np.uint8)
>>> data = encode(Records(images, np.array([0, 1]), ["a", "b"], {}, "image"), None, "image-classification", 128)
>>> inputs, labels = data.batch(np.array([1]))
>>> tuple(inputs["pixel_values"].shape), float(inputs["pixel_values"].max()), labels.tolist()
((1, 1, 4, 4), 1.0, [1])
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor

from fedpeft.data import skipped
from fedpeft.data.cache import Cache, hash_code, hash_facts
from fedpeft.data.images import Images
from fedpeft.data.masked import MaskedTokens
from fedpeft.data.ragged import Ragged, RaggedWriter, Texts
from fedpeft.data.records import Records
from fedpeft.data.skipped import Skipped
from fedpeft.data.stored import Stored, Tensors, Tokens, describe_tokens, open_tokens
from fedpeft.data.templates import template_of
from fedpeft.errors import InputError
from fedpeft.objectives.base import Objective, by_token, load_objective

CHUNK = 256
TOKENIZED = 1024  # texts that are tokenized together
CUT = {"": "are cut", "end": "are cut", "start": "are cut at their start", "drop": "are left out"}


class Encoded:
    """A data set as a model takes it: all records of a storage, or a view of some of them.

    A view is a list of numbers on the same storage, and a view of a view is one list too: a client's share, its task or
    the order of its batches costs 8 bytes a record, whatever the records weigh. Only `batch`, and `inputs` and `labels`
    of a view, copy what they are asked for.

    Args:
        inputs: model inputs by name, each [N, ...]; texts are padded on the right.
        labels: int64 [N]; where tokens have labels int64 [N, T], IGNORE where there is nothing to predict; numbers
            float32 [N, K].
        skipped: what of the records is not in them.
        end: the token that follows the texts in causal-lm, if any.
    """

    stored: Stored
    draws: int | None = None  # seed of what is done to pictures

    def __init__(
        self, inputs: dict[str, Tensor], labels: Tensor, skipped: tuple[Skipped, ...] = (), end: int | None = None
    ) -> None:
        self.stored, self.skipped, self.end = Tensors(inputs, labels), skipped, end
        self._rows: np.ndarray | None = None  # all of them, in order

    @classmethod
    def over(cls, stored: Stored, skipped: tuple[Skipped, ...] = (), end: int | None = None) -> Self:
        """All records of a storage."""
        made = cls.__new__(cls)
        made.stored, made.skipped, made.end, made._rows = stored, skipped, end, None
        return made

    def __len__(self) -> int:
        return len(self.stored if self._rows is None else self._rows)

    @property
    def rows(self) -> np.ndarray:
        """The records' numbers in the storage, int64 [N]."""
        return np.arange(len(self)) if self._rows is None else self._rows

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Inputs by name, each [N, ...] at full width; of a view, copies."""
        if self.draws is not None and isinstance(self.stored, Images):
            return self.stored.augmented(self.rows, self.draws)
        return self.stored.inputs_of(self._rows)

    @property
    def labels(self) -> Tensor:
        """Labels [N], or [N, T] at full width; no input is touched."""
        return self.stored.labels_of(self._rows)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each record without padding, int64 [N]; 1 for what is no text."""
        return self.stored.lengths if self._rows is None else self.stored.lengths[self._rows]

    def view(self, indices: np.ndarray) -> Self:
        """The records with these numbers, in this order, a number as often as it is there."""
        chosen = copy.copy(self)
        indices = np.ascontiguousarray(indices, dtype=np.int64)
        chosen._rows = indices if self._rows is None else self._rows[indices]
        # Said once, of the whole: a view would say it again.
        chosen.skipped = ()
        return chosen

    def augmented(self, seed: int) -> Self:
        """The same records with other draws: pictures that are changed by `data.augment`, each in its own way, or texts
        of which other tokens are hidden.

        Raises:
            InputError: there is nothing to be drawn.
        """
        if isinstance(self.stored, MaskedTokens):
            chosen = copy.copy(self)
            chosen.stored = self.stored.redrawn(seed)
            return chosen
        if not isinstance(self.stored, Images) or not self.stored.augment:
            raise InputError("data.augment: the objective's records are no pictures that can be changed.")
        chosen = copy.copy(self)
        chosen.draws = seed
        return chosen

    def blocks(self, size: int = CHUNK) -> Iterator[Self]:
        """Views of all records in order, some at a time: whoever looks at all inputs never has all in memory."""
        for start in range(0, len(self), size):
            yield self.view(np.arange(start, min(start + size, len(self))))

    def teaching(self) -> np.ndarray:
        """Numbers of the records that have something to predict."""
        return np.flatnonzero(self.stored.teaches if self._rows is None else self.stored.teaches[self._rows])

    def batch(self, indices: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs and labels of these records; texts are cut to the longest of them."""
        chosen = self.view(indices)
        inputs, labels = chosen.inputs, chosen.labels
        if "attention_mask" not in inputs:
            return inputs, labels
        longest = int(chosen.lengths.max(initial=1))
        cut = {name: value[:, :longest] for name, value in inputs.items()}
        return cut, labels[:, :longest] if by_token(labels) else labels


def encode(
    records: Records, processor: Any, task: str, max_length: int, what: str = "texts", cache: Cache | None = None
) -> Encoded:
    """All records as a model takes them. Texts that are cut, and those with nothing to predict, are counted and said.

    Args:
        processor: a transformers tokenizer for texts; an image processor, or None for images that go in as they are
            (uint8 scaled to [0, 1]).
        task: name of the objective, which makes inputs and labels of the records.
        max_length: longest text in tokens, with what the tokenizer puts around it; longer ones lose their end.
        what: the texts, for what is said of them.
        cache: where tokens are kept for other processes and later runs; None has them in memory.

    Raises:
        InputError: the records are of a kind that the task or the processor does not take.
    """
    objective = load_objective(task)
    if records.kind != objective.records:
        raise InputError(f"model.task={task} does not take {records.kind}s.")
    if records.kind == "text" and processor is None:
        raise InputError(f"model.task={task}: the model has no tokenizer.")
    texts = records.inputs
    if cache is None or not isinstance(texts, Texts) or texts.nbytes < cache.least:
        return objective.encode(records, processor, max_length, what)
    return _encode_cached(objective, records, processor, max_length, what, cache)


def _encode_cached(
    objective: Objective, records: Records, tokenizer: Any, max_length: int, what: str, cache: Cache
) -> Encoded:
    fresh: list[Encoded] = []

    def make(folder: Path) -> dict[str, Any]:
        data = objective.encode(records, tokenizer, max_length, what, folder)
        fresh.append(data)
        tree = describe_tokens(data.stored, folder) if isinstance(data.stored, Tokens) else None
        return {"tokens": tree, "skipped": [entry.tree() for entry in data.skipped], "end": data.end}

    facts = {
        "records": records.fingerprint,
        "tokenizer": fingerprint_of(tokenizer),
        "objective": hash_code(type(objective)),
        "max_length": max_length,
        "what": what,
        "wording": [asdict(records.wording), template_of(records, tokenizer, objective.encoder_decoder).text],
    }
    kept = cache.get("tokens", facts, make)
    if kept is None:
        return objective.encode(records, tokenizer, max_length, what)
    folder, made = kept
    if made["tokens"] is None:  # an objective that has its own way
        return fresh[0] if fresh else objective.encode(records, tokenizer, max_length, what)
    notes = tuple(Skipped.of(entry) for entry in made["skipped"])
    if not fresh:
        skipped.say(notes)
    return Encoded.over(objective.arrange(open_tokens(folder, made["tokens"]), tokenizer), notes, made["end"])


def explain_silence(data: Encoded) -> str:
    """What is to be said of records of which none has something to predict: all that was left out or cut of them."""
    reasons = f" ({'; '.join(map(str, data.skipped))})" if data.skipped else ""
    return f"none of {len(data)} texts has a token to predict{reasons}"


def fingerprint_of(processor: Any) -> str:
    """sha256 of all that decides what a tokenizer makes of a text, without what a call leaves in it."""
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        found = {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    files: dict[str, Any] = {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}
    if "tokenizer.json" in found:
        tree = json.loads(found["tokenizer.json"])
        files["tokenizer.json"] = hash_facts({key: tree[key] for key in tree.keys() - {"truncation", "padding"}})
    versions = [metadata.version(package) for package in ("transformers", "tokenizers")]
    return hash_facts([type(processor).__qualname__, list(processor.model_input_names), files, versions])


def encode_texts(
    records: Records,
    tokenizer: Any,
    max_length: int,
    what: str,
    *,
    end: int | None = None,
    losing: str = "",
    folder: Path | None = None,
) -> tuple[dict[str, Ragged | int], dict[str, int], tuple[Skipped, ...]]:
    """The columns of texts and what they are filled up with, as `Tokens` has them, and what is to be said of those
    that are cut.

    Args:
        end: token to put after every text that does not end in it.
        losing: what a text that is too long loses (`shortened`); empty leaves it to the tokenizer, which keeps what it
            puts around a text.
        folder: where the columns are written; None keeps them in memory.
    """
    writers: dict[str, RaggedWriter] = {}
    values: dict[str, set[int]] = {}
    cut = longest = 0
    for texts in cut_blocks(records.inputs):
        rows, count, most = _tokenize_texts([str(text) for text in texts], tokenizer, max_length, losing, end)
        cut, longest = cut + count, max(longest, most)
        for name, each in rows.items():
            if name not in writers:
                writers[name] = RaggedWriter(type_of(name, tokenizer), folder and folder / name)
            writers[name].extend(each)
            if name != "input_ids" and len(values.setdefault(name, set())) < 2:
                values[name].update(*each)
    columns: dict[str, Ragged | int] = {name: writer.finish() for name, writer in writers.items()}
    for name, found in values.items():
        if len(found) < 2:
            columns[name] = next(iter(found), 0)
            for path in () if folder is None else folder.glob(f"{name}.*"):
                path.unlink()
    # The filler may be None: a tokenizer without a padding token has no id for it.
    fillers = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": tokenizer.pad_token_type_id or 0}
    if not cut:
        return columns, fillers, ()
    with_end = ", with their end token," if end is not None else ""
    text = f"{what} have more tokens{with_end} and {CUT[losing]}; the longest has {longest}"
    return columns, fillers, (Skipped(f"model.max_length={max_length}", text, cut, len(records)),)


def cut_blocks(texts: Any) -> Iterator[Sequence[str]]:
    """The texts in blocks; one empty block of no texts, as a tokenizer then still says which inputs it makes."""
    if isinstance(texts, Texts) and len(texts):
        yield from texts.blocks(TOKENIZED)  # type: ignore[misc]  # none is missing
    else:
        for start in range(0, max(1, len(texts)), TOKENIZED):
            yield texts[start : start + TOKENIZED]


def type_of(name: str, tokenizer: Any) -> Any:
    """The smallest type that holds a model input of this tokenizer."""
    if name != "input_ids":
        return np.uint8 if name in ("attention_mask", "token_type_ids") else np.int32
    return np.uint16 if len(tokenizer) <= 2**16 else np.int32


def _tokenize_texts(
    texts: list[str], tokenizer: Any, max_length: int, losing: str, end: int | None
) -> tuple[dict[str, list[list[int]]], int, int]:
    """Rows of every model input, of at most `max_length` tokens; how many texts were cut; tokens of the longest."""
    tokens = tokenizer(texts, padding=False, truncation=False, verbose=False)
    rows = {name: tokens[name] for name in tokenizer.model_input_names if name in tokens}
    if end is not None:
        added = {"input_ids": end, "attention_mask": 1}
        for index, ids in enumerate(rows["input_ids"]):
            if not ids or ids[-1] != end:
                for name, values in rows.items():
                    values[index] = [*values[index], added.get(name, 0)]
    longest = max((len(ids) for ids in rows["input_ids"]), default=0)
    cut = [index for index, ids in enumerate(rows["input_ids"]) if len(ids) > max_length]
    if losing:
        first = [int(ids[:1] == [tokenizer.bos_token_id]) for ids in rows["input_ids"]]
        rows = {
            name: [shorten_row(row, max_length, losing, kept) for row, kept in zip(values, first, strict=True)]
            for name, values in rows.items()
        }
    elif cut:
        # By the tokenizer itself, which keeps its end mark; a row cut by hand would lose it.
        short = tokenizer([texts[index] for index in cut], padding=False, truncation=True, max_length=max_length)
        for name, values in rows.items():
            for index, row in zip(cut, short[name], strict=True):
                values[index] = row
    return rows, len(cut), longest


def shorten_row(row: list[Any], most: int, losing: str, kept: int) -> list[Any]:
    """At most so many entries of a text.

    Args:
        losing: "end" or "start" is what goes; "drop" leaves the first entry alone, from which nothing is learned.
        kept: entries of the start that stay where the start goes, such as the mark of a beginning.
    """
    if len(row) <= most:
        return row
    if losing == "start":
        return row[:kept] + row[len(row) - most + kept :]
    return row[: 1 if losing == "drop" else most]
