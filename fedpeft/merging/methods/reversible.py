"""Reversible model merging: store many adapters as a few components, and get each of them back. arXiv 2510.14163.

Averaging A and B of many adapters destroys them. Instead, at every position (a column of A, a row of B) the n adapters'
vectors of length r, x_1 ... x_n, are written in their own best basis: with mean mu and the p leading left singular
vectors V of [x_1 - mu, ..., x_n - mu],

    x_i = mu + V c_i,   c_i = V^T (x_i - mu)

so that any of them is a linear combination, and a position takes p (r + n) + r numbers instead of r n. The squared
error of a position is the sum of its discarded sigma^2; p >= n - 1, or p >= r, is exact.

`Reversible.recover(state, index)` gives adapter number `index` back, with its own head; `Reversible.store` is what has
to be kept for that. `result` is the adapter `index`, or without one the exact mean of the recovered products.

Deviations: that the mean is subtracted is inferred from the paper's storage formula. The state keeps all factors, so
that the basis is the best one for all adapters so far: a basis that is truncated at every step would pile up errors.
All adapters need one rank, and as in the paper nothing aligns their factors. Heads are stored whole.

    >>> import torch
    >>> from fedpeft.state import AdaptedLayer
    >>> layers = {"q": AdaptedLayer("lora")}
    >>> def one(b): return AdapterState({"q/A": torch.ones(1, 2), "q/B": torch.tensor([[b]])}, layers)
    >>> merger = Reversible(p=1)
    >>> state = merger.fold([one(1.0), one(4.0), one(-2.0)])
    >>> [round(merger.recover(state, index)["q/B"].item(), 5) for index in range(3)]
    [1.0, 4.0, -2.0]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedpeft import lowrank
from fedpeft.config import option
from fedpeft.errors import InputError
from fedpeft.merging.base import Merger, Numbers, State, Tensors, append, assemble, sites_of
from fedpeft.state import AdapterState


@dataclass
class ReversibleConfig:
    """Options of `reversible`: how much is stored, and what is got back from it."""

    p: int = option(2, "components kept at every position, beside the mean", low=0)
    index: int | None = option(None, "number of the adapter to get back, from 0; null is the mean of all", low=0)


class Reversible(Merger):
    """Stores adapters as few shared components, from which each can be got back."""

    Config: ClassVar[Any] = ReversibleConfig
    paper = "Reversible Model Merging, arXiv 2510.14163"

    def update(self, state: State, adapter: AdapterState, number: float | None) -> tuple[Tensors, Numbers]:
        form = state["numbers"]["form"]
        for site in adapter.lora_sites():
            rank = form[f"{site}/A"][1][0]
            if adapter.rank(site) != rank:
                raise InputError(
                    f"reversible: {site} has rank {adapter.rank(site)}, the first adapter's is {rank}; "
                    "all need the same."
                )
        own = {
            f"own:{state['numbers']['count']}:{key}": value for key, value in adapter.select(("head",)).tensors.items()
        }
        before = {key: value for key, value in state["tensors"].items() if key.startswith("own:")}
        return append(state, adapter) | before | own, {}

    def finish(self, state: State) -> Tensors:
        store = self.store(state)
        if self.config.index is not None:
            return self._recover_state(state, store, self.config.index)
        count, tensors = state["numbers"]["count"], {}
        each = [self._recover_state(state, store, index) for index in range(count)]
        for site in sites_of(state):
            Bs, As = ([one[f"{site}/{role}"] for one in each] for role in "BA")
            tensors[f"{site}/B"], tensors[f"{site}/A"] = lowrank.compress(*lowrank.stack(Bs, As, [1.0] * count))
        return tensors

    def recover(self, state: State, index: int) -> AdapterState:
        """Adapter number `index` (from 0) as far as p components tell, with its own head and the common scaling.

        Raises:
            InputError: there is no such adapter.
        """
        return assemble(state, self._recover_state(state, self.store(state), index))

    def store(self, state: State) -> Tensors:
        """`site/role/mean` [d, r], `/basis` [d, r, p] and `/coefficients` [d, p, n] of the d positions of each factor.

        p is at most min(r, n): there are no more components.
        """
        tensors: Tensors = {}
        for key, X in _stack_positions(state).items():
            mean = X.mean(2)
            U, S, Vt = torch.linalg.svd(X - mean[:, :, None], full_matrices=False)
            p = self.config.p
            tensors |= {
                f"{key}/mean": mean,
                f"{key}/basis": U[:, :, :p].contiguous(),
                f"{key}/coefficients": S[:, :p, None] * Vt[:, :p],
            }
        return tensors

    def notes(self, state: State) -> list[str]:
        store, numbers = self.store(state), sum(X.numel() for X in _stack_positions(state).values())
        kept = sum(value.numel() for value in store.values())
        error = sum(
            float((X - _restore_vectors(store, key)).square().sum()) for key, X in _stack_positions(state).items()
        )
        total = sum(float(X.square().sum()) for X in _stack_positions(state).values())
        return [
            f"{kept:,} numbers store {state['numbers']['count']} adapters of {numbers:,}; relative error of the "
            f"factors {(error / total) ** 0.5 if total else 0.0:.3g}"
        ]

    def _recover_state(self, state: State, store: Tensors, index: int) -> Tensors:
        count = state["numbers"]["count"]
        if not 0 <= index < count:
            raise InputError(f"reversible: index={index}: there are {count} adapters, numbered from 0.")
        tensors = {}
        for site in sites_of(state):
            tensors[f"{site}/A"] = _restore_vectors(store, f"{site}/A")[:, :, index].T.contiguous()
            tensors[f"{site}/B"] = _restore_vectors(store, f"{site}/B")[:, :, index].contiguous()
        prefix = f"own:{index}:"
        return tensors | {
            key.removeprefix(prefix): value for key, value in state["tensors"].items() if key.startswith(prefix)
        }


def _stack_positions(state: State) -> Tensors:
    """The n adapters' vectors [d, r, n] at the d positions of each factor."""
    tensors, count = {}, state["numbers"]["count"]
    for site in sites_of(state):
        for role in "AB":
            value = state["tensors"][f"{site}/{role}"]
            value = value.T if role == "A" else value
            tensors[f"{site}/{role}"] = value.unflatten(1, (count, -1)).transpose(1, 2)
    return tensors


def _restore_vectors(store: Tensors, key: str) -> Tensor:
    return store[f"{key}/mean"][:, :, None] + store[f"{key}/basis"] @ store[f"{key}/coefficients"]
