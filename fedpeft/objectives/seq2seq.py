"""Sequence to sequence: an encoder reads what is asked, a decoder learns to write the answer (T5, BART, Pegasus, ...).

A record asks once and is answered once. What is asked is tokenized as the encoder reads it, the answer as the
tokenizer writes targets, its end token with it. The decoder predicts each token of the answer from those before it,
the first from the model's own `decoder_start_token_id`; a record's loss is the mean over its own answer's tokens.

A record is one row of the data, its answer and after it what is asked: the column PART says of each token which it is
of, and `split` makes of a batch what the two halves of the model get. Labels then stand where the answer does.

    >>> import torch
    >>> row = {"input_ids": torch.tensor([[8, 9, 5, 6, 7, 0]]), PART: torch.tensor([[1, 1, 2, 2, 2, 0]])}
    >>> halves = split_inputs({**row, "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}, start=3, filler=0)
    >>> halves["input_ids"].tolist(), halves["decoder_input_ids"].tolist()
    ([[5, 6, 7]], [[3, 8]])
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft.data import skipped, templates
from fedpeft.data.conversations import Turn, parse_turns
from fedpeft.data.encode import CUT, Encoded, cut_blocks, shorten_row, type_of
from fedpeft.data.encode_conversations import PART
from fedpeft.data.ragged import Ragged, RaggedWriter
from fedpeft.data.records import Records
from fedpeft.data.skipped import Skipped, note_skipped
from fedpeft.data.stored import Tokens
from fedpeft.data.templates import NotWritten
from fedpeft.errors import InputError
from fedpeft.objectives.base import IGNORE
from fedpeft.objectives.tokens import NextToken

log = logging.getLogger("fedpeft.data")
ANSWER, ASKED = 1, 2  # values of PART; 0 is padding


class Seq2Seq(NextToken):
    """The answer to what an encoder has read, token by token."""

    records = "text"
    auto_class = "AutoModelForSeq2SeqLM"
    peft_task = "SEQ_2_SEQ_LM"
    labelled = "none"
    says = "answers"
    encoder_decoder = True

    def encode(
        self, records: Records, processor: Any, max_length: int, what: str, folder: Path | None = None
    ) -> Encoded:
        """Labels are the ids of the answer, IGNORE at what is asked.

        Args:
            max_length: longest text of each half, the tokenizer's marks with it.

        Raises:
            InputError: the records are plain texts, one has several questions, or the tokenizer has no end token.
        """
        rows = _Rows(self.name, records, processor, max_length, what)
        writers = {
            name: RaggedWriter(kind, folder and folder / name)
            for name, kind in (("input_ids", type_of("input_ids", processor)), (PART, np.uint8), ("labels", np.int32))
        }
        for block in cut_blocks(records.inputs):
            for answer, asked in rows.make([parse_turns(text) for text in block]):
                writers["input_ids"].extend([answer + asked])
                writers[PART].extend([[ANSWER] * len(answer) + [ASKED] * len(asked)])
                writers["labels"].extend([answer + [IGNORE] * len(asked)])
        made = {name: writer.finish() for name, writer in writers.items()}
        columns: dict[str, Ragged | int] = {"input_ids": made["input_ids"], "attention_mask": 1, PART: made[PART]}
        notes = rows.say()
        skipped.say(notes)
        # From the first place on: a decoder predicts that token too, from the mark of the start.
        tokens = Tokens(columns, {"input_ids": rows.filler}, made["labels"], since=0)
        return Encoded.over(tokens, notes, processor.eos_token_id)

    def score(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Scores [N, A, V] of the tokens of answers, A those of the longest."""
        halves = split_inputs(inputs, find_start(model) or 0, model.config.pad_token_id or 0)
        logits: Tensor = model(**halves, use_cache=False).logits
        return logits

    def pair(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """An answer stands at the start of its row."""
        return logits, labels[:, : logits.shape[1]]

    def draw_input(self, name: str, mask: Tensor) -> Tensor:
        """The first half of the drawn tokens is the answer."""
        if name != PART:
            return super().draw_input(name, mask)
        first = torch.arange(mask.shape[1]) < (mask.sum(1, keepdim=True) + 1) // 2
        return torch.where(first, ANSWER, ASKED) * mask

    def learned_tokens(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return inputs[PART] == ANSWER


def split_inputs(inputs: Mapping[str, Tensor], start: int, filler: int) -> dict[str, Tensor]:
    """What encoder and decoder get of a batch [N, T]: ids and masks [N, S] of what is asked, and [N, A] of the answers,
    whose ids are those of one place earlier, behind the mark of the start.

    A half without a token has its first place to attend to, with a padding: a softmax of nothing would be no number.

    Args:
        start: id of the mark that an answer begins behind.
        filler: id of the padding.
    """
    ids, part = inputs["input_ids"], inputs[PART] * inputs["attention_mask"]
    answered, asked = ((part == value).sum(1, keepdim=True) for value in (ANSWER, ASKED))
    width, length = (max(1, int(sizes.max())) for sizes in (answered, asked))
    places = torch.arange(max(width, length), device=ids.device)
    there, read = places[:width] < answered.clamp(min=1), places[:length] < asked
    marks = torch.full_like(ids[:, :1], start)
    earlier = torch.cat([marks, ids[:, : width - 1]], dim=1).masked_fill(~there, filler)
    taken = (answered + places[:length]).clamp(max=ids.shape[1] - 1)
    return {
        "input_ids": ids.gather(1, taken).masked_fill(~read, filler),
        "attention_mask": (read | (places[:length] == 0)).long(),
        "decoder_input_ids": earlier,
        "decoder_attention_mask": there.long(),
    }


def find_start(model: Any) -> int | None:
    """The token that a model's answers begin behind; None where its files do not say it."""
    for settings in (model.config, model.generation_config):
        start = getattr(settings, "decoder_start_token_id", None)
        if start is not None:
            return int(start)
    return None


# Rows of tokens -------------------------------------------------------------------------------------------------------

Row = tuple[list[int], list[int]]  # ids of the answer, and of what is asked


@dataclass
class _Rows:
    """Makes rows of the conversations of some records, and keeps what is to be said of them."""

    task: str
    records: Records
    tokenizer: Any
    max_length: int
    what: str
    refused: list[str] = field(default_factory=list)
    long: int = 0
    longest: int = 0

    def __post_init__(self) -> None:
        tokenizer, wording = self.tokenizer, self.records.wording
        if wording.form == "text":
            raise InputError(
                f"model.task={self.task}: the {self.what} are plain texts, in which nothing is asked and answered."
            )
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"model.task={self.task}: the tokenizer has no end token, so a model would never learn where an answer "
                "ends. Give it one (tokenizer.eos_token), and the model its embedding."
            )
        self.template = templates.find_template(wording.template, wording.form, tokenizer, encoder=True)
        self.filler = tokenizer.pad_token_id or 0
        # What the tokenizer puts around a target: some leave out the end, some begin with a mark of their own.
        frame = tokenizer(text_target="")["input_ids"]
        self.ends = tokenizer.eos_token_id in frame
        self.kept = frame.index(tokenizer.eos_token_id) if self.ends else 0

    def make(self, conversations: Sequence[Sequence[Turn]]) -> Iterator[Row]:
        """A row of each; one token that is asked, and no answer, where one is left out."""
        asked = [self._encode_question(turns) for turns in conversations]
        taken = [place for place, text in enumerate(asked) if text is not None]
        read = self._read([asked[place] or "" for place in taken])
        said = self._encode_answers([conversations[place][-1][1] for place in taken])
        rows = dict(zip(taken, map(self._cut_pair, read, said), strict=True))
        for place in range(len(conversations)):
            yield rows.get(place, ([], [self.filler]))

    def _encode_question(self, turns: Sequence[Turn]) -> str | None:
        """What the encoder reads of a conversation; None of one that is left out.

        Raises:
            InputError: it has more than a question and its answer, or the template does not take it.
        """
        try:
            if [role for role, _ in turns if role != "system"] != ["user", "assistant"]:
                raise NotWritten(f"it has {len(turns)} turns, and one question and its answer are learned")
            return self.template.write(turns[:-1], self.tokenizer, answering=True)
        except NotWritten as error:
            begin = repr(turns[0][1][:40])
            if not self.records.wording.skip_bad:
                raise InputError(
                    f"model.task={self.task}: the conversation that begins with {begin} cannot be taken: {error}. "
                    "Change or remove it; or set data.skip_bad=true, which counts such and leaves them out; or take a "
                    "decoder with model.task=causal-lm."
                ) from error
            self.refused.append(f"{begin} ({error})")
            return None

    def _read(self, texts: list[str]) -> list[tuple[list[int], int]]:
        """Ids of what is asked, cut by the tokenizer, which keeps its own marks; and how many there were."""
        if not texts:
            return []
        whole = self.tokenizer(texts, verbose=False)["input_ids"]
        losing = self.records.wording.truncate
        long = [place for place, ids in enumerate(whole) if len(ids) > self.max_length]
        short = dict(enumerate(whole))
        if long and losing != "drop":
            with _cutting_side(self.tokenizer, "left" if losing == "start" else "right"):
                cut = self.tokenizer([texts[place] for place in long], truncation=True, max_length=self.max_length)
            short |= zip(long, cut["input_ids"], strict=True)
        return [(list(short[place]), len(ids)) for place, ids in enumerate(whole)]

    def _encode_answers(self, texts: list[str]) -> list[list[int]]:
        """Ids of answers, their end token with them."""
        if not texts:
            return []
        end = [] if self.ends else [self.tokenizer.eos_token_id]
        return [[*ids, *end] for ids in self.tokenizer(text_target=texts, verbose=False)["input_ids"]]

    def _cut_pair(self, read: tuple[list[int], int], said: list[int]) -> Row:
        asked, before = read
        losing, longest = self.records.wording.truncate, max(before, len(said))
        self.longest, self.long = max(self.longest, longest), self.long + (longest > self.max_length)
        if longest > self.max_length and losing == "drop":
            return [], [self.filler]
        return shorten_row(said, self.max_length, losing, self.kept), asked

    def say(self) -> tuple[Skipped, ...]:
        """Log what the records are; what is left out or cut."""
        wording, total = self.records.wording, len(self.records)
        log.info(
            "model.task: %s %s are questions and answers (%s), template %s, loss on the answers.",
            f"{total:,}",
            self.what,
            wording.form,
            self.template.name,
        )
        notes = note_skipped(self.task, f"{self.what} are not taken and are left out", self.refused, total)
        if self.long:
            text = f"{self.what} have more tokens in a half and {CUT[wording.truncate]}; the longest has {self.longest}"
            notes += (Skipped(f"model.max_length={self.max_length}", text, self.long, total),)
        return notes


@contextmanager
def _cutting_side(tokenizer: Any, side: str) -> Iterator[None]:
    """Let a tokenizer cut long texts at this side."""
    before, tokenizer.truncation_side = tokenizer.truncation_side, side
    try:
        yield
    finally:
        tokenizer.truncation_side = before
