"""Words are put where they were hidden, whatever they are."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fedpeft.data.records import Records
from fedpeft.errors import InputError
from fedpeft.run.fill import fill_in

WORDS = ["<mask>", "a", "b", "cat", "."]


class Spaced:
    """A tokenizer of words between spaces."""

    mask_token, mask_token_id, model_input_names = "<mask>", 0, ("input_ids",)

    def __call__(self, text, **_):
        return {"input_ids": torch.tensor([[WORDS.index(word) for word in text.split()]])}

    def decode(self, ids):
        return WORDS[ids[0]]


def model(says, longest=9):
    """A model that says these words, one after another, at the places of a text."""
    scores = nn.functional.one_hot(torch.tensor([WORDS.index(word) for word in says]), len(WORDS)).float()
    forward = lambda inputs: scores[None, : inputs["input_ids"].shape[1]]  # noqa: E731
    base = SimpleNamespace(processor=Spaced(), backbone=nn.Linear(1, 1), forward=forward)
    return SimpleNamespace(base=base, config=SimpleNamespace(model=SimpleNamespace(max_length=longest)))


def records(text):
    return Records([text], np.zeros(1, dtype=np.int64), ["all"], {}, "text")


@pytest.mark.parametrize(
    ("text", "words", "filled"),
    [
        ("a <mask> b <mask>", ["cat", "."], "a cat b ."),
        ("a <mask> b <mask>", ["<mask>", "cat"], "a <mask> b cat"),  # the likeliest word is the mask itself
        ("a b", [], "a b"),
    ],
)
def test_each_word_stands_where_it_was_hidden(text, words, filled):
    each = iter(words)
    says = [next(each) if word == "<mask>" else "b" for word in text.split()]
    assert fill_in(model(says), records(text)) == [{"text": filled, "words": words}]


def test_a_text_that_is_too_long_is_refused_with_its_number():
    with pytest.raises(InputError, match="record 1: has 3 tokens"):
        fill_in(model(["a"] * 3, longest=2), records("a b ."))
