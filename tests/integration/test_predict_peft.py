"""Folders of peft's that are no plain LoRA: `predict` says what stock peft says of them, or why it cannot."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from fedpeft.adapters.folder import CONFIG, WEIGHTS
from fedpeft.errors import InputError
from fedpeft.run.trained import open_trained
from fedpeft.simulations.run import simulate
from support import small_models as small
from support.methods import TINY
from support.peft_types import CLOSE, FITTING

GIVEN = ["model.task=sequence-classification", "data.labels=[a,b,c]"]
LORA = {"target_modules": ["query", "value"]}
FOREIGN = [
    ("OFT", {**LORA, **FITTING["OFT"]}),
    ("VBLORA", {**LORA, **FITTING["VBLORA"]}),
    ("ADALORA", {**LORA, "total_step": 10}),
    ("LORA", {**LORA, "use_dora": True}),
    ("LORA", {**LORA, "bias": "all"}),
    ("LORA", {**LORA, "modules_to_save": ["output.LayerNorm"]}),
    ("LORA", {**LORA, "trainable_token_indices": [70, 71]}),
    ("LORA", {"target_modules": ["query", "word_embeddings"]}),
]


def make(path, out, name, options):
    """A folder that stock peft has written after all that trains has moved, and the model that wrote it."""
    torch.manual_seed(1)
    bare = AutoModelForSequenceClassification.from_pretrained(path)
    options = {"task_type": "SEQ_CLS", **options}
    tuned = get_peft_model(bare, PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)](**options)).eval()
    with torch.no_grad():
        for value in filter(lambda value: value.requires_grad, tuned.parameters()):
            value.add_(0.1 * torch.randn(value.shape))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.save_pretrained(out)
    return tuned


@pytest.mark.parametrize(("name", "options"), FOREIGN)
def test_a_folder_of_stock_pefts_is_the_model_that_wrote_it(name, options, bert_folder, tmp_path):
    tuned, inputs = make(bert_folder, tmp_path / "there", name, options), small.inputs("bert")
    torch.manual_seed(5)
    said = open_trained(tmp_path / "there", GIVEN).base.forward(inputs)
    torch.testing.assert_close(said, tuned(**inputs).logits, **CLOSE)
    bare = AutoModelForSequenceClassification.from_pretrained(bert_folder).eval()
    bare.classifier.load_state_dict(tuned.base_model.model.classifier.state_dict(), strict=False)
    assert not torch.allclose(said, bare(**inputs).logits, atol=1e-3), "the adapter does nothing"


@pytest.mark.parametrize("kind", ["IA3", "VERA"])
def test_a_run_of_another_type_answers_as_stock_peft_does(fedpeft, kind, bert_folder, tmp_path):
    rows = [{"text": f"{name} {number}", "label": name} for number in range(20) for name in "abc"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = {"model.name": str(bert_folder), "model.task": "sequence-classification", "data.clients": 2}
    more |= {"data.source": str(tmp_path / "rows.jsonl"), "adapter": {"name": "peft", "type": kind}}
    simulate({}, {**TINY, **more, "strategy.name": "fedit", "client.lr": 0.05, "run.rounds": 2}, tmp_path / "run")
    (tmp_path / "new.jsonl").write_text(json.dumps({"text": "A text."}))
    done = fedpeft("predict", tmp_path / "run", "--data", tmp_path / "new.jsonl", "--out", tmp_path / "o.jsonl")
    assert done.code == 0, done.err
    said = json.loads((tmp_path / "o.jsonl").read_text())["probabilities"]
    bare = AutoModelForSequenceClassification.from_pretrained(bert_folder).eval()
    stock = PeftModel.from_pretrained(bare, tmp_path / "run" / "adapter").eval()
    inputs = small.tokenizer()("A text.", return_tensors="pt")
    wanted = stock(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert list(said.values()) == pytest.approx(wanted[0].softmax(-1).tolist(), abs=1e-5)


def test_what_does_not_fit_or_cannot_be_run_is_refused(bert_folder, tmp_path):
    make(bert_folder, tmp_path / "ia3", "IA3", {**LORA, "feedforward_modules": []})
    about = json.loads((tmp_path / "ia3" / CONFIG).read_text())
    tensors = load_file(tmp_path / "ia3" / WEIGHTS)
    first = next(name for name in tensors if "ia3_l" in name)
    short = {name: value for name, value in tensors.items() if name != first}
    wide = {**tensors, first: torch.ones(17, 1)}
    broken = {**tensors, first: torch.full((16, 1), torch.nan)}
    for change, values, words in (
        ({}, short, f"misses {first} in the folder"),
        ({}, {**tensors, "base_model.model.more.ia3_l": torch.ones(3)}, r"does not know base_model\.model\.more"),
        ({}, wide, r"has shape \[17, 1\]; over .* it is \[16, 1\]"),
        ({}, broken, "has NaN or inf"),
        ({"peft_type": "PROMPT_TUNING"}, tensors, "is not run here: it learns inputs"),
        ({"peft_type": "LILY"}, tensors, "router takes a mean over a batch"),
        ({"peft_type": "NEXTYEAR"}, tensors, r"the installed peft \(.*\) does not know"),
        ({"turned_around": True, "peft_version": "9.1"}, tensors, "turned_around is set .* peft 9.1. Install that one"),
        ({"target_modules": ["nowhere"]}, tensors, "peft does not take this adapter"),
    ):
        (tmp_path / "ia3" / CONFIG).write_text(json.dumps({**about, **change}))
        save_file(values, tmp_path / "ia3" / WEIGHTS)
        with pytest.raises(InputError, match=words):
            open_trained(tmp_path / "ia3", GIVEN)


def test_saved_modules_of_tied_weights_are_two(tmp_path):
    """An output layer and embeddings that were saved whole are no longer one, also where the base ties them."""
    model = small.make("gpt2")
    model.save_pretrained(tmp_path / "base")
    small.tokenizer().save_pretrained(tmp_path / "base")
    options = {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"], "task_type": "CAUSAL_LM"}
    tuned = get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA](**options)).eval()
    with torch.no_grad():
        for value in filter(lambda value: value.requires_grad, tuned.parameters()):
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())))
    tuned.save_pretrained(tmp_path / "there")
    opened = open_trained(tmp_path / "there", [f"model.name={tmp_path / 'base'}"])
    inputs = {"input_ids": torch.arange(5, 15)[None], "attention_mask": torch.ones(1, 10, dtype=torch.long)}
    torch.testing.assert_close(opened.base.forward(inputs), tuned(**inputs).logits, **CLOSE)
