"""Model, tokenizer and records that do not belong together are refused at load, by trying and not by labels."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from fedpeft.config import ModelConfig
from fedpeft.data.encode import encode
from fedpeft.data.records import Records
from fedpeft.deploy.site import site
from fedpeft.deploy.site.worker import require_fit
from fedpeft.errors import InputError
from fedpeft.models import agreement, embedded, loading
from support import small_models as small

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def load(folder, task=small.TEXT, **options):
    return loading.load(ModelConfig(name=str(folder), task=task, **options), small.LABELS, 0)


def saved(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or small.tokenizer()).save_pretrained(folder)
    return folder


def set_in(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def texts(*found):
    return Records(list(found), np.zeros(len(found), np.int64), ["a"], {}, "text")


@pytest.mark.parametrize("kind", ["GPTNeoX", "OPT", "Llama"])
def test_a_decoder_is_taken_whatever_its_config_calls_it(tmp_path, kind):
    torch.manual_seed(0)
    more = {"ffn_dim": 24, "word_embed_proj_dim": 16} if kind == "OPT" else {}
    config = getattr(transformers, f"{kind}Config")(vocab_size=258, max_position_embeddings=130, **SIZES, **more)
    saved(tmp_path, getattr(transformers, f"{kind}ForCausalLM")(config))
    set_in(tmp_path / "config.json", is_decoder=False)
    assert load(tmp_path, small.LM).task == small.LM
    if kind == "OPT":  # its table of positions has two rows that are not for tokens
        load(tmp_path, small.LM, max_length=130)


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra"])
@pytest.mark.parametrize("spread", [0.02, 0.2])
def test_a_model_that_looks_ahead_is_no_causal_lm_whatever_its_config_calls_it(tmp_path, kind, spread):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=258, initializer_range=spread, is_decoder=False, **SIZES)
    named = {"Bert": "BertLMHeadModel"}.get(kind, f"{kind}ForCausalLM")
    saved(tmp_path, getattr(transformers, named)(config))
    with pytest.raises(InputError, match=r"model\.name: .*encoder: it sees the tokens"):
        load(tmp_path, small.LM)


@pytest.mark.parametrize(("name", "task"), [("bert", small.TEXT), ("roberta", small.TEXT), ("gpt2", small.LM)])
def test_no_tokenizer_is_made_out_of_nothing(tmp_path, name, task):
    small.save(name, tmp_path)
    load(tmp_path, task)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"model\.name: "):
        load(tmp_path, task)


@pytest.mark.parametrize(("pad", "usable"), [(1, 128), (7, 122)])
def test_positions_that_are_not_for_tokens_do_not_count(tmp_path, pad, usable):
    torch.manual_seed(0)
    config = transformers.RobertaConfig(vocab_size=258, max_position_embeddings=130, pad_token_id=pad, **SIZES)
    saved(tmp_path, transformers.RobertaForSequenceClassification(config))
    load(tmp_path, max_length=usable)
    with pytest.raises(InputError, match=rf"model\.max_length=130: .* at most {usable} tokens\. Set .*={usable}"):
        load(tmp_path, max_length=130)


def test_an_adapter_folder_is_no_base(tmp_path):
    small.save("llama", tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/models/base"}')
    with pytest.raises(InputError, match=r"holds an adapter.*model\.name=/models/base"):
        load(tmp_path, small.LM)


def test_weights_in_parts_are_all_there(tmp_path):
    small.make("llama").save_pretrained(tmp_path, max_shard_size="5KB")
    small.tokenizer().save_pretrained(tmp_path)
    load(tmp_path, small.LM)
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    parts[1].unlink()
    with pytest.raises(InputError, match=rf"lacks 1 of {len(parts)} weight files .*{parts[1].name}"):
        load(tmp_path, small.LM)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"intermediate_size": 32}])
def test_weights_of_another_size_are_not_filled_up_at_random(tmp_path, change):
    small.save("bert", tmp_path)
    set_in(tmp_path / "config.json", **change)
    with pytest.raises(InputError, match=r"model\.name: .*(do not cover|cannot load)"):
        load(tmp_path)


def test_a_pooler_without_weights_is_said(tmp_path, caplog):
    config = transformers.BertConfig(vocab_size=258, **SIZES)
    saved(tmp_path, transformers.BertForMaskedLM(config))
    caplog.set_level(logging.WARNING, "fedpeft")
    load(tmp_path, pooling="mean")
    assert "no weights for its pooler" not in caplog.text
    load(tmp_path, pooling="model")
    assert "no weights for its pooler" in caplog.text


def test_an_end_token_that_pads_is_said(tmp_path, caplog):
    small.save("llama", tmp_path)
    path = tmp_path / "tokenizer_config.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in found.items() if key != "pad_token"}))
    caplog.set_level(logging.INFO, "fedpeft")
    load(tmp_path, small.LM)
    assert "its end token <eos> pads" in caplog.text


@pytest.mark.parametrize(("name", "task"), [("llama", small.LM), ("bert", small.TEXT), ("gpt2", small.LM)])
def test_tokens_beyond_the_embedding_are_counted_and_named(tmp_path, name, task):
    tokenizer = embedded.byte_tokenizer()
    tokenizer.add_tokens(["<|call|>"])
    base = load(saved(tmp_path, small.make(name), tokenizer), task)
    within = encode(texts("plain words", "more"), base.processor, task, 32)
    agreement.require_records(base, within, "data.source")
    beyond = encode(texts("plain", "a <|call|> b", "<|call|>"), base.processor, task, 32)
    with pytest.raises(InputError, match=r"data\.source: 2 of 3 records .*'<\|call\|>' \(number 258; .* 258 .* 259"):
        agreement.require_records(base, beyond, "data.source")


@pytest.mark.parametrize("shape", [(12, 12, 1), (8, 8, 3)])
def test_pictures_of_another_size_or_with_other_channels_are_a_sentence(tmp_path, shape):
    base = load(small.save("vit", tmp_path), small.IMAGE)
    for size, fits in (((8, 8, 1), True), (shape, False)):
        pictures = np.zeros((2, *size), np.uint8)
        encoded = encode(Records(pictures, np.zeros(2, np.int64), ["a"], {}, "image"), None, small.IMAGE, 1)
        if fits:
            agreement.require_records(base, encoded, "data.source")
        else:
            with pytest.raises(InputError, match=r"data\.source: the model .* does not take the longest record"):
                agreement.require_records(base, encoded, "data.source")


def test_a_model_whose_answers_are_not_finite_is_refused():
    base = loading.load(ModelConfig(name="tiny-bert", task=small.TEXT), 2, 0)
    encoded = encode(texts("a", "b c"), base.processor, small.TEXT, 16)
    agreement.require_records(base, encoded, "data.source")
    with torch.no_grad():
        next(base.backbone.parameters())[:] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        agreement.require_records(base, encoded, "data.source")


@pytest.fixture
def records_of(tmp_path):
    """`records_of(data, model)`: what `site check` says of whether they agree."""

    def look(data, model):
        place = tmp_path / f"site-{len(list(tmp_path.iterdir()))}"
        missing = not data.exists()
        data.touch()
        site.init(place, "clinic", "localhost:1", None, str(data), str(model))
        if missing:
            data.unlink()
        found = {row["check"]: row for row in site.check(place)["checks"]}
        assert list(found) == ["policy", "keys", "data", "model", "records", "server", "clock"]
        return found["records"]

    return look


def test_a_site_hears_before_it_enrols_that_its_texts_do_not_fit(tmp_path, records_of):
    tokenizer, (good, bad) = embedded.byte_tokenizer(), (tmp_path / "good.csv", tmp_path / "bad.csv")
    tokenizer.add_tokens(["<|call|>"])
    good.write_text("text,label\nplain,a\nwords,b\n")
    bad.write_text("text,label\nplain,a\n<|call|> words,b\n")
    bert, llama = (saved(tmp_path / name, small.make(name), tokenizer) for name in ("bert", "llama"))
    assert records_of(good, bert)["ok"]
    for model in (bert, llama):
        row = records_of(bad, model)
        assert not row["ok"] and "site.data.source: 1 of 2 records have tokens that" in row["seen"]
    assert "tiny-vit is for image-classification" in records_of(good, "tiny-vit")["seen"]
    assert records_of(tmp_path / "none.csv", bert) == {
        "check": "records",
        "ok": False,
        "seen": "not checked: that takes data and a model",
    }


@pytest.mark.parametrize("shape", [(8, 8), (12, 12)])
def test_a_site_hears_before_it_enrols_that_its_pictures_do_not_fit(tmp_path, records_of, shape):
    small.save("vit", tmp_path / "vit")
    settings = tmp_path / "vit" / "preprocessor_config.json"
    set_in(settings, do_resize=False)
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        picture = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
        Image.fromarray(picture).save(tmp_path / "data" / label / "1.png")
    row = records_of(tmp_path / "data", tmp_path / "vit")
    assert row["ok"] == (shape == (8, 8)) and (row["ok"] or "does not take the longest record" in row["seen"])


@pytest.mark.parametrize("private", [False, True])
def test_a_private_site_keeps_it_to_itself_that_a_record_does_not_fit(tmp_path, private, caplog):
    tokenizer = embedded.byte_tokenizer()
    tokenizer.add_tokens(["<|call|>"])
    base = load(saved(tmp_path, small.make("bert"), tokenizer))
    here = SimpleNamespace(model=SimpleNamespace(base=base), guard=SimpleNamespace(private=private))
    require_fit(here, encode(texts("plain", "words"), base.processor, small.TEXT, 32))
    assert not caplog.text
    beyond = encode(texts("plain", "<|call|>"), base.processor, small.TEXT, 32)
    if private:
        require_fit(here, beyond)
        assert "the server is not told: data.source: 1 of 2 records" in caplog.text
    else:
        with pytest.raises(InputError, match=r"data\.source: 1 of 2 records"):
            require_fit(here, beyond)
