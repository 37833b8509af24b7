"""A round's event says the clients' mean metrics, and how far each update went beside the others.

    norm         L2 norm of what a client's trained tensors moved by, over all of them together
    distance     L2 distance of that move to the coordinate-wise median of all moves; none where shapes differ
    far          over FAR times the median norm of the *other* clients' updates

Neither says that a client is hostile: a client with far more steps moves farther too. It is named so that somebody
looks. A bound on norms does not see a small update in a wrong direction; the distance to the median shows it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedpeft.record.measured import mean_over_clients
from fedpeft.state import AdapterState

if TYPE_CHECKING:
    from fedpeft.state import Update

log = logging.getLogger("fedpeft")
FAR = 10.0
SENT = ("train_loss", "missed_tasks")
VALUES = 2**22  # of all clients together, that are held at once in float64


def mean_metrics(updates: list[Update]) -> dict[str, float]:
    """Means over the clients that sent a metric, weighted like the updates.

    A name that our clients do not send, as a stock app's `accuracy`, has `train_` before it: no client writes what the
    round's event says of the model.
    """
    means = mean_over_clients([(update.metrics, update.weight) for update in updates])
    return {key if key in SENT else f"train_{key}": value for key, value in means.items()}


def of_single(sent: dict[str, AdapterState], updates: list[Update], roles: list[str]) -> dict[str, Any]:
    """`update_norms` and `update_distances` by client, and `far_updates`, client -> how many times the median norm of
    the others (null where the others did not move); empty where no single update is seen.

    Args:
        sent: what each client received.
        roles: of the tensors that are compared.
    """
    if not updates or any(update.client not in sent for update in updates):
        return {}
    moved = [(update.adapter.select(roles), sent[update.client]) for update in updates]
    names = [update.client for update in updates]
    if _have_same_shapes([after for after, _ in moved]):
        norms, distances = _measure_moves(moved)
    else:
        norms, distances = [after.distance(before) for after, before in moved], []
    return {
        "update_norms": _by_name(names, norms),
        "update_distances": _by_name(names, distances),
        "far_updates": far(dict(zip(names, norms, strict=True))),
    }


def far(norms: dict[str, float]) -> dict[str, float | None]:
    """Clients whose norm is over FAR times the median of the others' norms -> how many times.

    >>> far({"a": 1.0, "b": 2.0, "c": 900.0})
    {'c': 600.0}
    """
    found: dict[str, float | None] = {}
    values = np.sort(np.array(list(norms.values())))
    for name, norm in norms.items():
        others = _median_without(values, int(np.searchsorted(values, norm))) if len(values) > 1 else norm
        if norm > FAR * others:
            found[name] = _round_value(norm / others) if others > 0 else None
    return found


def _median_without(ordered: np.ndarray, place: int) -> float:
    """Median of sorted values but for the one at `place`."""
    left = len(ordered) - 1
    low, high = (ordered[middle + (middle >= place)] for middle in ((left - 1) // 2, left // 2))
    return float((low + high) / 2)


def told(number: int, facts: dict[str, Any], treated: dict[str, str], known: set[str]) -> dict[str, Any]:
    """`facts` and, of the same clients, who was cut, clipped or left out (`treated`), for the round's event.

    A client whose update is far beyond the others' is named in the log, at its first time; `known` takes its name.
    """
    for name, times in facts.get("far_updates", {}).items():
        if name not in known:
            known.add(name)
            log.warning(
                "round %d: the update of %s %s (named from %g times on). If it should not count, set "
                "run.max_update_norm or a robust strategy.wrap.",
                number,
                name,
                beyond(times),
                FAR,
            )
    mine = {client: what for client, what in treated.items() if client in facts.get("update_norms", {})}
    return {**facts, "treated": mine} if mine else facts


def beyond(times: float | None) -> str:
    """How far an update is, in words."""
    return "moved where the others did not" if times is None else f"is {times:.4g} times as long as the others' median"


def _have_same_shapes(states: list[AdapterState]) -> bool:
    first = {key: value.shape for key, value in states[0].tensors.items()}
    return all({key: value.shape for key, value in state.tensors.items()} == first for state in states)


def _measure_moves(moved: list[tuple[AdapterState, AdapterState]]) -> tuple[list[float], list[float]]:
    """L2 norm of every move, and its distance to the coordinate-wise median of all, some columns at a time."""
    norms, distances = torch.zeros(2, len(moved), dtype=torch.float64)
    width = max(1, VALUES // len(moved))
    for key, value in moved[0][0].tensors.items():
        for start in range(0, value.numel(), width):
            part = slice(start, start + width)
            moves = _stack_rows([after[key] for after, _ in moved], part)
            moves -= _stack_rows([before[key] for _, before in moved], part)
            norms += moves.square().sum(1)
            distances += (moves - coordinate_median(moves)).square().sum(1)
    return norms.sqrt().tolist(), distances.sqrt().tolist()


def _stack_rows(values: list[Tensor], part: slice) -> Tensor:
    """A piece of each, flat, as the rows of a matrix in float64 on the CPU; one row where all are the same tensor."""
    chosen = values[:1] if all(value is values[0] for value in values) else values
    return torch.stack([value.flatten()[part] for value in chosen]).cpu().double()


def coordinate_median(values: Tensor) -> Tensor:
    """Median over the first dimension; of an even number, the mean of the two in the middle."""
    low, high = (len(values) - 1) // 2, len(values) // 2
    columns = np.array(values.reshape(len(values), -1).cpu().numpy().T, order="C")
    # Of a copy, and not sorted: all that is asked for are the one or two in the middle.
    columns.partition(sorted({low, high}), axis=1)
    middle = torch.from_numpy((columns[:, low] + columns[:, high]) / 2)
    return middle.reshape(values.shape[1:]).to(values.device)


def _by_name(names: list[str], values: list[float]) -> dict[str, float]:
    return {name: _round_value(value) for name, value in zip(names, values, strict=False)}


def _round_value(value: float) -> float:
    """Six digits: enough to read, and few bytes in the record."""
    return float(f"{value:.6g}")
