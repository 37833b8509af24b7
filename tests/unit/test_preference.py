"""Preferences: what a pair is, its tokens, its loss by the formula of the paper, and what is refused."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
import torch

from fedpeft import config as configs
from fedpeft.data import source
from fedpeft.data.cache import Cache
from fedpeft.data.conversations import PAIRS, find_form, parse_pair, read_rows
from fedpeft.data.encode import encode
from fedpeft.errors import InputError
from fedpeft.models.embedded import byte_tokenizer
from fedpeft.objectives.base import load_objective
from fedpeft.objectives.preference import unfold_pairs
from support import chat

ASKED = ("user", "What is the capital of Denmark?")
GOOD, BAD = ("assistant", "The capital is Copenhagen."), ("assistant", "I am well.")
MORE = [ASKED, GOOD, ("user", "How many people live there?")]


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def read(tmp_path, *rows, cache=None, **data):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configs.load({"model": {"task": "preference"}, "data": {"source": str(path), **data}})
    return source.whole(str(path), "data.source", config.data, "preference", cache=cache)


def sides(data, index):
    """Token ids of the chosen and the rejected conversation, and which are of the answer."""
    inputs, _ = data.batch(np.array([index]))
    rows, answers = unfold_pairs(inputs)
    return [
        (ids[mask == 1].tolist(), chosen[mask == 1].tolist())
        for ids, mask, chosen in zip(rows["input_ids"], rows["attention_mask"], answers, strict=True)
    ]


FORMS = {
    "strings": {"prompt": ASKED[1], "chosen": GOOD[1], "rejected": BAD[1]},
    "question": {"Question": ASKED[1], "chosen": GOOD[1], "rejected": BAD[1]},
    "messages": {"prompt": messages(ASKED), "chosen": messages(GOOD), "rejected": messages(BAD)},
    "no prompt": {"chosen": messages(ASKED, GOOD), "rejected": messages(ASKED, BAD)},
    "prompt twice": {"prompt": ASKED[1], "chosen": messages(ASKED, GOOD), "rejected": messages(ASKED, BAD)},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_write_a_pair_is_the_same_two_conversations(form, tmp_path):
    records = read(tmp_path, FORMS[form])
    assert parse_pair(records.inputs[0]) == ([ASKED, GOOD], [ASKED, BAD])
    assert records.wording.form == "preference"
    named = {"chosen": "better", "rejected": "worse", **({"prompt": "asked"} if "prompt" in FORMS[form] else {})}
    if form != "question":
        row = {named[key]: value for key, value in FORMS[form].items()}
        assert read(tmp_path, row, columns=named).inputs[0] == records.inputs[0]


def test_a_system_turn_stands_before_both(tmp_path):
    records = read(tmp_path, {**FORMS["strings"], "system": "Be brief."})
    assert [side[0] for side in parse_pair(records.inputs[0])] == [("system", "Be brief.")] * 2


MALFORMED = [
    ({"chosen": "a", "rejected": "b"}, "its chosen is a string, and nothing says what it answers"),
    ({**FORMS["strings"], "rejected": None}, "its rejected is empty"),
    ({**FORMS["strings"], "chosen": 3}, "its chosen is no list, but 3"),
    ({**FORMS["strings"], "rejected": GOOD[1]}, "its chosen and rejected are the same"),
    ({"chosen": messages(ASKED, GOOD), "rejected": messages(ASKED)}, "no turn of the assistant"),
    ({"chosen": messages(*MORE, BAD), "rejected": messages(ASKED, GOOD)}, "only the beginning of the other"),
    ({"chosen": messages(*MORE), "rejected": messages(ASKED, BAD)}, "its chosen ends with the user"),
    ({"chosen": messages(ASKED, GOOD), "rejected": messages(MORE[2], BAD)}, "answer different questions"),
]


@pytest.mark.parametrize(("row", "why"), MALFORMED)
def test_a_malformed_pair_names_its_row_or_is_counted(row, why):
    form, held = find_form(list(row), {}, "x.jsonl", forms=PAIRS)
    fine = {key: FORMS["messages"].get(key) for key in ("prompt", "chosen", "rejected")}
    table = {name: [fine[key], row[name]] for key, name in held.items()}
    if "prompt" not in held:
        table |= {"chosen": [FORMS["no prompt"]["chosen"], row["chosen"]]}
        table |= {"rejected": [FORMS["no prompt"]["rejected"], row["rejected"]]}
    with pytest.raises(InputError, match="record 2 is no conversation") as error:
        read_rows(table, form, held, "x.jsonl", False)
    assert why in str(error.value)
    texts, kept, bad = read_rows(table, form, held, "x.jsonl", True)
    assert len(texts) == 1 and kept == [0] and why in bad[0]


@pytest.mark.parametrize("kind", list(chat.JINJA))
def test_rows_are_both_conversations_as_the_template_writes_them_and_the_last_answers_count(kind, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="fedpeft.data")
    tokenizer = chat.tokenizer(kind)
    talk = {"chosen": messages(*MORE, ("assistant", "650")), "rejected": messages(*MORE, BAD)}
    data = encode(read(tmp_path, FORMS["strings"], talk), tokenizer, "preference", 128, "texts")
    for index, turns in enumerate(([ASKED], MORE)):
        answers = [GOOD, BAD] if index == 0 else [("assistant", "650"), BAD]
        for (ids, answer), last in zip(sides(data, index), answers, strict=True):
            pieces = chat.PIECES[kind]([*turns, last])
            first = max(place for place, (text, learns) in enumerate(pieces) if learns and last[1] in text)
            alone = [(text, learns and place >= first) for place, (text, learns) in enumerate(pieces)]
            assert (ids, answer) == chat.by_characters(tokenizer, alone)
    assert "2 texts are pairs of conversations of 3.0 turns (preference)" in caplog.text
    assert data.labels.tolist() == [[math.inf] * 2] * 2  # until the reference was asked


def test_a_pair_of_which_one_answer_is_cut_away_is_left_out_and_counted(tmp_path):
    tokenizer, long = byte_tokenizer(), {**FORMS["strings"], "rejected": "b" * 100}
    short = {"prompt": "a?", "chosen": "yes", "rejected": "no"}
    records = read(tmp_path, short, long, {**short, "prompt": "a" * 60}, template="plain")
    data = encode(records, tokenizer, "preference", 40, "texts")
    assert data.teaching().tolist() == [0, 1] and data.labels[2].isnan().all()
    assert [(entry.where, entry.count) for entry in data.skipped] == [("model.max_length=40", 2), ("data.loss_on", 1)]
    assert [len(ids) for ids, _ in sides(data, 1)] == [40, 40]
    dropped = encode(read(tmp_path, short, long, template="plain", truncate="drop"), tokenizer, "preference", 40)
    assert dropped.teaching().tolist() == [0]


def test_a_cache_gives_the_same_rows(tmp_path):
    cache = Cache(tmp_path / "cache", 0, named=True)
    records = [read(tmp_path, FORMS["strings"], FORMS["strings"], cache=cache) for _ in range(2)]
    made, again = (encode(part, byte_tokenizer(), "preference", 64, cache=cache) for part in records)
    assert all(torch.equal(value, again.inputs[name]) for name, value in made.inputs.items())
    assert torch.equal(made.labels, again.labels) and set(made.inputs) == {"input_ids", "attention_mask", "part"}


def test_the_loss_is_the_papers_and_trls_on_the_same_numbers():
    """TRL 1.16, `DPOTrainer`, loss_type="sigmoid": -logsigmoid(beta * (logratios - ref_logratios))."""
    objective = load_objective("preference", {"beta": 0.3})
    draw = torch.Generator().manual_seed(0)
    says, said = (-20 * torch.rand(6, 2, generator=draw, dtype=torch.float64) for _ in range(2))
    for row, loss in enumerate(objective.losses(says, said).tolist()):
        chosen, rejected = says[row].tolist()
        reference_chosen, reference_rejected = said[row].tolist()
        paper = -math.log(1 / (1 + math.exp(-0.3 * ((chosen - reference_chosen) - (rejected - reference_rejected)))))
        ratios, of_reference = chosen - rejected, reference_chosen - reference_rejected
        assert loss == pytest.approx(paper, rel=1e-12)
        assert loss == pytest.approx(math.log1p(math.exp(-0.3 * (ratios - of_reference))), rel=1e-12)
    at_start = objective.losses(said, said)
    assert at_start.tolist() == pytest.approx([math.log(2)] * 6)


def test_a_margin_is_counted_and_none_is_half_right():
    objective = load_objective("preference", {"beta": 0.5})
    said = torch.tensor([[-10.0, -10.0]] * 4)
    says = said + torch.tensor([[2.0, 0.0], [0.0, 4.0], [3.0, 3.0], [1e-6, 0.0]])
    sums = objective.measure(says, said, objective.losses(says, said).double())
    assert objective.metrics(sums, 4)["accuracy"] == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)
    assert objective.further(sums, 4)["reward_margin"] == pytest.approx(0.5 * (2 - 4) / 4, abs=1e-5)
    assert objective.metrics(sums, 4).keys() == {"accuracy", "loss", "num-examples"}


REFUSED = [
    ({"data.loss_on": "all"}, r"data\.loss_on=all: .*sums of their tokens. Set it to response"),
    ({"client.loss_weighting": "token"}, r"client\.loss_weighting=token: .*Set it to record"),
    ({"data.text": "prompt"}, r"data\.text=prompt: .*Set it to null"),
    ({"model.task_options.beta": 0.0}, r"model\.task_options\.beta: 0"),
    ({"model.task_options.reference": "last"}, r"model\.task_options\.reference"),
    ({"model.task_options.gamma": 1}, r"gamma.*beta, reference"),
    ({"model.task": "causal-lm", "model.task_options.beta": 1.0}, r"beta.*CausalLM has the options none"),
]


@pytest.mark.parametrize(("more", "why"), REFUSED)
def test_what_means_nothing_for_pairs_is_refused(more, why):
    with pytest.raises(InputError, match=why):
        configs.load({}, {"model.name": "tiny-llama", "model.task": "preference", **more})


def test_data_without_pairs_is_refused_and_pairs_for_another_task(tmp_path):
    with pytest.raises(InputError, match="learns of pairs of answers, and there are no columns chosen and rejected"):
        read(tmp_path, {"prompt": "a", "completion": "b"})
    with pytest.raises(InputError, match=r"data\.source=instructions: its records have no labels, and .* two answers"):
        source.load(configs.DataConfig(source="instructions"), "preference", 0)
    with pytest.raises(InputError, match=r"data\.source=preferences: its records have two answers each, .* no labels"):
        source.load(configs.DataConfig(source="preferences"), "causal-lm", 0)
