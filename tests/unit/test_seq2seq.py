"""What encoder and decoder get of a record, token by token; what is cut, left out and refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from fedpeft import config as configs
from fedpeft.clients.train import per_sample_loss
from fedpeft.config import DataConfig, ModelConfig
from fedpeft.data import source
from fedpeft.data.cache import Cache
from fedpeft.data.encode import encode
from fedpeft.errors import InputError
from fedpeft.models import loading
from fedpeft.models.embedded import byte_tokenizer
from fedpeft.objectives.base import IGNORE, load_objective
from fedpeft.objectives.seq2seq import split_inputs
from support import small_models as small
from support.per_sample import as_double, compare

TASK = "seq2seq"
LINES = {"letter": "It rained all day.", "summary": "Rain."}
NAMED = {"columns": {"prompt": "letter", "completion": "summary"}}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(tmp_path, rows, **data):
    path = write(tmp_path / "records.jsonl", rows)
    return source.whole(str(path), "data.source", DataConfig(source=str(path), **data), TASK)


def framed(start=None):
    """Bytes whose tokenizer ends every text, and begins it with a mark, as BART's does."""
    made = byte_tokenizer()
    if start:
        made.add_special_tokens({"bos_token": start})
        frame, marks = f"{start} $A <eos>", [(start, made.bos_token_id), ("<eos>", 1)]
    else:
        frame, marks = "$A <eos>", [("<eos>", 1)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=frame, special_tokens=marks)
    return made


def halves(data, index, tokenizer):
    """What is asked, and the answer, in the tokenizer's words."""
    inputs, labels = data.batch(np.array([index]))
    ids, part = inputs["input_ids"][0], inputs["part"][0]
    learned = labels[0] != IGNORE
    assert torch.equal(learned, part == 1) and torch.equal(labels[0][learned], ids[learned])
    return tokenizer.decode(ids[part == 2]), tokenizer.decode(ids[learned])


@pytest.mark.parametrize("start", [None, "<cls>"])
@pytest.mark.parametrize(
    ("row", "data", "asked", "said"),
    [
        ({"prompt": "a b", "completion": "c"}, {}, "a b", "c"),
        (LINES, NAMED, LINES["letter"], LINES["summary"]),
        ({"instruction": "Add.", "input": "2, 3", "output": "5"}, {}, "Add.\n\n2, 3", "5"),
        ({"question": "2?", "answer": "two"}, {"skip_bad": True}, "2?", "two"),
        (
            {"messages": [{"role": r, "content": c} for r, c in (("system", "S:"), ("user", "u"), ("assistant", "v"))]},
            {},
            "S:\nu",
            "v",
        ),
    ],
    ids=["completion", "named", "alpaca", "qa", "messages"],
)
def test_the_encoder_reads_what_is_asked_and_the_answer_is_learned_with_its_end(
    tmp_path, row, data, asked, said, start
):
    tokenizer, begin = framed(start), start or ""
    made = encode(read(tmp_path, [row], **data), tokenizer, TASK, 64)
    assert halves(made, 0, tokenizer) == (f"{begin}{asked}<eos>", f"{begin}{said}<eos>")


def test_a_tokenizer_that_ends_no_text_gets_the_end_of_the_answer_alone_also_where_it_pads(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "<eos>"
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "abcd", "completion": "ef<eos>g"}]
    made = encode(read(tmp_path, rows), tokenizer, TASK, 64)
    assert halves(made, 0, tokenizer) == ("ab", "c<eos>") and halves(made, 1, tokenizer) == ("abcd", "ef<eos>g<eos>")
    # Beside a longer one padding, which is the end token too, is of neither half.
    inputs, labels = made.batch(np.arange(2))
    assert inputs["part"][0].tolist() == [1, 1, 2, 2, 0, 0, 0, 0, 0] and (labels[0] != IGNORE).sum() == 2


def test_both_halves_are_cut_to_length_and_counted(tmp_path, caplog):
    rows = [{"prompt": "abcdefgh", "completion": "ABCDEFGH"}, {"prompt": "ab", "completion": "AB"}]
    tokenizer = framed("<cls>")
    wanted = {
        "end": ("<cls>abc<eos>", "<cls>ABCD"),  # the encoder's marks stay, and what is cut is not said to end
        "start": ("<cls>fgh<eos>", "<cls>FGH<eos>"),
    }
    for truncate, halved in wanted.items():
        made = encode(read(tmp_path, rows, truncate=truncate), tokenizer, TASK, 5)
        assert halves(made, 0, tokenizer) == halved
        assert halves(made, 1, tokenizer) == ("<cls>ab<eos>", "<cls>AB<eos>")
        (note,) = made.skipped
        assert note.count == 1 and "more tokens in a half" in note.what and "the longest has 10" in note.what
    made = encode(read(tmp_path, rows, truncate="drop"), tokenizer, TASK, 5)
    assert made.teaching().tolist() == [1]
    assert tokenizer.truncation_side == "right"


def test_a_cache_gives_the_same_records_and_another_template_others(tmp_path):
    tokenizer, cache = framed(), Cache(tmp_path / "cache", 0)
    path = write(tmp_path / "records.jsonl", [LINES] * 3)

    def made(**data):
        config = DataConfig(source=str(path), **NAMED, **data)
        return encode(
            source.whole(str(path), "data.source", config, TASK, cache=cache), tokenizer, TASK, 300, cache=cache
        )

    first, again, alpaca = made(), made(), made(template="alpaca")
    assert halves(first, 2, tokenizer) == halves(again, 2, tokenizer) == ("It rained all day.<eos>", "Rain.<eos>")
    assert halves(alpaca, 2, tokenizer)[0].endswith("### Instruction:\nIt rained all day.\n\n### Response:\n<eos>")


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_loss_is_what_the_model_itself_makes_of_labels(kind, tmp_path):
    """transformers shifts labels by itself, so the decoder's inputs are the architecture's own."""
    folder = small.save(kind, tmp_path / kind)
    base = loading.load(ModelConfig(name=str(folder), task=TASK), 1, 0)
    rows = [{"prompt": "ab" * n, "completion": "xyz"[:n]} for n in (1, 3, 2)]
    data = encode(read(tmp_path, rows), base.processor, TASK, 32)
    inputs, labels = data.batch(np.arange(3))
    with torch.no_grad():
        losses = base.objective.losses(*base.objective.pair(base.forward(inputs), labels))
        for index, row in enumerate(rows):
            asked = base.processor(row["prompt"], return_tensors="pt")
            said = base.processor(row["completion"] + "<eos>", return_tensors="pt")["input_ids"]
            stock = base.backbone(**asked, labels=said).loss
            torch.testing.assert_close(losses[index], stock, atol=1e-5, rtol=1e-5)


def test_gradients_of_samples_are_autograds_for_t5(tmp_path, monkeypatch):
    """In float64 but for its softmax, which T5 always takes in float32."""
    folder = small.save("t5", tmp_path / "t5")
    made = as_double(small_t5(folder))
    made.write(small.randomised(made, scale=0.3).map(lambda value: value.double()))
    rows = [{"prompt": "ab" * n, "completion": "xyz"[:n]} for n in (1, 3, 2)]
    monkeypatch.setitem(compare.__globals__["EXACT"], "atol", 1e-5)
    sites = {site.split(".")[0] for site in made.form.lora_sites()}
    assert sites == {"encoder", "decoder"}
    assert {site.rpartition(".")[2] for site in made.form.lora_sites()} == {"q", "v"}
    compare(made, made.train_roles(("A", "B")), encode(read(tmp_path, rows), made.base.processor, TASK, 32), least=1e-6)


def small_t5(folder):
    from fedpeft.adapters.adapted import build
    from fedpeft.config import AdapterConfig

    return build(ModelConfig(name=str(folder), task=TASK), AdapterConfig(), 1, 0)


def test_a_record_beside_others_has_the_loss_that_it_has_alone(tmp_path):
    model = small_t5(small.save("t5", tmp_path / "t5"))
    model.base.backbone.eval()
    rows = [{"prompt": "ab" * n, "completion": "xyzuvw"[:n]} for n in (1, 6, 2, 4)]
    data = encode(read(tmp_path, rows), model.base.processor, TASK, 32)
    with torch.no_grad():
        together = per_sample_loss(model, *data.batch(np.arange(4)))
        alone = torch.cat([per_sample_loss(model, *data.batch(np.array([index]))) for index in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_a_half_without_a_token_is_read_as_padding():
    inputs = {"input_ids": torch.tensor([[5, 6, 0], [7, 8, 9]]), "part": torch.tensor([[1, 1, 0], [2, 2, 2]])}
    made = split_inputs({**inputs, "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}, start=4, filler=3)
    assert {name: value.tolist() for name, value in made.items()} == {
        "input_ids": [[3, 3, 3], [7, 8, 9]],
        "attention_mask": [[1, 0, 0], [1, 1, 1]],
        "decoder_input_ids": [[4, 5], [4, 3]],
        "decoder_attention_mask": [[1, 1], [1, 0]],
    }


MANY = {"messages": [{"role": ("user", "assistant")[n % 2], "content": f"{n}"} for n in range(4)]}


def test_conversations_of_many_turns_are_refused_by_name_or_counted(tmp_path):
    one = {"messages": MANY["messages"][:2]}
    with pytest.raises(InputError, match=r"begins with '0' cannot be taken: it has 4 turns, and one question"):
        encode(read(tmp_path, [one, MANY]), framed(), TASK, 32)
    made = encode(read(tmp_path, [one, MANY, one], skip_bad=True), framed(), TASK, 32)
    assert made.teaching().tolist() == [0, 2] and made.skipped[0].count == 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"text": "body"}, "data.text=body: model.task=seq2seq reads one column and learns to write another"),
        ({"loss_on": "all"}, "data.loss_on=all: with model.task=seq2seq an encoder reads what is asked"),
        ({"template": "chatml"}, "data.template=chatml: its marks say who speaks"),
        ({"template": "vicuna"}, "data.template=vicuna: its marks say who speaks"),
    ],
)
def test_keys_that_mean_nothing_here_are_refused(data, words):
    with pytest.raises(InputError) as error:
        configs.load({"model": {"name": "tiny-t5", "task": TASK}, "data": data})
    assert words in str(error.value)
    configs.load({"model": {"name": "tiny-t5", "task": TASK}, "client": {"loss_weighting": "token"}})


def test_records_without_an_answer_and_tokenizers_without_an_end_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"reads one column and learns to write another.*data\.columns=\{prompt: NAME"):
        read(tmp_path, [LINES])
    with pytest.raises(InputError, match=r"chosen and rejected are preferences, of which model\.task=seq2seq does not"):
        read(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    endless = byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(InputError, match=r"model\.task=seq2seq: the tokenizer has no end token"):
        encode(read(tmp_path, [LINES], **NAMED), endless, TASK, 32)


@pytest.mark.parametrize("task", ["causal-lm", "preference", "masked-lm", "sequence-classification", "multi-label"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder_is_refused_for_what_takes_one_half(kind, task, tmp_path):
    folder = small.save(kind, tmp_path / kind)
    words = (
        rf"{kind}' \({kind}\) is an encoder-decoder, which model\.task={task} does not take\. Set model\.task=seq2seq"
    )
    with pytest.raises(InputError, match=words):
        loading.load(ModelConfig(name=str(folder), task=task), 2, 0)
    with pytest.raises(InputError, match=words):
        loading.product_shapes(ModelConfig(name=str(folder), task=task))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_one_half_alone_is_refused(kind, tmp_path):
    folder = small.save(kind, tmp_path / kind)
    with pytest.raises(InputError, match=rf"\({kind}\) is no encoder-decoder, which model\.task=seq2seq trains"):
        loading.load(ModelConfig(name=str(folder), task=TASK), 1, 0)
    with pytest.raises(InputError, match="tiny-llama is for causal-lm, not seq2seq"):
        loading.load(ModelConfig(name="tiny-llama", task=TASK), 1, 0)
    with pytest.raises(InputError, match="tiny-t5 is for seq2seq, not causal-lm"):
        loading.load(ModelConfig(name="tiny-t5", task="causal-lm"), 1, 0)


def test_a_model_that_does_not_say_what_answers_begin_behind_is_refused(tmp_path):
    folder = small.save("t5", tmp_path / "t5")
    for name in ("config.json", "generation_config.json"):
        tree = json.loads((folder / name).read_text())
        tree.pop("decoder_start_token_id", None)
        (folder / name).write_text(json.dumps(tree))
    with pytest.raises(InputError, match="does not say the token that its answers begin behind"):
        loading.load(ModelConfig(name=str(folder), task=TASK), 1, 0)


def test_a_length_beyond_the_table_of_positions_is_refused_and_t5_has_none(tmp_path):
    with pytest.raises(InputError, match=r"model\.max_length=4000: .* takes at most 130 tokens"):
        loading.load(ModelConfig(name=str(small.save("bart", tmp_path / "bart")), task=TASK, max_length=4000), 1, 0)
    loading.load(ModelConfig(name=str(small.save("t5", tmp_path / "t5")), task=TASK, max_length=4000), 1, 0)


def test_measures_are_those_of_a_language_model():
    assert load_objective(TASK).all_measures.keys() == load_objective("causal-lm").all_measures.keys()
    assert isinstance(
        loading.load(ModelConfig(name="tiny-t5", task=TASK), 1, 0).backbone, transformers.T5ForConditionalGeneration
    )
