"""Leave out of a pass what cannot reach the logits: in most classifiers, most of the last block.

The heads of BERT, RoBERTa, DistilBERT and ViT read one token, the first. Once the last attention has mixed the tokens,
each of them goes alone through a projection, norms and the feed-forward layers, so all tokens but the first go through
them for nothing: 3/4 of one block, forward and backward. Inputs of those layers are cut to the first token; logits and
gradients stay what they were, to rounding.

Which layers these are is found, not listed by architecture: those whose input has, at every token but the first, no
influence on the logits of a random batch. Models whose head reads more (mean pooling, causal-lm) have none.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft.adapters.adapted import Adapted
from fedpeft.adapters.grouped import OwnLayer
from fedpeft.data.encode import Encoded

log = logging.getLogger("fedpeft")
REFUSALS = (RuntimeError, IndexError, ValueError)  # of a model that gets what it was not made for


@contextmanager
def first_token(model: Adapted, data: Encoded) -> Iterator[None]:
    """Run the model without what its logits do not depend on.

    Args:
        data: records to take the names and shapes of the inputs from.
    """
    if model.tail is None and not model.base.objective.headed:
        model.tail = []  # every token has scores
    elif model.tail is None:
        # One by one, as batch norms may be in evaluation mode while the rest trains.
        training = [module for module in model.base.backbone.modules() if module.training]
        model.base.backbone.eval()
        try:
            model.tail = find_tail(model, data)
        finally:
            for module in training:
                module.training = True
    handles = [module.register_forward_pre_hook(_cut_queries) for module in model.tail]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.enable_grad()
def find_tail(model: Adapted, data: Encoded) -> list[nn.Module]:
    """The layers that need only the first token of their input [N, T, width]; in evaluation mode."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inputs = _draw_inputs(model, data)
    seen: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not torch.is_tensor(args[0]) or args[0].ndim != 3 or args[0].shape[1] == 1:
            return None
        # A view of its own for each layer: several read one tensor, and its gradient is the sum of theirs.
        x = args[0].view_as(args[0]) if args[0].requires_grad else args[0].detach().requires_grad_()
        seen.append((module, x))
        return (x, *args[1:])

    kinds = (nn.Linear, nn.LayerNorm, BaseTunerLayer, OwnLayer)
    alone = [module for root in model.base.modules for module in root.modules() if isinstance(module, kinds)]
    inside = {part for module in alone for part in module.modules() if part is not module}  # parts of adapters' layers
    handles = [module.register_forward_pre_hook(note) for module in alone if module not in inside]
    try:
        logits = model.base.forward(inputs)
    except REFUSALS as error:
        log.warning("the last block runs for all tokens: the model does not take random inputs (%s)", error)
        return []
    finally:
        for handle in handles:
            handle.remove()
    if not seen or not logits.requires_grad:
        return []
    # Random weights: a plain sum of scores may have no gradient where a softmax or a norm comes last.
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
    slopes = torch.autograd.grad((logits * weights).sum(), [x for _, x in seen], allow_unused=True)
    found = [
        module
        for (module, _), slope in zip(seen, slopes, strict=True)
        if slope is not None and bool(slope[:, :1].any()) and not bool(slope[:, 1:].any())
    ]
    found = [
        module for module in found if _says_the_same(model, inputs, logits, [module])
    ]  # not the last queries: see `_says_the_same`
    return found if _says_the_same(model, inputs, logits, found) else []


def _says_the_same(model: Adapted, inputs: dict[str, Tensor], logits: Tensor, found: list[nn.Module]) -> bool:
    """Whether the model runs with these inputs cut, and says the same: attention wants as many queries as keys."""
    handles = [module.register_forward_pre_hook(_cut_queries) for module in found]
    try:
        with torch.no_grad():
            cut = model.base.forward(inputs)
    except REFUSALS:  # what comes after wants all tokens
        return False
    finally:
        for handle in handles:
            handle.remove()
    dtypes = {value.dtype for value in model.base.backbone.parameters() if value.is_floating_point()}
    rounding = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
    return cut.shape == logits.shape and bool((cut - logits).abs().max() <= rounding * logits.abs().max())


def _cut_queries(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0][:, :1], *args[1:])


def _draw_inputs(model: Adapted, data: Encoded) -> dict[str, Tensor]:
    """Two samples with the names and shapes of these records, texts without padding; no record is looked at."""
    device = next(iter(model.parameters.values())).device
    generator = torch.Generator().manual_seed(0)
    words = int(getattr(getattr(model.base.backbone, "config", None), "vocab_size", 2))
    made = {}
    for name, value in data.view(np.arange(0)).inputs.items():
        shape = (2, *value.shape[1:])
        if value.is_floating_point():
            made[name] = torch.randn(shape, generator=generator).to(value.dtype)
        elif name == "input_ids":
            made[name] = torch.randint(1, words, shape, generator=generator)
        else:
            made[name] = torch.full(shape, int(name == "attention_mask"))
    return {name: value.to(device) for name, value in made.items()}
