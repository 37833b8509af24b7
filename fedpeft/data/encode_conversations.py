"""Conversations as token ids and labels, which are IGNORE where nothing is learned."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.data import templates
from fedpeft.data.conversations import Turn, count_given, count_shared, parse_pair, parse_turns
from fedpeft.data.encode import CUT, cut_blocks, shorten_row, type_of
from fedpeft.data.ragged import Ragged, RaggedWriter
from fedpeft.data.records import Records
from fedpeft.data.skipped import Skipped, note_skipped
from fedpeft.data.stored import Tokens
from fedpeft.data.templates import NotWritten, Written
from fedpeft.errors import InputError
from fedpeft.objectives.base import IGNORE

log = logging.getLogger("fedpeft.data")
PART = "part"  # column of pairs


@dataclass
class _Seen:
    """What is to be said of all conversations."""

    refused: list[str] = field(default_factory=list)  # by the template
    silent: list[str] = field(default_factory=list)  # nothing is left to be learned
    long: set[int] = field(default_factory=set)  # numbers of records
    longest: int = 0
    turns: int = 0
    ends: bool | None = None  # the first one's answers end in a mark of the tokenizer; None before there is one


Row = tuple[list[int], list[bool]]  # token ids of a conversation, and whether each is learned


class _Encoder:
    """Makes rows of the conversations of some records, and keeps what is to be said of them."""

    def __init__(self, records: Records, tokenizer: Any, max_length: int, what: str) -> None:
        self.records, self.tokenizer, self.max_length, self.what = records, tokenizer, max_length, what
        self.template = templates.template_of(records, tokenizer)
        self.seen = _Seen()
        self.filler = tokenizer.pad_token_id or 0

    def write(self, conversations: Sequence[Sequence[Turn]], since: Sequence[int] | None = None) -> list[Any]:
        """As `templates.write`."""
        self.seen.turns += sum(role != "system" for turns in conversations for role, _ in turns)
        return templates.write(conversations, self.template, self.tokenizer, self.records.wording.loss_on, since)

    def cut(self, written: Written | NotWritten, begin: str, number: int) -> Row:
        """A conversation of a record cut to length; one token, not learned, where it is left out, which is noted.

        Args:
            begin: how it begins, for messages.

        Raises:
            InputError: the template does not take it.
        """
        wording, seen = self.records.wording, self.seen
        if isinstance(written, NotWritten):
            if not wording.skip_bad:
                raise InputError(
                    f"data.template: the conversation that begins with {begin} cannot be written: {written}. Change "
                    "or remove it, take another template, or set data.skip_bad=true, which counts such and leaves "
                    "them out."
                )
            seen.refused.append(f"{begin} ({written})")
            return [self.filler], [False]
        if seen.ends is None:
            seen.ends = _has_mark(written, self.tokenizer)
        seen.longest = max(seen.longest, len(written.ids))
        if len(written.ids) > self.max_length:
            seen.long.add(number)
        kept = int(written.ids[:1] == [self.tokenizer.bos_token_id])
        ids, learned = (
            shorten_row(row, self.max_length, wording.truncate, kept) for row in (written.ids, written.learned)
        )
        if not any(learned[1:]):  # the first token is never predicted
            seen.silent.append(begin)
            # A template may write nothing, and a row has at least one token.
            return [*written.ids, self.filler][:1], [False]
        return ids, learned

    def columns(self, ids: Ragged) -> tuple[dict[str, Ragged | int], dict[str, int]]:
        """Columns and fillers, as `Tokens` has them."""
        also = {"attention_mask": 1, "token_type_ids": 0}
        constant = {name: also[name] for name in self.tokenizer.model_input_names if name in also}
        return {"input_ids": ids, **constant}, {"input_ids": self.filler}

    def say(self, what: str, conversations: int, learned: str) -> tuple[Skipped, ...]:
        """Log what the records are; what is left out or cut."""
        log.info(
            "model.task: %s %s are %s of %.1f turns (%s), template %s, loss on %s.",
            f"{len(self.records):,}",
            self.what,
            what,
            self.seen.turns / max(1, conversations),
            self.records.wording.form,
            self.template.name,
            learned,
        )
        return _note_seen(self.seen, self.records, self.what, self.max_length)


def encode_conversations(
    records: Records, tokenizer: Any, max_length: int, what: str, folder: Path | None = None
) -> tuple[Tokens, tuple[Skipped, ...]]:
    """The tokens of conversations, and what is to be said of them.

    Args:
        max_length: longest conversation in tokens; `records.wording` says what a longer one loses.
        what: the conversations, for what is said of them.
        folder: where the columns are written; None keeps them in memory.

    Raises:
        InputError: the template does not take a conversation; names it.
    """
    encoder = _Encoder(records, tokenizer, max_length, what)
    ids = RaggedWriter(type_of("input_ids", tokenizer), folder and folder / "input_ids")
    labels = RaggedWriter(np.int32, folder and folder / "labels")
    number = 0
    for block in cut_blocks(records.inputs):
        rows = []
        conversations = [parse_turns(text) for text in block]
        since = [count_given(text) for text in block]
        for turns, written in zip(conversations, encoder.write(conversations, since), strict=True):
            rows.append(encoder.cut(written, repr(turns[0][1][:40]), number))
            number += 1
        ids.extend([row for row, _ in rows])
        labels.extend([[token if chosen else IGNORE for token, chosen in zip(*row, strict=True)] for row in rows])
    learned = {"response": "assistant turns", "all": "all turns"}[records.wording.loss_on]
    notes = encoder.say("conversations", len(records), learned)
    return Tokens(*encoder.columns(ids.finish()), labels.finish()), notes


def encode_pairs(
    records: Records, tokenizer: Any, max_length: int, what: str, folder: Path | None = None
) -> tuple[dict[str, Ragged | int], dict[str, int], np.ndarray, tuple[Skipped, ...]]:
    """Columns and fillers of pairs of conversations, whether each pair has two answers to be compared, and what is to
    be said of them.

    A row has the tokens of the chosen conversation, and after them those of the rejected one. The column PART says of
    each token which it is of, and whether it is part of the answer: 1 and 2 of the chosen, 3 and 4 of the rejected.

    Args:
        max_length: longest conversation in tokens, of which a row has two; otherwise as of `encode_conversations`.
    """
    encoder = _Encoder(records, tokenizer, max_length, what)
    ids = RaggedWriter(type_of("input_ids", tokenizer), folder and folder / "input_ids")
    parts = RaggedWriter(np.uint8, folder and folder / PART)
    teaches: list[bool] = []
    for block in cut_blocks(records.inputs):
        pairs = [parse_pair(text) for text in block]
        since = [count_shared(*pair) for pair in pairs for _ in pair]
        written = encoder.write([turns for pair in pairs for turns in pair], since)
        for place, ((asked, *_), _) in enumerate(pairs):
            both: list[Row] = []
            for side in written[2 * place : 2 * place + 2]:
                both.append(encoder.cut(side, repr(asked[1][:40]), len(teaches)))
                if not any(both[-1][1]):  # without an answer there is nothing to compare
                    both = both[-1:]
                    break
            teaches.append(len(both) == 2)
            ids.extend([[token for row, _ in both for token in row]])
            parts.extend([[first + mark for first, (_, marks) in zip((1, 3), both, strict=False) for mark in marks]])
    notes = encoder.say("pairs of conversations", 2 * len(records), "the answers in which they differ")
    columns, fillers = encoder.columns(ids.finish())
    return {**columns, PART: parts.finish()}, fillers, np.array(teaches, dtype=bool), notes


def _has_mark(written: templates.Written, tokenizer: Any) -> bool:
    """Whether what is learned has a token that can end an answer."""
    marks = templates.marks_of(tokenizer)
    return any(chosen and token in marks for token, chosen in zip(written.ids, written.learned, strict=True))


def _note_seen(seen: _Seen, records: Records, what: str, max_length: int) -> tuple[Skipped, ...]:
    total, wording = len(records), records.wording
    entries: tuple[Skipped, ...] = ()
    if seen.long:
        text = f"{what} have more tokens and {CUT[wording.truncate]}; the longest has {seen.longest}"
        entries += (Skipped(f"model.max_length={max_length}", text, len(seen.long), total),)
    entries += note_skipped(
        "data.template", f"{what} are not taken by the template and are left out", seen.refused, total
    )
    left = "have no token of an answer" if wording.loss_on == "response" else "have fewer than two tokens"
    why = f", as data.truncate={wording.truncate} cuts them" if seen.long else ""
    entries += note_skipped("data.loss_on", f"{what} {left} left{why}, and are left out", seen.silent, total)
    if seen.ends is False:
        text = f"{what} have no end mark in what is learned: the model does not learn where an answer ends"
        entries += (Skipped("data.template", text, total, total),)
    return entries
