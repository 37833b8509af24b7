"""Words that a masked language model puts in the place of hidden ones."""

from __future__ import annotations

import re
from typing import Any

import torch

from fedpeft import progress
from fedpeft.data.records import Records
from fedpeft.errors import InputError
from fedpeft.run.trained import Trained


@torch.no_grad()
def fill_in(trained: Trained, records: Records) -> list[dict[str, Any]]:
    """Of each text the likeliest word at every mask token, and the text with them in it.

    Raises:
        InputError: a text has more tokens than the model was trained on.
    """
    base, longest = trained.base, trained.config.model.max_length
    tokenizer, device = base.processor, next(base.backbone.parameters()).device
    rows = []
    for number, text in enumerate(map(str, records.inputs), 1):
        # Not verbose: too long a text gets our own error below, and not transformers' warning before it.
        tokens = tokenizer(text, return_tensors="pt", verbose=False)
        inputs = {name: tokens[name].to(device) for name in tokenizer.model_input_names if name in tokens}
        if inputs["input_ids"].shape[1] > longest:
            raise InputError(
                f"record {number}: has {inputs['input_ids'].shape[1]} tokens; model.max_length={longest} is the most. "
                "Shorten it, or give model.max_length=N if the model takes more."
            )
        hidden = inputs["input_ids"][0] == tokenizer.mask_token_id
        likeliest = base.forward(inputs)[0, hidden].argmax(-1).tolist() if hidden.any() else []
        words = [str(tokenizer.decode([token])).strip() for token in likeliest]
        rows.append({"text": _put_in(text, tokenizer.mask_token, words), "words": words})
        progress.step("records", number, len(records))
    return rows


def _put_in(text: str, mask: str, words: list[str]) -> str:
    """In one pass over the text: a word may be the mask itself."""
    each = iter(words)
    return re.sub(re.escape(mask), lambda found: next(each, found[0]), text)
