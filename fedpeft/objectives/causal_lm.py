"""Language modelling: each token of a text is predicted from those before; a text's loss is the mean of its tokens'."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft.data import skipped
from fedpeft.data.encode import Encoded, encode_texts
from fedpeft.data.encode_conversations import encode_conversations
from fedpeft.data.ragged import Ragged
from fedpeft.data.records import Records
from fedpeft.data.skipped import Skipped, note_skipped
from fedpeft.data.stored import Tokens
from fedpeft.objectives.tokens import NextToken

log = logging.getLogger("fedpeft.data")


class CausalLM(NextToken):
    """The next token of each text, at every place."""

    records = "text"
    auto_class = "AutoModelForCausalLM"
    peft_task = "CAUSAL_LM"
    labelled = "none"
    causal = True
    says = "answers"

    def encode(
        self, records: Records, processor: Any, max_length: int, what: str, folder: Path | None = None
    ) -> Encoded:
        """Labels are the input ids, IGNORE at the padding and where nothing of a conversation is learned.

        The tokenizer's end token follows every plain text that has room for it, so that a model learns to stop.
        """
        if records.wording.form != "text":
            written, notes = encode_conversations(records, processor, max_length, what, folder)
            skipped.say(notes)
            return Encoded.over(written, notes, processor.eos_token_id)
        end, total = processor.eos_token_id, len(records)
        columns, fillers, cut = encode_texts(
            records, processor, max_length, what, end=end, losing=records.wording.truncate, folder=folder
        )
        ids = columns["input_ids"]
        assert isinstance(ids, Ragged)
        tokens = Tokens(columns, fillers, ids)
        silent = [repr(records.inputs[index][:20]) for index in np.flatnonzero(~tokens.teaches).tolist()]
        left_out = note_skipped(
            self.name,
            f"{what} have nothing to predict, as they have fewer than two tokens, and are left out",
            silent,
            total,
        )
        endless: tuple[Skipped, ...] = ()
        if end is None:
            endless = (
                Skipped(
                    self.name,
                    f"{what} have no end token, as the tokenizer has none: the model does not learn where a text ends",
                    total,
                    total,
                ),
            )
        else:
            log.info(
                "%s: the end token %s follows %d of %d %s.",
                self.name,
                processor.eos_token,
                total - sum(entry.count for entry in cut),
                total,
                what,
            )
        skipped.say(cut + left_out + endless)
        return Encoded.over(tokens, cut + left_out + endless, end)

    def pair(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The scores at each token are for its successor: [N, T - 1, K] and [N, T - 1]."""
        return logits[:, :-1], self.targets(labels)

    def targets(self, labels: Tensor) -> Tensor:
        return labels[:, 1:]

    def answer(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Of token scores [N, T, V], those after each text's last real token [N, V], wherever its padding is."""
        mask = batch.get("attention_mask")
        if mask is None:
            return logits[:, -1]
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        return logits[torch.arange(len(logits), device=logits.device), last]

    def stream(self, data: Encoded) -> Encoded:
        """Texts [N, T] without their last token, and that token as label [N]; texts of one token are left out.

        The end token, which says nothing of a text, is taken off before.
        """
        inputs = data.inputs
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        rows = torch.arange(len(mask))
        length = mask.sum(1)
        # Without an end token nothing is taken off: no id is -1.
        length = length - (ids[rows, length - 1] == (-1 if data.end is None else data.end)).long()
        shorter = mask * (torch.arange(mask.shape[1]) < (length - 1)[:, None])
        # Out of the ids as well as of the mask: the answer must stand in no input.
        inputs |= {"attention_mask": shorter, "input_ids": ids * shorter}
        kept = length > 1
        return Encoded({name: value[kept] for name, value in inputs.items()}, ids[rows, length - 1][kept])
