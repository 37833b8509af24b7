"""Prefixes in a base's attention, through transformers' registry of attention functions, with LAE's speed calibration.

Gao et al., arXiv 2303.10070. P learned keys K and values V, [P, heads * d] each, join every row of an attention. With
a = softmax([q k^T, q K^T] scaling) and l = the sum of a over the prefix columns, the prefix columns are divided by l:

    o = sum_tokens a v + sum_prefix (a / l) V     so the prefix has mass 1 in each row, and rows sum to 2 - l

which makes a prefix act, and learn, like an adapter beside the attention instead of being drowned by its softmax.

A model's config names its attention function. The query projection's patch puts ours there, with the prefix for it; it
puts the old name back when it is called, and the attention's own patch checks that it was.

    >>> import torch
    >>> q, k, v = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 3, 2), torch.ones(1, 1, 3, 2)   # one head, 3 tokens
    >>> K, V = torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1, 2), 10.0)
    >>> attend_calibrated(q, k, v, K, V, None, 1.0).flatten().tolist()
    [10.75, 10.75]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedpeft.continual.model import Patch, Plastic
from fedpeft.errors import InputError
from fedpeft.models.targets import ATTENTION

NAME = "fedpeft_prefix"
SMALLEST = 1e-12  # prefix mass that is still divided by
SEPARATE = {"q_proj": "k_proj", "query": "key", "q_lin": "k_lin"}  # query projection -> key projection


def find_attentions(model: Plastic, body: str) -> dict[str, str]:
    """Attention module -> its query projection, for every attention that has an adapted layer directly in it.

    Raises:
        InputError: there is none; `body` is named in the message.
    """
    queries = {group[0] for group in ATTENTION}
    found = {}
    for parent in sorted({layer.rpartition(".")[0] for layer in model.layers}):
        inside = [name for name, _ in model.base.layer(parent).named_children() if name in queries]
        if parent and inside:
            found[parent] = f"{parent}.{inside[0]}"
    if not found:
        raise InputError(
            f"{body}: none of the adapted layers ({', '.join(model.layers[:3])}, ...) is in an attention "
            "module with a query projection of a known name. Use form=lora, or adapt attention layers."
        )
    return found


def add_prefix(model: Plastic, attention: str, query: str, K: Tensor, V: Tensor) -> dict[str, Patch]:
    """The change that gives an attention a prefix K, V [P, heads * d].

    Raises (when it runs):
        InputError: the module does not take its attention function from transformers' registry.
    """
    module: Any = model.base.layer(attention)
    waiting: list[str] = []

    def arm(x: Tensor, y: Tensor) -> Tensor:
        _register_attention()
        # The config is shared by all layers: what stood there has to be back before the next one runs.
        waiting.append(module.config._attn_implementation)
        module.config._attn_implementation = NAME
        module._fedpeft_prefix = (K, V, waiting)
        return y

    def check(x: Tensor, y: Tensor) -> Tensor:
        if waiting:
            _restore_attention(module, waiting)
            raise InputError(
                f"{attention}: {type(module).__name__} does not take its attention from transformers' "
                "registry, so it can have no prefix. Use form=lora or form=adapter."
            )
        return y

    return {query: arm, attention: check}


def key_width(model: Plastic, attention: str, query: str) -> int:
    """Size heads * d of the attention's keys.

    Raises:
        InputError: queries and keys have no projections of their own.
    """
    *parents, name = query.split(".")
    if name not in SEPARATE or not hasattr(model.base.layer(attention), "config"):
        raise InputError(
            f"{attention}: a prefix needs separate query and key projections "
            f"({', '.join(SEPARATE)}); found '{name}'. Use form=lora or form=adapter."
        )
    return model.base.shape(".".join([*parents, SEPARATE[name]]))[0]


def attend_calibrated(
    query: Tensor, key: Tensor, value: Tensor, K: Tensor, V: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """Attention with a calibrated prefix, [N, heads, T, d].

    Args:
        query, key, value: [N, heads, T, d].
        K, V: the prefix, [1, heads, P, d].
        mask: what is added to the scores of tokens, or (bool) which tokens are seen; it broadcasts to [N, heads, T, T].
    """
    scores = query @ key.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    own = query @ K.transpose(2, 3) * scaling
    weights = torch.cat([scores, own], dim=-1).float().softmax(-1)
    tokens, prefix = weights.split([scores.shape[-1], own.shape[-1]], dim=-1)
    # The calibration: without it tokens, which are many, leave a prefix hardly any mass, and so no gradient.
    prefix = prefix / prefix.sum(-1, keepdim=True).clamp(min=SMALLEST)
    done: Tensor = tokens @ value.float() + prefix @ V.float()
    return done.to(query.dtype)


def _register_attention() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend_prefixed)


def _attend_prefixed(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """transformers' form of an attention function: heads in dimension 1, the output [N, T, heads, d]."""
    K, V, waiting = module._fedpeft_prefix
    _restore_attention(module, waiting)
    shares = query.shape[1] // key.shape[1]  # query heads that share a key head

    def heads(value: Tensor) -> Tensor:
        return value.repeat_interleave(shares, dim=1) if shares > 1 else value

    own = [heads(part.unflatten(1, (key.shape[1], -1)).transpose(0, 1)[None].to(query.dtype)) for part in (K, V)]
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if attention_mask is None and causal:
        length = query.shape[2]
        attention_mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    done = attend_calibrated(query, heads(key), heads(value), own[0], own[1], attention_mask, scaling)
    return done.transpose(1, 2).contiguous(), None


def _restore_attention(module: Any, waiting: list[str]) -> None:
    module.config._attn_implementation = waiting.pop()
    del module._fedpeft_prefix
