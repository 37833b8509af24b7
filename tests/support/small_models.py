"""Base models of a few thousand weights, one per architecture, saved as local checkpoints."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor

from fedpeft import seeds
from fedpeft.adapters.adapted import Adapted, build
from fedpeft.config import AdapterConfig, ModelConfig
from fedpeft.data.encode import Encoded
from fedpeft.models.embedded import byte_tokenizer
from fedpeft.objectives.base import IGNORE
from fedpeft.state import AdapterState

WIDTH, LABELS, POSITIONS = 16, 3, 130
SPREAD = 0.2  # of the weights: a change of one is seen in the logits
TEXT, LM, IMAGE = "sequence-classification", "causal-lm", "image-classification"
# name -> task, and the modules that get a LoRA when none are named
KINDS = {
    "bert": (TEXT, {"query", "value"}),
    "roberta": (TEXT, {"query", "value"}),
    "distilbert": (TEXT, {"q_lin", "v_lin"}),
    "vit": (IMAGE, {"q_proj", "v_proj"}),
    "llama": (LM, {"q_proj", "v_proj"}),
    "gpt2": (LM, {"c_attn"}),
}
# The heads of the classifiers: parameters trained beside the adapter.
HEADS = {
    "bert": {"classifier/weight", "classifier/bias"},
    "roberta": {f"classifier.{layer}/{role}" for layer in ("dense", "out_proj") for role in ("weight", "bias")},
    "distilbert": {f"{layer}/{role}" for layer in ("pre_classifier", "classifier") for role in ("weight", "bias")},
    "vit": {"classifier/weight", "classifier/bias"},
    "llama": set(),
    "gpt2": set(),
}


@cache
def tokenizer() -> Any:
    return byte_tokenizer()


@cache
def masking_tokenizer() -> Any:
    made = byte_tokenizer()
    made.add_special_tokens({"mask_token": "<mask>"})
    return made


def make(name: str, seed: int = 0, whole: bool = True) -> Any:
    """A random model; its trunk alone unless `whole`."""
    torch.manual_seed(seed)
    common = {
        "vocab_size": len(tokenizer()),
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 0,
        "num_labels": LABELS,
        "initializer_range": SPREAD,
    }
    if name in ("bert", "roberta"):
        stem = {"bert": "Bert", "roberta": "Roberta"}[name]
        config = getattr(transformers, f"{stem}Config")(**common)
        return getattr(transformers, f"{stem}ForSequenceClassification" if whole else f"{stem}Model")(config)
    if name == "bert-mlm":
        own = {"vocab_size": len(masking_tokenizer()), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return transformers.BertForMaskedLM(transformers.BertConfig(**common | own))
    if name == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=len(tokenizer()),
            dim=WIDTH,
            hidden_dim=24,
            n_layers=2,
            n_heads=2,
            max_position_embeddings=POSITIONS,
            pad_token_id=0,
            num_labels=LABELS,
            initializer_range=SPREAD,
        )
        return (transformers.DistilBertForSequenceClassification if whole else transformers.DistilBertModel)(config)
    if name == "vit":
        config = transformers.ViTConfig(
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            num_channels=1,
            num_labels=LABELS,
            initializer_range=SPREAD,
        )
        return (transformers.ViTForImageClassification if whole else transformers.ViTModel)(config)
    if name in ("t5", "bart"):
        return _encoder_decoder(name)
    if name == "llama":
        return (transformers.LlamaForCausalLM if whole else transformers.LlamaModel)(transformers.LlamaConfig(**common))
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer()),
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        n_positions=POSITIONS,
        bos_token_id=1,
        eos_token_id=1,
        initializer_range=SPREAD,
    )
    return (transformers.GPT2LMHeadModel if whole else transformers.GPT2Model)(config)


def _encoder_decoder(name: str) -> Any:
    """Without dropout; T5 takes texts of any length, BART has a table of positions."""
    common = {"vocab_size": len(tokenizer()), "d_model": WIDTH, "pad_token_id": 0, "eos_token_id": 1}
    if name == "t5":
        own = {"d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0, "initializer_factor": 1.0}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**common, **own, decoder_start_token_id=0))
    halves = {
        f"{half}_{key}": value
        for half in ("encoder", "decoder")
        for key, value in {"layers": 2, "attention_heads": 2, "ffn_dim": 24}.items()
    }
    config = transformers.BartConfig(
        **common,
        **halves,
        dropout=0.0,
        bos_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
        max_position_embeddings=POSITIONS,
        init_std=SPREAD,
    )
    return transformers.BartForConditionalGeneration(config)


def save(name: str, folder: Path, seed: int = 0, whole: bool = True) -> Path:
    """A checkpoint folder with what goes with it."""
    make(name, seed, whole).save_pretrained(folder)
    if name == "vit":
        size = {"height": 8, "width": 8}
        transformers.ViTImageProcessorPil(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(folder)
    else:
        (masking_tokenizer() if name == "bert-mlm" else tokenizer()).save_pretrained(folder)
    return folder


def save_wide(name: str, folder: Path) -> Path:
    """As `save`, with layers that are wide beside an adapter of rank 1."""
    with mock.patch.dict(globals(), WIDTH=128):
        return save(name, folder)


def adapted(
    folder: Path | str,
    name: str,
    model: dict[str, Any] | None = None,
    seed: int = 0,
    method: str = "lora",
    **adapter: Any,
) -> Adapted:
    """The saved model with an adapter."""
    config = ModelConfig(name=str(folder), task=KINDS[name][0], **(model or {}))
    return build(config, AdapterConfig(name=method, **adapter), LABELS, seed)


def inputs(name: str) -> dict[str, Tensor]:
    """A batch of three, the texts of unequal length."""
    if name == "vit":
        return {"pixel_values": torch.linspace(-1, 1, 3 * 64).reshape(3, 1, 8, 8)}
    ids = torch.tensor([[70, 71, 72, 73], [90, 80, 0, 0], [5, 6, 7, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def randomised(model: Adapted, seed: int = 1, scale: float = 0.1) -> AdapterState:
    """A state with every tensor drawn anew, so that no factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    return model.state().map(lambda value: scale * torch.randn(value.shape, generator=generator))


def dense(state: AdapterState, site: str) -> Tensor:
    """What the state adds to the site's weight [out, in], in float64."""
    change = state[f"{site}/B"].double()
    if f"{site}/R" in state:
        change = change @ state[f"{site}/R"].double()
    change = state.sites[site].scaling * change @ state[f"{site}/A"].double()
    if f"{site}/residual_B" in state:
        change = change + state[f"{site}/residual_B"].double() @ state[f"{site}/residual_A"].double()
    return change


def merged_by_hand(name: str, state: AdapterState) -> Any:
    """The bare transformers model with every change added to its weights, and the head put in."""
    model = make(name).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in state.tensors.items():
            if state.role(key) == "head":
                parameters[key.replace("/", ".")].copy_(value)
        for site in state.lora_sites():
            weight = parameters[f"{site}.weight"]
            change = dense(state, site).float()
            weight += change.T if type(model.get_submodule(site)).__name__ == "Conv1D" else change
    return model


def with_residual(state: AdapterState, seed: int = 5, rank: int = 3) -> AdapterState:
    """The state and a random change of every base weight."""
    generator = torch.Generator().manual_seed(seed)
    new = {}
    for site in state.lora_sites():
        out, width = state.sites[site].shape
        new[f"{site}/residual_B"] = torch.randn(out, rank, generator=generator) * 0.3
        new[f"{site}/residual_A"] = torch.randn(rank, width, generator=generator) * 0.3
    return state.replace(new)


def texts(count: int = 10, causal: bool = False, seed: int = 0) -> Encoded:
    """Random byte texts of 2 to 7 tokens, padded on the right."""
    draw = seeds.torch_generator(seed, "texts")
    lengths = torch.randint(2, 8, (count,), generator=draw)
    mask = (torch.arange(7)[None] < lengths[:, None]).long()
    ids = torch.randint(2, 258, (count, 7), generator=draw) * mask
    labels = ids.masked_fill(mask == 0, IGNORE) if causal else torch.randint(0, LABELS, (count,), generator=draw)
    return Encoded({"input_ids": ids, "attention_mask": mask}, labels)


def offsets(model: Adapted, seed: int = 4, scale: float = 0.05) -> dict[str, Tensor]:
    """Something to add to every gradient."""
    draw = seeds.torch_generator(seed, "control")
    return {key: scale * torch.randn(value.shape, generator=draw) for key, value in model.form.tensors.items()}
