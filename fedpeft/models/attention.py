"""Attention of short inputs as batched products: on processors, torch's fused form is slow in bfloat16.

    S = scaling Q K^T + mask,   o = softmax(S) V        all [N, heads, T, .]; S is rounded to bfloat16

The fused form never holds S, which makes it the fastest where T is long or the dtype float32. Its backward pass in
bfloat16, though, takes up to nine times that of these products for T = 64. Up to which T the products are faster is
timed (`longest_faster`) by a run with `model.dtype=auto` on a processor; longer inputs, every other dtype, and what the
products do not know (biases of positions) keep the fused form. The two are equal but for rounding.

    >>> import torch
    >>> q, k, v = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 3, 2), torch.tensor([[[[0.0], [3.0], [9.0]]]])
    >>> attend(q, k, v, torch.tensor([True, True, False]), 1.0, 0.0).item()
    1.5
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

log = logging.getLogger("fedpeft")
LENGTHS = (64, 128, 256, 512)  # tokens that are tried, in this order, until the products are no longer faster
SCORES = 2**18  # of one timing, N T T
REPEATS = 2
WIDTH = 64  # of a head of nearly all models


def hold_scores(model: Any, longest: int) -> None:
    """Let a transformers model compute attention over at most `longest` tokens as batched products; 0 changes nothing.

    A model whose attention is not the fused form of transformers' registry stays as it is, which is logged.
    """
    own = getattr(model.config, "_attn_implementation", None)
    if not longest:
        return
    if own != "sdpa":
        log.info(
            "model.batched_attention=%d: without effect, as the model's attention is '%s', not 'sdpa'", longest, own
        )
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    name = f"fedpeft_short_{longest}"
    AttentionInterface.register(name, partial(_attend_module, longest))
    AttentionMaskInterface.register(name, sdpa_mask)
    model.config._attn_implementation = name


def longest_faster() -> int:
    """The longest input, in tokens, whose attention in bfloat16 this processor computes faster as batched products.

    Returns:
        One of `LENGTHS`, or 0. Forward and backward pass together are timed, in some 0.2 s.
    """
    longest = 0
    for length in LENGTHS:
        shape = (SCORES // length**2, 1, length, WIDTH)
        parts = [torch.ones(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        turns = [(seconds(_attend_fused, parts), seconds(_attend_products, parts)) for _ in range(REPEATS)]
        fused, products = (min(times) for times in zip(*turns, strict=True))
        if products >= fused:
            break
        longest = length
    return longest


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float) -> Tensor:
    """Attention as three steps, [N, heads, T, d].

    Args:
        query, key, value: [N, heads, T, d].
        mask: what is added to the scores, or (bool) which tokens are seen; it broadcasts to [N, heads, T, T].
    """
    scores = query @ key.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1)
    return functional.dropout(weights, dropout) @ value if dropout else weights @ value


def _attend_module(
    longest: int,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """transformers' form of an attention function: heads in dimension 1, the output [N, T, heads, d]."""
    own = query.dtype == torch.bfloat16 and max(query.shape[2], key.shape[2]) <= longest
    if not own or any(other.get(name) is not None for name in ("position_bias", "softcap")):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **other
        )
    shares = query.shape[1] // key.shape[1]  # query heads that share a key head
    if shares > 1:
        key, value = key.repeat_interleave(shares, dim=1), value.repeat_interleave(shares, dim=1)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and query.shape[2] > 1:
        square = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        attention_mask = square.tril()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, attention_mask, scaling, dropout).transpose(1, 2).contiguous(), None


def _attend_fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value)


def _attend_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend(query, key, value, None, query.shape[-1] ** -0.5, 0.0)


def seconds(form: Callable[..., Tensor], parts: Sequence[Tensor]) -> float:
    """Of the CPU for one forward and backward pass of an attention."""
    begun = time.process_time()  # other work on the machine would turn a clock's answer
    torch.autograd.grad(form(*parts).sum(), parts)
    return time.process_time() - begun
