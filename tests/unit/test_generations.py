"""Generated answers: those of a loop that takes the most likely token, prompts of unequal length together or alone."""

from __future__ import annotations

import pytest
import torch

from fedpeft import config as configs
from fedpeft.data import templates
from fedpeft.data.exercises import Instructions
from fedpeft.run import generations
from support import chat
from support import small_models as small

PROMPTS = ["a", "What is it?", "to be or not", "x" * 40]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    adapted = small.adapted(small.save("llama", tmp_path_factory.mktemp("base") / "llama"), "llama")
    adapted.write(small.randomised(adapted))
    return adapted


def by_hand(model, ids, most, stop):
    """One prompt without padding, token by token, over the whole text each time."""
    said = []
    with torch.no_grad():
        while len(said) < most:
            token = int(model.base.forward({"input_ids": torch.tensor([ids + said])})[0, -1].argmax())
            if token in stop:
                break
            said.append(token)
    return model.base.processor.decode(said, skip_special_tokens=True).strip()


@pytest.mark.parametrize("stop", [[], [1], "second"])
def test_greedy_answers_are_those_of_a_plain_loop(model, stop):
    tokenizer = model.base.processor
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    if stop == "second":  # a token that the model does say, so that an answer ends early
        logits = model.base.forward({"input_ids": torch.tensor([prompts[1]])})
        first = int(logits[0, -1].argmax())
        stop = [int(model.base.forward({"input_ids": torch.tensor([[*prompts[1], first]])})[0, -1].argmax())]
    answers = generations.generate_answers(model.base, prompts, 7, stop)
    assert answers == [by_hand(model, ids, 7, stop) for ids in prompts]
    assert len(set(answers)) > 1


def test_a_checkpoints_own_way_to_generate_does_not_count(model, monkeypatch):
    from transformers import GenerationConfig

    prompts = [model.base.processor(text)["input_ids"] for text in PROMPTS]
    wanted = generations.generate_answers(model.base, prompts, 7, [])
    token = int(model.base.forward({"input_ids": torch.tensor([prompts[1]])})[0, -1].argmax())
    for habits in (
        {"do_sample": True, "temperature": 5.0, "top_k": 3},
        {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1},
        {"suppress_tokens": [token], "min_new_tokens": 7, "forced_eos_token_id": 2},
    ):
        its = GenerationConfig(**habits)
        monkeypatch.setattr(model.base.backbone, "generation_config", its)
        assert generations.generate_answers(model.base, prompts, 7, []) == wanted
        assert model.base.backbone.generation_config is its


def test_a_prompt_that_fills_the_models_positions_gets_no_answer(model):
    long = [5] * small.POSITIONS
    assert generations.generate_answers(model.base, [long], 3, []) == [""]


def test_an_answer_does_not_depend_on_the_prompts_beside_it(model):
    """Of 7 tokens where there is room, of 3 where a prompt leaves no more; long ones take nothing from short ones."""
    short, fits, full = ([5] * count for count in (4, small.POSITIONS - 7, small.POSITIONS - 3))
    wanted = [by_hand(model, ids, room, []) for ids, room in ((short, 7), (fits, 7), (full, 3))]
    assert generations.generate_answers(model.base, [short, fits, full], 7, []) == wanted
    assert generations.generate_answers(model.base, [full, short], 7, []) == [wanted[2], wanted[0]]
    rows = generations._batch_alike([9, 5, 12, 6, 11], 4, 14)  # of 9, 5 and 6 tokens an answer of 4 has room
    assert list(rows) == [([1, 3, 0], 4), ([4], 3), ([2], 2)]
    assert list(generations._batch_alike([9, 5], 4, None)) == [([1, 0], 4)]


def test_padding_stands_before_a_prompt():
    ids, mask = generations.pad([[3, 4], [5, 6, 7, 8]], 0, left=True)
    assert ids.tolist() == [[0, 0, 3, 4], [5, 6, 7, 8]] and mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_scores_are_exact_matches_and_the_longest_common_subsequence():
    # LCS of "the cat sat" and "the old cat": the, cat; precision 2/3, recall 2/3. Danish letters are letters.
    found = generations.score(["the cat sat", "Rødgrød!", ""], ["the old cat", "rødgrød", "x"])
    assert found["exact_match"] == 0 and found["rouge_l"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert generations.score(["a b"], ["a b"]) == {"exact_match": 1.0, "rouge_l": pytest.approx(1.0)}


def test_prompts_end_where_the_answer_begins_and_long_ones_are_left_out(caplog):
    tree = {"evaluation": {"generate": {"records": 5}}, "model": {"name": "tiny-llama", "task": "causal-lm"}}
    _, records = Instructions().load()
    tokenizer = small.tokenizer()
    roomy = configs.load(tree, {"model.max_length": 400})
    found = generations.draw_prompts(roomy, records, tokenizer)
    assert len(found) == 5 and all(prompt.text.endswith("### Response:\n") and prompt.wanted for prompt in found)
    assert [prompt.wanted in prompt.text for prompt in found].count(False) >= 1
    assert found == generations.draw_prompts(roomy, records, tokenizer)
    none = generations.draw_prompts(configs.load(tree, {"model.max_length": 20}), records, tokenizer)
    assert none == [] and "5 of 5 prompts have more than model.max_length=20 tokens" in caplog.text
    longest = max(len(prompt.ids) for prompt in found)
    fitting = generations.draw_prompts(roomy, records, tokenizer, longest)
    assert fitting == [prompt for prompt in found if len(prompt.ids) < longest]  # a token at least is the answer's
    assert f"leave no room in the model's {longest} positions" in caplog.text
    assert generations.draw_prompts(roomy, records, tokenizer, longest + 1) == found


@pytest.mark.parametrize("kind", list(chat.JINJA))
def test_answers_end_at_the_templates_mark_and_at_the_tokenizers(kind):
    tokenizer = chat.tokenizer(kind)
    ends = {
        "chatml": "<|im_end|>",
        "llama": "<|eot_id|>",
        "gemma": "<end_of_turn>",
        "mistral": "</s>",
        "phi": "<|end|>",
    }
    found = templates.find_ends(templates.find_template(None, "messages", tokenizer), tokenizer)
    assert set(tokenizer.convert_ids_to_tokens(found)) == {ends[kind], tokenizer.eos_token}
