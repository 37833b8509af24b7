"""Runs over a quantised base: the same bits again, over workers and resumed; private; exported to stock peft."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from fedpeft import config as configs
from fedpeft.adapters import folder
from fedpeft.models.embedded import byte_tokenizer
from fedpeft.models.quantized import loading_settings
from fedpeft.run.world import load_world
from fedpeft.simulations import run as runs
from support import small_models as small

PRIVATE = {"privacy.unit": "sample", "privacy.noise_multiplier": 0.5, "strategy.weighting": "uniform"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return small.save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A file with 24 short texts."""
    path = tmp_path_factory.mktemp("data") / "letters.jsonl"
    path.write_text("".join(json.dumps({"text": f"patient {place} is well"}) + "\n" for place in range(24)))
    return path


@pytest.fixture
def few_bits(checkpoint, letters):
    """`few_bits(strategy, ...)`: a config over a small Llama in NF4."""

    def config(strategy="fedsvd", **more):
        return {
            "model.name": str(checkpoint),
            "model.task": "causal-lm",
            "model.max_length": 24,
            "model.quantization": "nf4",
            "data.source": str(letters),
            "data.clients": 2,
            "strategy": strategy,
            "client.lr": 0.05,
            **more,
        }

    return config


def adapter(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_resumed_run_and_one_of_workers_have_the_same_bits(few_bits, tiny, interrupted, forked, tmp_path):
    config = few_bits(**{"run.cohort_tokens": 0})  # as the shares of two processes are other cohorts
    tiny("whole", config)
    interrupted("broken", config)
    runs.resume(tmp_path / "broken")
    tiny("spread", {**config, "run.workers": 2})
    assert any(value.any() for key, value in adapter(tmp_path / "whole").items() if "lora_B" in key)
    for name in ("broken", "spread"):
        assert same(adapter(tmp_path / "whole"), adapter(tmp_path / name)), name
    tiny("int8", {**config, "model.quantization": "int8"})
    assert not same(adapter(tmp_path / "whole"), adapter(tmp_path / "int8"))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_private_run_over_it_verifies_and_ends(few_bits, tiny, tmp_path, kind):
    summary = tiny("run", few_bits("fedit", **PRIVATE, **{"model.quantization": kind, "run.rounds": 1}))
    assert summary["rounds"] == 1 and (tmp_path / "run" / "ledger").is_dir()
    assert any(value.any() for key, value in adapter(tmp_path / "run").items() if "lora_B" in key)


def test_the_export_says_the_same_over_the_same_base_in_stock_peft(few_bits, tiny, fedpeft, tmp_path, caplog):
    # Rows of whole blocks: of others, bitsandbytes' own dequantised weights are wrong on processors with AVX512.
    checkpoint = tmp_path / "wide"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(checkpoint)
    torch.manual_seed(0)
    small_llama = transformers.LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes)
    transformers.LlamaForCausalLM(small_llama).save_pretrained(checkpoint)
    tiny("run", few_bits("fedit", **{"model.name": str(checkpoint)}))
    run = tmp_path / "run"
    here = load_world(configs.load(run / "resolved.yaml"), run)
    here.local.model.write(folder.load(run / "adapter"))
    here.local.model.base.backbone.eval()
    batch, _ = here.test_encoded.batch(range(6))
    with torch.no_grad():
        wanted = here.local.model.logits(batch)
    done = fedpeft("export", run, "--to", tmp_path / "adapter")
    assert done.code == 0 and "kept as nf4: load it so" in caplog.text
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "bitsandbytes keeps it in nf4: load it so" in card and "has not answered before" in card
    kind = transformers.AutoModelForCausalLM
    base = kind.from_pretrained(checkpoint, **loading_settings("nf4"))
    stock = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").train()  # without dropout; see models.quantized
    with torch.no_grad():
        torch.testing.assert_close(stock(**batch).logits, wanted, atol=1e-4, rtol=1e-4)
        plain = peft.PeftModel.from_pretrained(kind.from_pretrained(checkpoint), tmp_path / "adapter")
        assert (plain(**batch).logits - wanted).abs().max() > 0.01  # another base: what the sentence is for
    done = fedpeft("export", run, "--to", tmp_path / "merged", "--merge")
    assert done.code == 0 and "merged into its dequantised weights" in caplog.text
    assert "bitsandbytes keeps it" not in (tmp_path / "merged" / "README.md").read_text()
    merged = kind.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.to_dict().get("quantization_config") is None and merged.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, wanted, atol=1e-4, rtol=1e-4)


def test_predictions_are_those_over_the_quantised_base(few_bits, tiny, fedpeft, tmp_path):
    tiny("run", few_bits("fedit", **{"run.rounds": 1}))
    (tmp_path / "new.jsonl").write_text(json.dumps({"text": "Return the"}) + "\n")
    done = fedpeft(
        "predict", tmp_path / "run", "--data", tmp_path / "new.jsonl", "--out", tmp_path / "o.jsonl", "--json"
    )
    assert done.code == 0, done.err
    assert done.json["records"] == 1
    done = fedpeft(
        "predict", tmp_path / "run", "--data", tmp_path / "new.jsonl", "--out", "x.csv", "model.quantization=int8"
    )
    assert done.code == 2 and "another base model lies there" in done.err
