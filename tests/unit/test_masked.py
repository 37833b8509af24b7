"""Hidden tokens: drawn by BERT's rule, of each text by itself, the same in every evaluation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from fedpeft import config as configs
from fedpeft.data import source
from fedpeft.data.cache import Cache
from fedpeft.data.encode import encode
from fedpeft.data.ragged import Texts
from fedpeft.data.records import Records
from fedpeft.errors import InputError
from fedpeft.models.embedded import byte_tokenizer
from fedpeft.objectives.base import IGNORE
from fedpeft.objectives.masked_lm import MaskedLM
from fedpeft.objectives.measures import Tally

TASK, LENGTH = "masked-lm", 90


@pytest.fixture
def tokenizer():
    made = copy.deepcopy(byte_tokenizer())
    made.add_special_tokens({"mask_token": "<mask>", "cls_token": "<cls>"})
    return made


def records(texts):
    return Records(Texts.of(texts), np.zeros(len(texts), dtype=np.int64), ["all"], {}, "text")


def drawn_texts(count, length=LENGTH):
    rng = np.random.default_rng(0)
    return ["".join(map(chr, row)) for row in rng.integers(33, 126, (count, length))]


def test_tokens_are_hidden_by_the_rule(tokenizer):
    texts = drawn_texts(400)
    data = encode(records(texts), tokenizer, TASK, 128)
    inputs, labels = data.batch(np.arange(400))
    true = torch.tensor(tokenizer(texts)["input_ids"])
    shown, hidden = inputs["input_ids"], labels != IGNORE
    assert torch.equal(labels[hidden], true[hidden]) and torch.equal(shown[~hidden], true[~hidden])
    masked, same = shown == tokenizer.mask_token_id, shown == true
    total = int(hidden.sum())
    assert total / true.numel() == pytest.approx(0.15, abs=0.01)
    assert int((hidden & masked).sum()) / total == pytest.approx(0.8, abs=0.02)
    # One of the drawn words in 260 is the word itself.
    assert int((hidden & same).sum()) / total == pytest.approx(0.1, abs=0.02)
    assert int((hidden & ~same & ~masked).sum()) / total == pytest.approx(0.1, abs=0.02)


def test_what_is_hidden_of_a_text_hangs_on_seed_and_text_alone(tokenizer):
    texts = drawn_texts(6)
    data = encode(records(texts), tokenizer, TASK, 128)
    more = encode(records(["another one", *texts]), tokenizer, TASK, 128).augmented(5)
    one, again, other = data.augmented(5), data.augmented(5), data.augmented(6)
    assert torch.equal(one.labels, again.labels) and torch.equal(one.inputs["input_ids"], again.inputs["input_ids"])
    assert not torch.equal(one.labels, other.labels)
    for name, value in more.view(np.arange(1, 7)).batch(np.arange(6))[0].items():
        assert torch.equal(value, one.batch(np.arange(6))[0][name])
    assert torch.equal(one.view(np.array([3, 1])).labels, one.labels[[3, 1]])
    assert torch.equal(data.labels, encode(records(texts), tokenizer, TASK, 128).labels)  # of evaluations


def test_special_tokens_stay_and_each_text_teaches_something(tokenizer):
    data = encode(records(["a", "<cls>b", "<cls><eos>", "cd"]), tokenizer, TASK, 8)
    assert data.teaching().tolist() == [0, 1, 3]
    assert [(entry.where, entry.count) for entry in data.skipped] == [(TASK, 1)]
    for seed in range(30):
        inputs, labels = data.augmented(seed).batch(np.arange(4))
        assert inputs["input_ids"][1, 0] == tokenizer.cls_token_id and labels[1, 0] == IGNORE
        assert inputs["input_ids"][2, :2].tolist() == [tokenizer.cls_token_id, tokenizer.eos_token_id]
        assert (labels != IGNORE).any(1).tolist() == [True, True, False, True]


def test_texts_from_a_cache_are_hidden_alike(tokenizer, tmp_path):
    cache, texts = Cache(tmp_path / "cache", 0, named=True), records(drawn_texts(5))
    plain = encode(texts, tokenizer, TASK, 128)
    for _ in range(2):
        kept = encode(texts, tokenizer, TASK, 128, cache=cache)
        assert torch.equal(kept.labels, plain.labels) and kept.teaching().tolist() == plain.teaching().tolist()
        assert torch.equal(kept.augmented(3).inputs["input_ids"], plain.augmented(3).inputs["input_ids"])


def test_measures_are_of_hidden_tokens():
    scores = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [9.0, 9.0]], [[0.0, 3.0], [5.0, 5.0], [5.0, 5.0]]])
    targets = torch.tensor([[0, 0, IGNORE], [1, IGNORE, IGNORE]])
    tally = Tally(MaskedLM(TASK))
    tally.add(scores, targets)
    each = [np.log(1 + np.exp(-2.0)), np.log(1 + np.exp(1.0)), np.log(1 + np.exp(-3.0))]
    found = tally.metrics()
    assert found["loss"] == pytest.approx(((each[0] + each[1]) / 2 + each[2]) / 2, rel=1e-6)
    assert found["perplexity"] == pytest.approx(np.exp(sum(each) / 3), rel=1e-6)
    assert found["accuracy"] == pytest.approx(2 / 3) and found["test_tokens"] == 3


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(InputError, match="the tokenizer has no mask token"):
        encode(records(["a"]), byte_tokenizer(), TASK, 8)
    with pytest.raises(InputError, match=r"data\.loss_on=all: of language models' texts; model\.task=masked-lm"):
        configs.load({}, {"model.name": "tiny-bert", "model.task": TASK, "data.loss_on": "all"})
    with pytest.raises(InputError, match="its records have two answers each"):
        source.load(configs.DataConfig(source="preferences"), TASK, 0)
