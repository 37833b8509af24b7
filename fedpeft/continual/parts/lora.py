"""Bodies with a LoRA for each task draw a pair here, put it by, and sum what was put by.

A pair is A [r, in], Kaiming-uniform, and B [out, r], zero: it starts as no change of the layer's weight. What trains is
in `parameters` as `layer/A` and `layer/B`; earlier tasks are in `memory["adapters"]` as `past/task/layer/A` and `/B`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedpeft.continual.body import Body, make_leaf
from fedpeft.continual.model import Change, Patch, add_dense, low_rank, sum_changes


def draw_A(width: int, r: int, generator: torch.Generator) -> Tensor:
    """Kaiming-uniform A [r, width], as peft draws it."""
    return (2 * torch.rand(r, width, generator=generator) - 1) / math.sqrt(width)


def begin(body: Body, r: int, *path: str | int) -> None:
    """A fresh pair of rank r in `parameters` for every layer; `path` names the draw."""
    for layer in body.model.layers:
        m, n = body.model.base.shape(layer)
        body.parameters[f"{layer}/A"] = make_leaf(draw_A(n, r, body.generator("A", layer, *path)))
        body.parameters[f"{layer}/B"] = make_leaf(torch.zeros(m, r))


def put_by(body: Body) -> None:
    """Copy the pairs of the task before this one to the past; nothing before the first task."""
    for layer in body.model.layers if body.index else ():
        for role in ("A", "B"):
            key = f"{layer}/{role}"
            body.memory["adapters"][f"past/{body.index - 1}/{key}"] = body.parameters[key].detach().clone()


def past(body: Body, layer: str) -> list[tuple[Tensor, Tensor]]:
    """(B, A) of the layer for every task that was put by, oldest first."""
    kept = body.memory["adapters"]
    return [(kept[f"past/{task}/{layer}/B"], kept[f"past/{task}/{layer}/A"]) for task in range(body.index)]


def side_by_side(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One pair [B_1 ... B_k], [A_1; ...; A_k] whose product is the sum of the pairs' products."""
    return torch.cat([B for B, _ in pairs], dim=1), torch.cat([A for _, A in pairs])


def sum_tasks(body: Body, scale: float) -> Change:
    """W -> W + scale times the sum of B A over all tasks, those that were put by and the one that trains.

    What was put by stays side by side while that is less work than the sum of its products, which is one matrix
    [out, in]: from there on the hundredth task costs what the tenth does.
    """
    patches: dict[str, Patch] = {}
    for layer in body.model.layers:
        # Once a task, within which the past stays as it is.
        if body.joined.get(layer, (None,))[0] != body.index:
            body.joined[layer] = body.index, _join_pairs(past(body, layer))
        joined = body.joined[layer][1]
        pairs = [(body.parameters[f"{layer}/B"], body.parameters[f"{layer}/A"])] if body.parameters else []
        changes = [{layer: add_dense(scale * joined)}] if isinstance(joined, Tensor) else []
        pairs = [joined, *pairs] if isinstance(joined, tuple) else pairs
        changes += [{layer: low_rank(*side_by_side(pairs), scale)}] if pairs else []
        patches |= sum_changes(*changes)
    return patches


def _join_pairs(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | Tensor | None:
    """One pair, or the product [out, in] where it is less work to multiply with; None of none."""
    if not pairs:
        return None
    B, A = side_by_side(pairs)
    if B.numel() + A.numel() <= len(B) * A.shape[1]:
        return B, A
    return (B.double() @ A.double()).to(A.dtype)


def sum_overlap(A: Tensor, pairs: list[tuple[Tensor, Tensor]], weights: Tensor | None = None) -> Tensor:
    """sum over earlier pairs i of weights_i |A A_i^T|, entries summed: zero where all rows are orthogonal."""
    each = torch.stack([(A @ old.T).abs().sum() for _, old in pairs])
    return each.sum() if weights is None else (weights * each).sum()
