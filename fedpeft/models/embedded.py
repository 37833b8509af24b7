"""Base models that are made here, so that nothing is fetched; `tiny-vit` is a checkpoint that fedpeft comes with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedpeft import registry
from fedpeft.config import ModelConfig
from fedpeft.models.rates import DTYPES
from fedpeft.objectives.base import Objective, load_objective

ENCODERS = {  # heads that tiny-bert has
    "AutoModelForSequenceClassification": "BertForSequenceClassification",
    "AutoModelForTokenClassification": "BertForTokenClassification",
    "AutoModelForMaskedLM": "BertForMaskedLM",
}


def has_embedded(name: str, objective: Objective) -> bool:
    """Whether an embedded model has a form for an objective: tiny-bert has several heads, the others one."""
    own = load_objective(registry.EMBEDDED[name]).auto_class
    return objective.auto_class in (ENCODERS if own in ENCODERS else (own,))


def make_embedded(config: ModelConfig, labels: int) -> tuple[Any, Any, str]:
    """The model that a config names, its tokenizer or None, and what loads it again.

    Args:
        labels: outputs of its head, if it has one.
    """
    import transformers

    if config.name == "tiny-vit":
        folder = str(Path(__file__).parents[1] / "assets" / "tiny-vit")
        model = transformers.AutoModelForImageClassification.from_pretrained(
            folder, num_labels=labels, ignore_mismatched_sizes=True, dtype=DTYPES[config.dtype]
        )
        return model, None, folder
    tokenizer = byte_tokenizer()
    if load_objective(config.task).redrawn:
        tokenizer.add_special_tokens({"mask_token": "<mask>"})
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": max(config.max_length, 128),
        "pad_token_id": tokenizer.pad_token_id,
    }
    # Not from the run's seed: every run and every site has the same base.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if config.name == "tiny-llama":
            model = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**common, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
            )
        elif config.name == "tiny-t5":
            model = _tiny_t5(len(tokenizer), tokenizer)
        elif config.pooling == "mean":
            model = transformers.BertModel(transformers.BertConfig(**common))
        else:
            kind = getattr(transformers, ENCODERS[load_objective(config.task).auto_class])
            model = kind(transformers.BertConfig(**common, num_labels=labels))
    return model.to(DTYPES[config.dtype]), tokenizer, config.name


def _tiny_t5(words: int, tokenizer: Any) -> Any:
    """An encoder-decoder of two blocks each; T5 has no table of positions, so it takes texts of any length."""
    import transformers

    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=words,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are the 256 bytes, with padding and end marks; made here, so nothing is fetched."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        model_input_names=["input_ids", "attention_mask"],
    )
