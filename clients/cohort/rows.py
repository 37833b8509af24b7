"""Values of many clients as the rows of a matrix [K, P]: filling it, summing into it, and rows that leave."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedpeft.privacy.plan import clip_factors


def rows(states: list[dict[str, Tensor]], like: dict[str, Tensor]) -> Tensor:
    """Each state flattened to a row [K, P] of the device and dtype of `like`, smaller tensors padded with zeros."""
    first = next(iter(like.values()))
    matrix = torch.zeros(len(states), sum(value.numel() for value in like.values()), dtype=first.dtype)
    sizes = [value.numel() for value in like.values()]
    for row, state in zip(matrix, states, strict=True):
        for (key, value), part in zip(like.items(), row.split(sizes), strict=True):
            part.view(value.shape)[tuple(map(slice, state[key].shape))] = state[key]
    return matrix.to(first.device)


def frozen(values: list[Tensor], like: Tensor) -> tuple[Tensor, bool]:
    """A parameter that does not train: [...] and False if all clients have the same, else [K, ...] and True."""
    first = values[0]
    if all(value is first or (value.shape == first.shape and torch.equal(value, first)) for value in values):
        return rows([{"": first}], {"": like}).view(like.shape), False
    return rows([{"": value} for value in values], {"": like}).view(-1, *like.shape), True


def add_clipped(total: Tensor, slopes: list[Tensor], losses: Tensor, clients: Tensor, clips: Tensor) -> None:
    """Add to each client's row [K, P] its samples' gradients, parameter by parameter [N, ...], clipped as in
    `Plan.clipped_sum`: in the norm over all parameters, zero where a gradient or a loss [N] is not finite.
    """
    parts = [slope.flatten(1) for slope in slopes]
    each = torch.stack([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in parts])
    factors = clip_factors(torch.linalg.vector_norm(each, dim=0), clips[clients], losses).to(total)
    mix = total.new_zeros(len(total), len(clients))  # a product with it is the sum of each client's samples
    mix[clients, torch.arange(len(clients), device=clients.device)] = factors
    for part, own in zip(parts, total.split([part.shape[1] for part in parts], dim=1), strict=True):
        own.addmm_(mix, part.masked_fill(factors[:, None] == 0, 0.0))


def shrink(optimizer: torch.optim.Optimizer, weights: nn.Parameter, rows: int) -> None:
    """Leave only the first rows to the optimizer, with its moments of them."""
    if len(weights) > rows:
        weights.data = weights.data[:rows]
        state = optimizer.state[weights]
        state |= {name: value[:rows] for name, value in state.items() if torch.is_tensor(value) and value.ndim}
