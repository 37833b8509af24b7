"""Conversations as token ids and labels, which are IGNORE where nothing is learned."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.data import templates
from fedpeft.data.conversations import parse
from fedpeft.data.encode import CUT, blocks, shortened, type_of
from fedpeft.data.ragged import Ragged, RaggedWriter
from fedpeft.data.records import Records
from fedpeft.data.skipped import Skipped, some
from fedpeft.data.stored import Tokens
from fedpeft.data.templates import NotWritten, Template
from fedpeft.errors import InputError
from fedpeft.objectives.base import IGNORE

log = logging.getLogger("fedpeft.data")


@dataclass
class _Seen:
    """What is to be said of all conversations."""

    refused: list[str] = field(default_factory=list)  # by the template
    silent: list[str] = field(default_factory=list)  # nothing is left to be learned
    long: int = 0
    longest: int = 0
    turns: int = 0
    ends: bool | None = None  # the first one's answers end in a mark of the tokenizer; None before there is one


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
    wording, seen = records.wording, _Seen()
    template = templates.template_of(records, tokenizer)
    ids = RaggedWriter(type_of("input_ids", tokenizer), folder and folder / "input_ids")
    labels = RaggedWriter(np.int32, folder and folder / "labels")
    for block in blocks(records.inputs):
        rows = _rows(block, template, tokenizer, max_length, records, seen)
        ids.extend([row for row, _ in rows])
        labels.extend([[token if chosen else IGNORE for token, chosen in zip(*row, strict=True)] for row in rows])
    columns: dict[str, Ragged | int] = {"input_ids": ids.finish()}
    also = {"attention_mask": 1, "token_type_ids": 0}
    columns |= {name: also[name] for name in tokenizer.model_input_names if name in also}
    fillers = {"input_ids": tokenizer.pad_token_id or 0}
    log.info(
        "model.task: %s %s are conversations of %.1f turns (%s), template %s, loss on %s.",
        f"{len(records):,}",
        what,
        seen.turns / max(1, len(records)),
        wording.form,
        template.name,
        {"response": "assistant turns", "all": "all turns"}[wording.loss_on],
    )
    return Tokens(columns, fillers, labels.finish()), _said(seen, records, what, max_length)


def _rows(
    block: Sequence[str], template: Template, tokenizer: Any, max_length: int, records: Records, seen: _Seen
) -> list[tuple[list[int], list[bool]]]:
    """Token ids of conversations, and whether each is learned; of one that is left out a single token, not learned."""
    wording = records.wording
    conversations = [parse(text) for text in block]
    rows = []
    for turns, written in zip(
        conversations, templates.write(conversations, template, tokenizer, wording.loss_on), strict=True
    ):
        begin = repr(turns[0][1][:40])
        seen.turns += sum(role != "system" for role, _ in turns)
        if isinstance(written, NotWritten):
            if not wording.skip_bad:
                raise InputError(
                    f"data.template: the conversation that begins with {begin} cannot be written: {written}. Change "
                    "or remove it, take another template, or set data.skip_bad=true, which counts such and leaves "
                    "them out."
                )
            seen.refused.append(f"{begin} ({written})")
            rows.append(([tokenizer.pad_token_id or 0], [False]))
            continue
        if seen.ends is None:
            seen.ends = _has_mark(written, tokenizer)
        seen.longest = max(seen.longest, len(written.ids))
        seen.long += len(written.ids) > max_length
        kept = int(written.ids[:1] == [tokenizer.bos_token_id])
        ids, learned = (shortened(row, max_length, wording.truncate, kept) for row in (written.ids, written.learned))
        if not any(learned[1:]):  # the first token is never predicted
            seen.silent.append(begin)
            ids, learned = [*written.ids, tokenizer.pad_token_id or 0][:1], [False]
        rows.append((ids, learned))
    return rows


def _has_mark(written: templates.Written, tokenizer: Any) -> bool:
    """Whether what is learned has a token that can end an answer."""
    marks = templates.marks_of(tokenizer)
    return any(chosen and token in marks for token, chosen in zip(written.ids, written.learned, strict=True))


def _said(seen: _Seen, records: Records, what: str, max_length: int) -> tuple[Skipped, ...]:
    total, wording = len(records), records.wording
    entries: tuple[Skipped, ...] = ()
    if seen.long:
        text = f"{what} have more tokens and {CUT[wording.truncate]}; the longest has {seen.longest}"
        entries += (Skipped(f"model.max_length={max_length}", text, seen.long, total),)
    entries += some("data.template", f"{what} are not taken by the template and are left out", seen.refused, total)
    left = "have no token of an answer" if wording.loss_on == "response" else "have fewer than two tokens"
    why = f", as data.truncate={wording.truncate} cuts them" if seen.long else ""
    entries += some("data.loss_on", f"{what} {left} left{why}, and are left out", seen.silent, total)
    if seen.ends is False:
        text = f"{what} have no end mark in what is learned: the model does not learn where an answer ends"
        entries += (Skipped("data.template", text, total, total),)
    return entries
