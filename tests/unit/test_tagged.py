"""Tags of words: what is read, what is refused, and at which token each lands."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fedpeft.config import DataConfig
from fedpeft.data import tagged
from fedpeft.data.encode import encode
from fedpeft.data.letters import MONTHS, TAGS, Letters
from fedpeft.data.tables import Table
from fedpeft.errors import InputError
from fedpeft.models.embedded import byte_tokenizer
from fedpeft.objectives.base import IGNORE


def table(*rows, **names):
    return Table({"tokens": [row[0] for row in rows], "ner_tags": [row[1] for row in rows]}, "a.jsonl", names=names)


def test_a_tag_is_at_the_first_token_of_its_word():
    records = tagged.read(table((["né", "b", "cde"], ["X", "O", "X"]), (["z"], ["O"])), DataConfig())
    assert records.label_names == ["O", "X"] and records.targets.tolist() == [[True, True], [True, False]]
    data = encode(records, byte_tokenizer(), "token-classification", 16)
    # Tokens are bytes: n, two of é, a space, b, a space, c, d, e.
    assert data.labels.tolist() == [[1, IGNORE, IGNORE, IGNORE, 0, IGNORE, 1, IGNORE, IGNORE], [0] + 8 * [IGNORE]]
    assert data.teaching().tolist() == [0, 1]  # the label of a first token counts
    short = encode(records, byte_tokenizer(), "token-classification", 4)
    assert short.labels[0].tolist() == [1, IGNORE, IGNORE, IGNORE] and short.skipped[0].count == 1


def test_numbers_are_those_of_known_names():
    records = tagged.read(table((["a", "b"], [1, 0]), ner_tags=["O", "PER"]), DataConfig())
    assert '["PER", "O"]' in records.inputs[0] and records.label_names == ["O", "PER"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ((["a", "b"], ["O"]), "record 2 has 2 words in column tokens and 1 tags in column ner_tags"),
        (([], []), "record 2 has 0 words"),
        (("a b", ["O", "O"]), "both must be lists"),
        ((["a", ""], ["O", "O"]), "record 2 has '' among its words"),
        ((["a"], [None]), "record 2 has None among its labels"),
        ((["a", "b \ud800"], ["O", "O"]), r"column tokens: record 2 has half of a character \(\\ud800\)"),
        ((["a"], ["\udfff"]), r"column ner_tags: record 2 has half of a character \(\\udfff\)"),
    ],
)
def test_what_does_not_fit_is_refused_by_record(row, said):
    with pytest.raises(InputError, match=said):
        tagged.read(table((["a"], ["O"]), row), DataConfig())


def test_columns_are_named_or_found():
    named = Table({"w": [["a"]], "t": [["O"]]}, "a.jsonl")
    assert len(tagged.read(named, DataConfig(text="w", label="t"))) == 1
    with pytest.raises(InputError, match=r"no column of words .*Name one with data\.text"):
        tagged.read(named, DataConfig())
    assert np.array_equal(tagged.read(named, DataConfig(text="w", label="t")).labels, [0])


def test_the_letters_tag_every_word_by_what_it_is():
    train, test = Letters().load()
    assert (len(train), len(test), train.label_names) == (360, 120, TAGS)
    known = {word for text in train.inputs for word, tag in zip(*json.loads(text), strict=True) if tag == "PER"}
    new = total = 0
    for records in (train, test):
        for text, has in zip(records.inputs, records.targets, strict=True):
            words, tags = json.loads(text)
            assert len(words) == len(tags) and {TAGS[place] for place in np.flatnonzero(has)} == set(tags)
            for word, tag in zip(words, tags, strict=True):
                assert (word in MONTHS or word.isdigit()) == (tag == "DATE")
                assert word.endswith(("ton", "burg")) == (tag == "LOC")
                new, total = new + (tag == "PER" and word not in known), total + (tag == "PER" and records is test)
    assert new > total / 2, "most names of the test set are not to be known by heart"
    assert [part.columns["ward"][0][:5] for part in (train, test)] == ["ward-"] * 2
