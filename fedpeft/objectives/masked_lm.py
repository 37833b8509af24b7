"""Masked language modelling: hidden tokens of a text are told from all others, so an encoder learns a domain's words.

Which tokens are hidden is drawn anew for each client and round (`fedpeft.data.masked`), and is the same in every
evaluation, so that rounds and runs compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedpeft.data import skipped
from fedpeft.data.encode import Encoded, encode_texts
from fedpeft.data.masked import MaskedTokens, Vocabulary
from fedpeft.data.ragged import Ragged
from fedpeft.data.records import Records
from fedpeft.data.skipped import note_skipped
from fedpeft.data.stored import Tokens
from fedpeft.errors import InputError
from fedpeft.objectives.measures import Measure
from fedpeft.objectives.tokens import TokenObjective


class MaskedLM(TokenObjective):
    """Tokens of a text that were hidden, 15 of 100, drawn anew every round."""

    records = "text"
    auto_class = "AutoModelForMaskedLM"
    labelled = "none"
    says = "hidden words"
    redrawn = True
    measures: ClassVar[Mapping[str, Measure]] = {"perplexity": Measure("perplexity", higher=False, share=False)}

    def encode(
        self, records: Records, processor: Any, max_length: int, what: str, folder: Path | None = None
    ) -> Encoded:
        """Labels are the ids of the hidden tokens, IGNORE at all others.

        Raises:
            InputError: the tokenizer has no mask token.
        """
        if processor.mask_token_id is None:
            raise InputError(
                f"model.task={self.name}: the tokenizer has no mask token, so nothing can be hidden. Take an encoder "
                "that was trained so (BERT, RoBERTa, ...)."
            )
        columns, fillers, cut = encode_texts(records, processor, max_length, what, folder=folder)
        ids = columns["input_ids"]
        assert isinstance(ids, Ragged)
        tokens = self.arrange(Tokens(columns, fillers, ids), processor)
        silent = [repr(records.inputs[index][:20]) for index in np.flatnonzero(~tokens.teaches).tolist()]
        left_out = note_skipped(
            self.name, f"{what} have no token that can be hidden, and are left out", silent, len(records)
        )
        skipped.say(cut + left_out)
        return Encoded.over(tokens, cut + left_out)

    def arrange(self, tokens: Tokens, processor: Any) -> Tokens:
        return MaskedTokens(tokens, Vocabulary.of(processor))

    def describe_answer(self, answer: int, label_names: Sequence[str], processor: Any) -> str:
        return str(processor.decode([answer]))
