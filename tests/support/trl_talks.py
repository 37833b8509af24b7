"""What is given to TRL and to us: conversations, pairs, and a model whose weights hang on no draw."""

from __future__ import annotations

from typing import Any

import torch

from support import chat

ONE = [("user", "What is the capital of Denmark?"), ("assistant", "The capital is Copenhagen.")]
SYSTEM = [("system", "Be brief."), *ONE]
TWO = [
    *ONE,
    ("user", "And how many\npeople live there ?"),
    ("assistant", "About 650 thousand: 'åé😀', with the islands."),
]
LAST = [*TWO, ("user", "Thank you.")]
SPACES = [("user", "  What is it?\n"), ("assistant", " I am well,\n thank you.  ")]
TALKS = [ONE, SYSTEM, TWO, LAST, SPACES]
BAD = ("assistant", "I am Copenhagen, thank you. Be well.")
BETA = 0.3
RANK, ALPHA, TARGETS = 2, 4, ["q_proj", "v_proj"]


def talks_of(kind: str) -> list[list[tuple[str, str]]]:
    """Gemma's template takes no system turn."""
    return [turns for turns in TALKS if kind != "gemma" or turns[0][0] != "system"]


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def rows_of(kind: str, form: str) -> list[dict[str, Any]]:
    """Records: whole conversations, or what is asked beside what is answered last; and pairs of such answers."""
    talks = talks_of(kind)
    if form == "messages":
        return [{"messages": messages(turns)} for turns in talks]
    ended = [turns for turns in talks if turns[-1][0] == "assistant"]
    if form == "completion":
        return [{"prompt": messages(turns[:-1]), "completion": messages(turns[-1:])} for turns in ended]
    return [
        {"prompt": messages(turns[:-1]), "chosen": messages(turns[-1:]), "rejected": messages([BAD])} for turns in ended
    ]


FORMS = ("messages", "completion", "preference")


def make_model(kind: str, merges: list[str]) -> Any:
    """A Llama of two layers, float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = chat.fixed_tokenizer(kind, merges)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for place, (name, value) in enumerate(model.named_parameters()):
        value.data.copy_(_waves(value.shape, place + 1) * 0.3 + ("norm" in name))
    return model.double()


@torch.no_grad()
def set_factors(model: Any) -> list[Any]:
    """Give all factors of an adapter values, one layer after another; the factors."""
    layers = [module for _, module in sorted(model.named_modules()) if hasattr(module, "lora_A")]
    factors = [part["default"].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]
    for place, value in enumerate(factors):
        value.data = _waves(value.shape, 50 + place) * 0.5
    return factors


def _waves(shape: torch.Size, number: int) -> torch.Tensor:
    """Values in float32, which a checkpoint keeps."""
    places = torch.arange(shape.numel(), dtype=torch.float64)
    return (places * (0.37 + 0.011 * number) + number).sin().view(shape).float().double()


def norms_of(loss: Any, factors: list[Any]) -> list[float]:
    """Of the gradients of a loss, factor by factor."""
    return [float(slope.norm()) for slope in torch.autograd.grad(loss, factors)]
