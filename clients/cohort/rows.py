"""Values of many clients as the rows of a matrix [K, P]: filling it, and rows that leave."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def flatten_rows(states: list[dict[str, Tensor]], like: dict[str, Tensor]) -> Tensor:
    """Each state flattened to a row [K, P] of the device and dtype of `like`, smaller tensors padded with zeros."""
    first = next(iter(like.values()))
    matrix = torch.zeros(len(states), sum(value.numel() for value in like.values()), dtype=first.dtype)
    sizes = [value.numel() for value in like.values()]
    for row, state in zip(matrix, states, strict=True):
        for (key, value), part in zip(like.items(), row.split(sizes), strict=True):
            part.view(value.shape)[tuple(map(slice, state[key].shape))] = state[key]
    # Filled on the CPU first: one transfer, not one for each tensor of each client.
    return matrix.to(first.device)


def frozen_parameter(values: list[Tensor], like: Tensor) -> tuple[Tensor, bool]:
    """A parameter that does not train: [...] and False if all clients have the same, else [K, ...] and True."""
    first = values[0]
    if all(value is first or (value.shape == first.shape and torch.equal(value, first)) for value in values):
        return flatten_rows([{"": first}], {"": like}).view(like.shape), False
    return flatten_rows([{"": value} for value in values], {"": like}).view(-1, *like.shape), True


def shrink_optimizer(optimizer: torch.optim.Optimizer, weights: nn.Parameter, rows: int) -> None:
    """Leave only the first rows to the optimizer, with its moments of them."""
    if len(weights) > rows:
        # The same Parameter with fewer rows, as the optimizer finds its moments by it.
        weights.data = weights.data[:rows]
        state = optimizer.state[weights]
        # AdamW's count of steps has no rows.
        state |= {name: value[:rows] for name, value in state.items() if torch.is_tensor(value) and value.ndim}
