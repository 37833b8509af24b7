"""Files of conversations as tokens: labels, cuts, what is left out and said, and what is refused."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch

from fedpeft import config as configs
from fedpeft.data import encode as encoding
from fedpeft.data import source, templates
from fedpeft.data.cache import Cache
from fedpeft.data.encode import encode, shorten_row
from fedpeft.errors import InputError
from fedpeft.models.embedded import byte_tokenizer
from fedpeft.objectives.base import IGNORE
from support import chat

ASKED = "What is the capital of Denmark?"
TURNS = [("user", ASKED), ("assistant", "The capital is Copenhagen.")]


def write(tmp_path, rows, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, cache=None, **data):
    config = configs.load({"model": {"task": "causal-lm"}, "data": {"source": str(path), **data}})
    return source.whole(str(path), "data.source", config.data, "causal-lm", cache=cache)


def row(turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def learned(data, index):
    """Token ids that are learned, of the tensors that a model gets."""
    _, labels = data.batch(np.array([index]))
    return [token for token in labels[0].tolist() if token != IGNORE]


@pytest.mark.parametrize("kind", list(chat.JINJA))
def test_labels_are_the_ids_where_the_assistant_speaks_and_nothing_elsewhere(tmp_path, kind, caplog):
    caplog.set_level(logging.INFO, logger="fedpeft.data")
    tokenizer, longer = chat.tokenizer(kind), [*TURNS, ("user", "How many people live there?"), ("assistant", "650")]
    tokenizer.padding_side = "left"  # as for generation: training pads on the right all the same
    tokenizer.pad_token = tokenizer.eos_token  # as many models are padded
    try:
        data = encode(read(write(tmp_path, [row(TURNS), row(longer)])), tokenizer, "causal-lm", 128, "texts")
    finally:
        tokenizer.pad_token = "<pad>"
    for index, turns in enumerate((TURNS, longer)):
        ids, chosen = chat.by_characters(tokenizer, chat.PIECES[kind](turns))
        width = data.inputs["input_ids"].shape[1]
        expected = [token if known else IGNORE for token, known in zip(ids, chosen, strict=True)]
        assert data.labels[index].tolist() == expected + [IGNORE] * (width - len(ids))
        assert data.inputs["attention_mask"][index].tolist() == [1] * len(ids) + [0] * (width - len(ids))
        assert data.inputs["input_ids"][index, : len(ids)].tolist() == ids
        assert len(learned(data, index)) == sum(chosen)
    assert "2 texts are conversations of 3.0 turns (messages), template of the tokenizer, loss on assistant turns" in (
        caplog.text
    )
    assert data.teaching().tolist() == [0, 1] and data.skipped == ()


def test_question_and_answer_are_learned_from_as_such_and_not_on_the_question_alone(tmp_path):
    data = encode(read(write(tmp_path, [{"question": "2+2?", "answer": "4"}])), byte_tokenizer(), "causal-lm", 64)
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(learned(data, 0)) == "4<eos>"
    assert tokenizer.decode(data.inputs["input_ids"][0]) == "2+2?\n4<eos>"
    everything = read(write(tmp_path, [{"question": "2+2?", "answer": "4"}]), loss_on="all")
    assert tokenizer.decode(learned(encode(everything, tokenizer, "causal-lm", 64), 0)) == "2+2?\n4<eos>"


def test_answers_in_a_prompt_are_given_and_not_learned(tmp_path):
    said = [{"role": role, "content": content} for role, content in (("user", "a?"), ("assistant", "b"))]
    rows = [{"prompt": [*said, said[0]], "completion": said[1:]}, {"messages": [*said, *said]}]
    tokenizer, learned_of = byte_tokenizer(), []
    for number, row in enumerate(rows):
        data = encode(read(write(tmp_path, [row], f"{number}.jsonl"), template="plain"), tokenizer, "causal-lm", 64)
        assert tokenizer.decode(data.inputs["input_ids"][0]) == "a?\nb<eos>a?\nb<eos>"
        learned_of.append(tokenizer.decode(learned(data, 0)))
    assert learned_of == ["b<eos>", "b<eos>b<eos>"]


def test_the_columns_of_a_conversation_are_no_natural_columns_and_others_are(tmp_path):
    records = read(write(tmp_path, [{"prompt": "a", "completion": "b", "ward": "x", "label": 3}]))
    assert list(records.columns) == ["ward"] and records.wording.form == "completion"
    named = read(write(tmp_path, [{"q": "a", "a": "b"}]), columns={"prompt": "q", "completion": "a"})
    assert list(named.inputs) == list(records.inputs) == ['[["user", "a"], ["assistant", "b"]]']


def test_bad_records_are_refused_by_row_or_left_out_with_their_columns(tmp_path):
    rows = [
        {**row(TURNS), "ward": 1},
        {"messages": [], "ward": 2},
        {**row(TURNS[:1]), "ward": 3},
        {**row(TURNS), "ward": 4},
    ]
    path = write(tmp_path, rows)
    with pytest.raises(InputError, match="record 2 is no conversation of the columns messages: it has no turn"):
        read(path)
    records = read(path, skip_bad=True)
    assert len(records) == 2 and records.columns["ward"].tolist() == [1, 4]
    (entry,) = records.skipped
    assert (entry.count, entry.total) == (2, 4) and "record 3 (it has no turn of the assistant)" in entry.examples


CUTS = {  # "abcdef\nghij<eos>" in 8 tokens: what stays, and what of it is learned
    "end": ("abcdef\ng", "g"),
    "start": ("ef\nghij<eos>", "ghij<eos>"),
    "drop": ("a", ""),
}


@pytest.mark.parametrize("how", list(CUTS))
def test_what_is_too_long_loses_what_it_is_told_to_and_is_counted(tmp_path, how, caplog):
    path = write(tmp_path, [{"prompt": "abcdef", "completion": "ghij"}, {"prompt": "ab", "completion": "c"}])
    tokenizer = byte_tokenizer()
    data = encode(read(path, truncate=how), tokenizer, "causal-lm", 8)
    kept, known = CUTS[how]
    ids, mask = data.inputs["input_ids"][0], data.inputs["attention_mask"][0].bool()
    assert tokenizer.decode(ids[mask]) == kept and tokenizer.decode(learned(data, 0)) == known
    assert tokenizer.decode(learned(data, 1)) == "c<eos>"
    assert data.skipped[0].count == 1 and "the longest has 12" in caplog.text
    assert data.teaching().tolist() == ([1] if how == "drop" else [0, 1])
    texts = read(write(tmp_path, [{"text": "abcdefghijk"}, {"text": "ab"}]), truncate=how)
    plain = encode(texts, tokenizer, "causal-lm", 8)
    mask = plain.inputs["attention_mask"][0].bool()
    assert (
        tokenizer.decode(plain.inputs["input_ids"][0][mask])
        == {"end": "abcdefgh", "start": "efghijk<eos>", "drop": "a"}[how]
    )
    assert plain.teaching().tolist() == ([1] if how == "drop" else [0, 1])


def test_a_cut_start_keeps_the_mark_of_the_beginning():
    assert shorten_row([9, 1, 2, 3, 4], 3, "start", 1) == [9, 3, 4] and shorten_row([1, 2], 3, "start", 1) == [1, 2]
    assert shorten_row([9, 1, 2, 3, 4], 1, "start", 1) == [9]


def test_a_record_without_an_answer_left_is_left_out_and_counted(tmp_path, caplog):
    rows = [
        {"prompt": "abcdefgh", "completion": "i"},
        {"prompt": "abcdefg", "completion": "h"},
        {"prompt": "a", "completion": "b"},
    ]
    data = encode(read(write(tmp_path, rows)), byte_tokenizer(), "causal-lm", 9)
    assert data.teaching().tolist() == [1, 2] and learned(data, 0) == [] and len(learned(data, 1)) == 1
    assert "1 of 3 texts have no token of an answer left, as data.truncate=end cuts them" in caplog.text
    assert "'abcdefgh'" in caplog.text
    assert [entry.count for entry in data.skipped] == [2, 1]


def test_a_template_that_does_not_take_a_conversation_names_it_or_leaves_it_out(tmp_path, caplog):
    rows = [row([("system", "Be brief."), *TURNS]), row(TURNS)]
    path, tokenizer = write(tmp_path, rows), chat.tokenizer("gemma")
    with pytest.raises(InputError, match=r"begins with 'Be brief\.' cannot be written.*System role not supported"):
        encode(read(path), tokenizer, "causal-lm", 64)
    data = encode(read(path, skip_bad=True), tokenizer, "causal-lm", 64)
    assert data.teaching().tolist() == [1] and "1 of 2 texts are not taken by the template" in caplog.text


def test_an_answer_without_an_end_is_said(tmp_path, caplog):
    endless = byte_tokenizer()
    endless.eos_token = None
    encode(read(write(tmp_path, [{"prompt": "a", "completion": "b"}])), endless, "causal-lm", 8)
    assert "the model does not learn where an answer ends" in caplog.text


@pytest.mark.parametrize("block", [1, 9])
def test_the_end_that_is_looked_at_is_that_of_the_first_conversation_that_is_taken(
    tmp_path, caplog, monkeypatch, block
):
    monkeypatch.setattr(encoding, "TOKENIZED", block)
    path = write(tmp_path, [row([("system", "Be brief."), *TURNS]), row(TURNS), row(TURNS)])
    tokenizer = chat.tokenizer("gemma")
    genuine, asked = templates.marks_of, []
    for first, then in ((set(), genuine(tokenizer)), (genuine(tokenizer), set())):
        asked.clear(), caplog.clear()
        answers = iter([first, then, then])
        monkeypatch.setattr(templates, "marks_of", lambda _, answers=answers: asked.append(1) or next(answers))
        encode(read(path, skip_bad=True), tokenizer, "causal-lm", 64)
        assert ("does not learn where an answer ends" in caplog.text) == (not first) and len(asked) == 1


def test_a_cache_keeps_form_and_labels_and_knows_another_template(tmp_path):
    path, cache, tokenizer = write(tmp_path, [row(TURNS)] * 3), Cache(tmp_path / "cache", 0), byte_tokenizer()
    fresh = encode(read(path), tokenizer, "causal-lm", 128)
    for _ in range(2):  # made, then read
        records = read(path, cache)
        assert records.wording.form == "messages" and records.fingerprint == read(path).fingerprint
        kept = encode(records, tokenizer, "causal-lm", 128, cache=cache)
        assert torch.equal(kept.labels, fresh.labels) and torch.equal(
            kept.inputs["input_ids"], fresh.inputs["input_ids"]
        )
        assert kept.teaching().tolist() == [0, 1, 2]
    template = tmp_path / "own.jinja"
    for words in ("Q: ", "Question: "):
        template.write_text("{% for m in messages %}{{ '" + words + "' + m.content }}{% endfor %}")
        other = encode(read(path, cache, template=str(template)), tokenizer, "causal-lm", 128, cache=cache)
        assert tokenizer.decode(other.inputs["input_ids"][0]).startswith(words)
    whole = encode(read(path, cache, loss_on="all"), tokenizer, "causal-lm", 128, cache=cache)
    assert len(learned(whole, 0)) > len(learned(kept, 0))


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        ("sequence-classification", {"template": "plain"}, "data.template=plain: of language models' texts"),
        ("sequence-classification", {"columns": {"prompt": "a"}}, "data.columns="),
        ("image-classification", {"loss_on": "all"}, "data.loss_on=all"),
        (
            "causal-lm",
            {"columns": {"messages": "chat"}, "text": "body"},
            "data.text=body and data.columns={messages: chat}",
        ),
        ("causal-lm", {"template": "zephyr"}, "data.template: 'zephyr' is not known"),
        ("causal-lm", {"truncate": "middle"}, "data.truncate"),
    ],
)
def test_keys_that_mean_nothing_or_two_things_are_refused(model, data, words):
    name = {"sequence-classification": "tiny-bert", "image-classification": "tiny-vit"}.get(model, "tiny-llama")
    with pytest.raises(InputError) as error:
        configs.load({"model": {"name": name, "task": model}, "data": data})
    assert words in str(error.value)


def test_test_records_of_another_kind_are_refused(tmp_path):
    path, test = write(tmp_path, [row(TURNS)] * 4), write(tmp_path, [{"text": "abc"}], "test.jsonl")
    config = configs.load({"model": {"task": "causal-lm"}, "data": {"source": str(path), "test": str(test)}})
    with pytest.raises(InputError, match="the training set has conversations, the test set has plain texts"):
        source.load(config.data, "causal-lm", 0)
