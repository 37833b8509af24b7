"""Texts whose words have tags: read from two columns of lists, and brought to tokens.

A record is kept as the JSON of its words and their tags. A word's tag is that of its first token; its other tokens, and
what the tokenizer adds, have none (IGNORE).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.config import DataConfig
from fedpeft.data import answers
from fedpeft.data.columns import Natural, in_order, require_unicode, show_value
from fedpeft.data.encode import cut_blocks, type_of
from fedpeft.data.ragged import Ragged, RaggedWriter, Texts
from fedpeft.data.records import Records
from fedpeft.data.skipped import Skipped, note_skipped
from fedpeft.data.stored import Tokens
from fedpeft.data.tables import Table
from fedpeft.errors import InputError
from fedpeft.objectives.base import IGNORE

USUAL = {"text": ("tokens", "words"), "label": ("ner_tags", "tags", "labels", "pos_tags")}


def read(table: Table, config: DataConfig) -> Records:
    """Records of a table with a list of words and a list of tags in each row; `targets` say which tags a record has.

    Raises:
        InputError: no such columns; or a record that has none, or another number of tags than of words.
    """
    words, tags = find_column(table, "text", config.text), find_column(table, "label", config.label)
    known, rows = table.names.get(tags), []
    for number, (each, marks) in enumerate(zip(table.columns[words], table.columns[tags], strict=True), 1):
        if not all(isinstance(value, list | tuple | np.ndarray) for value in (each, marks)):
            raise InputError(
                f"{table.where}: record {number} has {show_value(each)} in column {words} and {show_value(marks)} in "
                f"column {tags}; both must be lists, of the words and of their tags."
            )
        if len(each) != len(marks) or not len(each):
            raise InputError(
                f"{table.where}: record {number} has {len(each)} words in column {words} and {len(marks)} tags in "
                f"column {tags}; every word needs one tag, and a record a word."
            )
        wrong = next((word for word in each if not isinstance(word, str) or not word.strip()), None)
        if wrong is not None:
            raise InputError(f"{table.where}: column {words}: record {number} has {show_value(wrong)} among its words.")
        named = [answers.name_of(table, tags, number, mark, known) for mark in marks]
        for column, found in ((words, each), (tags, named)):
            require_unicode(table, column, number, " ".join(found))
        rows.append((list(each), named))
    names = known or in_order({mark for _, marks in rows for mark in marks})
    natural = Natural.of({name: values for name, values in table.columns.items() if name not in (words, tags)})
    return Records(
        Texts.of([json.dumps(row, ensure_ascii=False) for row in rows]),
        np.zeros(len(rows), dtype=np.int64),
        names,
        natural,
        "text",
        table.skipped,
        targets=answers.table_of([marks for _, marks in rows], names),
    )


def find_column(table: Table, what: str, given: str | None) -> str:
    """The column of words ("text") or tags ("label"): the one given, else the first usual name that there is."""
    name = next((name for name in USUAL[what] if name in table.columns), None) if given is None else given
    if name is None or name not in table.columns:
        missing = f"no column {given}" if given else f"no column of {'words' if what == 'text' else 'tags'}"
        raise InputError(
            f"{table.where}: {missing} (looked for {', '.join(USUAL[what])}). Its columns: {', '.join(table.columns)}. "
            f"Name one with data.{what}."
        )
    return name


def encode_tagged(
    records: Records, tokenizer: Any, max_length: int, what: str, folder: Path | None = None
) -> tuple[Tokens, tuple[Skipped, ...]]:
    """The tokens of the texts and their labels, and what is to be said of them.

    Words are joined by a space, as a text has them when the model is used, and found again by their characters.

    Raises:
        InputError: the tokenizer does not say which characters a token has.
    """
    if not tokenizer.is_fast:
        raise InputError(
            "model.name: the tokenizer does not say where its tokens stand in a text, so tags cannot be brought to "
            "them. Take a model with a fast tokenizer (tokenizer.json)."
        )
    place = {name: index for index, name in enumerate(records.label_names)}
    ids = RaggedWriter(type_of("input_ids", tokenizer), folder and folder / "input_ids")
    labels = RaggedWriter(np.int32, folder and folder / "labels")
    cut: list[str] = []
    for block in cut_blocks(records.inputs):
        rows = [json.loads(str(text)) for text in block]
        texts = [" ".join(words) for words, _ in rows]
        found = tokenizer(
            texts, padding=False, truncation=True, max_length=max_length, return_offsets_mapping=True, verbose=False
        )
        ids.extend(found["input_ids"])
        made = [
            _label_tokens(words, [place[tag] for tag in tags], spans)
            for (words, tags), spans in zip(rows, found["offset_mapping"], strict=True)
        ]
        labels.extend(made)
        cut += [
            repr(text[:20])
            for text, (words, _), each in zip(texts, rows, made, strict=True)
            if sum(label != IGNORE for label in each) < len(words)
        ]
    columns: dict[str, Ragged | int] = {"input_ids": ids.finish()}
    also = {"attention_mask": 1, "token_type_ids": 0}
    columns |= {name: also[name] for name in tokenizer.model_input_names if name in also}
    notes = note_skipped(
        f"model.max_length={max_length}",
        f"{what} have words without a token of their own, most because they are cut; these tags are not learned",
        cut,
        len(records),
    )
    return Tokens(columns, {"input_ids": tokenizer.pad_token_id or 0}, labels.finish(), since=0), notes


def _label_tokens(words: Sequence[str], tags: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[int]:
    """The tag of each word at the first token that has a character of it, by the tokens' spans of characters."""
    labels, start, token = [IGNORE] * len(spans), 0, 0
    for word, tag in zip(words, tags, strict=True):
        end = start + len(word)
        while token < len(spans) and spans[token][1] <= start:
            token += 1
        # A token has one tag, so the second word in it goes without, which is counted and said.
        if token < len(spans) and spans[token][0] < end:
            labels[token] = tag
            token += 1
        start = end + 1
    return labels
