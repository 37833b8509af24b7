"""The contract of mergers: adapters come one after another, and become one adapter.

    state = merger.start();  state = merger.add(state, adapter);  merged = merger.result(state)

`merge` does that for a list. A state is plain data that a continual-learning run saves between tasks: `numbers` goes to
JSON, `tensors` to safetensors. `add` changes neither the state nor the adapter it is given.

An adapter is made plain first (`adapters.flat`), so that a site's change of the weight is tau = s B A. All work is done
in float64, on factors, in units of the first adapter's s: a later B is multiplied by s_k / s. A merged adapter has the
first one's scaling and dtypes; its rank may be higher. Heads have no common start, so they are averaged, equally unless
a merger says otherwise.

    >>> import torch
    >>> from fedpeft.state import AdaptedLayer
    >>> layers = {"q": AdaptedLayer("lora")}
    >>> def one(b): return AdapterState({"q/A": torch.ones(1, 1), "q/B": torch.full((1, 1), b)}, layers)
    >>> merged = merge("running_average", [one(1.0), one(4.0)])
    >>> (merged["q/B"] @ merged["q/A"]).item()
    2.5
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedpeft import config as configs
from fedpeft import lowrank
from fedpeft.adapters.flat import flatten_adapter, require_same_sites
from fedpeft.errors import InputError
from fedpeft.packing import DTYPES
from fedpeft.state import AdapterState, from_dict, to_dict

State = dict[str, Any]
Tensors = dict[str, Tensor]
Numbers = dict[str, Any]
NOISE = 1e-14  # relative size of what is rounding in float64


class Merger(configs.Configured, ABC):
    """A way to merge; a subclass says what it keeps of an adapter, and what comes out of what was kept.

    Attributes:
        number: what a number given with an adapter means; empty if the merger takes none.
        fewest: how many adapters `merge` needs.
    """

    number: ClassVar[str] = ""
    fewest: ClassVar[int] = 2

    @abstractmethod
    def update(self, state: State, adapter: AdapterState, number: float | None) -> tuple[Tensors, Numbers]:
        """What is kept after this adapter: factors as `site/B` and `site/A`, other tensors under other names.

        Args:
            state: before the adapter; `state["tensors"]` has what was kept, `state["numbers"]["count"]` how many came.
            adapter: plain, float64, in units of the first adapter's scaling.
        """

    def finish(self, state: State) -> Tensors:
        """Factors of the merged adapter, and heads if they are not the mean; as kept, if not overridden."""
        return {key: state["tensors"][key] for key in state["numbers"]["form"] if key in state["tensors"]}

    def share(self, state: State, number: float | None) -> float:
        """Weight of this adapter's head in the mean of all heads so far."""
        return 1.0 / (int(state["numbers"]["count"]) + 1)

    def notes(self, state: State) -> list[str]:
        """What a person should know of the result."""
        return []

    def start(self) -> State:
        """A state before the first adapter."""
        return {"numbers": {"count": 0}, "tensors": {}}

    def add(self, state: State, adapter: AdapterState, number: float | None = None) -> State:
        """The state after one more adapter.

        Raises:
            InputError: a number that the merger does not take, values that are not finite, or a scaling of zero.
            StateMismatch: other sites, other shapes, or a head of other classes than the first adapter's.
        """
        if number is not None and not self.number:
            raise InputError(f"number={number:g}: {type(self).__name__} takes no number with an adapter.")
        if number is not None and not math.isfinite(number):
            raise InputError(f"number={number}: the {self.number} must be finite.")
        adapter = flatten_adapter(adapter)
        _check_values(adapter)
        if not state["numbers"]["count"]:
            state = _with_form(state, adapter)
        require_same_sites(_empty_form(state), adapter, "adapter")
        adapter = _in_units(state, adapter)
        share = self.share(state, number)
        heads = {}
        for key, value in adapter.select(("head",)).tensors.items():
            # A running mean, so that no head of an earlier adapter is kept.
            mean = state["tensors"].get(f"head:{key}", torch.zeros_like(value))
            heads[f"head:{key}"] = mean + share * (value - mean)
        tensors, numbers = self.update(state, adapter, number)
        count = state["numbers"]["count"] + 1
        return {"numbers": {**state["numbers"], **numbers, "count": count}, "tensors": tensors | heads}

    def result(self, state: State) -> AdapterState:
        """The merged adapter, a plain LoRA.

        Raises:
            InputError: nothing was added.
        """
        if not state["numbers"]["count"]:
            raise InputError(f"{type(self).__name__}: no adapter was added yet.")
        heads = {key.removeprefix("head:"): value for key, value in state["tensors"].items() if key.startswith("head:")}
        return assemble(state, heads | self.finish(state))

    def merge(self, adapters: Sequence[AdapterState], numbers: Sequence[float] | None = None) -> AdapterState:
        """Merge a list, in its order; `numbers` has one number for each adapter."""
        return self.result(self.fold(adapters, numbers))

    def fold(self, adapters: Sequence[AdapterState], numbers: Sequence[float] | None = None) -> State:
        """The state after all of a list."""
        self.require(len(adapters))
        if numbers is not None and len(numbers) != len(adapters):
            raise InputError(f"numbers: {len(numbers)} numbers for {len(adapters)} adapters.")
        state = self.start()
        for index, adapter in enumerate(adapters):
            state = self.add(state, adapter, None if numbers is None else numbers[index])
        return state

    def require(self, count: int) -> None:
        """Raise InputError where `count` adapters are too few."""
        if count < self.fewest:
            raise InputError(f"{type(self).__name__} needs at least {self.fewest} adapters; {count} given.")


def make(name: str, options: dict[str, Any] | None = None, key: str = "") -> Merger:
    """A registered merger from its options; `key` is the config key to blame.

    Raises:
        InputError: unknown merger or option, or a value out of bounds.
    """
    merger: Merger = configs.method("mergers", name, options or {}, key)
    return merger


def merge(
    name: str,
    adapters: Sequence[AdapterState],
    options: dict[str, Any] | None = None,
    numbers: Sequence[float] | None = None,
) -> AdapterState:
    """Merge adapters, in their order, by a registered merger."""
    return make(name, options).merge(adapters, numbers)


# What mergers use.


def combine(state: State, adapter: AdapterState, old: float, new: float) -> Tensors:
    """Factors of old * (what is kept) + new * (the adapter), exact, of the lowest rank. Rank: at most the sum."""
    kept, tensors = state["tensors"], {}
    for site in adapter.lora_sites():
        B, A = adapter[f"{site}/B"] * new, adapter[f"{site}/A"]
        size = lowrank.norm(B, A)
        if f"{site}/B" in kept:
            B0, A0 = kept[f"{site}/B"] * old, kept[f"{site}/A"]
            size = size + lowrank.norm(B0, A0)
            B, A = torch.cat([B0, B], dim=1), torch.cat([A0, A])
        tensors[f"{site}/B"], tensors[f"{site}/A"] = without_noise(B, A, size)
    return tensors


def without_noise(B: Tensor, A: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Factors U S and V^T of B A without the singular values that are rounding of a sum of terms of norm `size`.

    `lowrank.compress` measures against the product, which tells nothing where the terms cancel.
    """
    U, S, Vt = lowrank.svd(B, A)
    keep = int((S / size > NOISE).sum())  # 0 / 0 is no number, and none is kept
    return (U * S)[:, :keep], Vt[:keep]


def append(state: State, adapter: AdapterState, weight: float = 1.0) -> Tensors:
    """Factors beside those that are kept: [B, weight B_k], [A; A_k], every rank as it was trained."""
    kept, tensors = state["tensors"], {}
    for site in adapter.lora_sites():
        B, A = adapter[f"{site}/B"] * weight, adapter[f"{site}/A"]
        tensors[f"{site}/B"] = torch.cat([kept[f"{site}/B"], B], dim=1) if f"{site}/B" in kept else B
        tensors[f"{site}/A"] = torch.cat([kept[f"{site}/A"], A]) if f"{site}/A" in kept else A
    return tensors


def sites_of(state: State) -> list[str]:
    """The adapted modules."""
    return [name for name, site in state["numbers"]["sites"].items() if site["kind"] != "head"]


def pair(state: State, site: str) -> tuple[Tensor, Tensor]:
    """The kept factors B and A of a site."""
    return state["tensors"][f"{site}/B"], state["tensors"][f"{site}/A"]


def assemble(state: State, tensors: Tensors) -> AdapterState:
    """An adapter in the first one's dtypes and scaling; a product of rank zero gets one column and row of zeros."""
    for site in sites_of(state):
        B, A = tensors[f"{site}/B"], tensors[f"{site}/A"]
        if not A.shape[0]:
            tensors = tensors | {f"{site}/B": B.new_zeros(B.shape[0], 1), f"{site}/A": A.new_zeros(1, A.shape[1])}
    form = state["numbers"]["form"]
    # Copies, as safetensors refuses tensors that share memory.
    plain = {key: value.to(DTYPES[form[key][0]]).clone() for key, value in tensors.items()}
    return from_dict(plain, state["numbers"]["sites"])


def _with_form(empty: State, adapter: AdapterState) -> State:
    """What later adapters are held against: dtype and shape of every tensor of the first one, and its sites."""
    form = {key: [str(value.dtype).removeprefix("torch."), list(value.shape)] for key, value in adapter.tensors.items()}
    sites = {name: {**site, "shape": list(site["shape"])} for name, site in to_dict(adapter).items()}
    return {**empty, "numbers": {**empty["numbers"], "form": form, "sites": sites}}


def _empty_form(state: State) -> AdapterState:
    numbers = state["numbers"]
    return from_dict(
        {
            key: torch.empty(shape, dtype=DTYPES[dtype], device="meta")
            for key, (dtype, shape) in numbers["form"].items()
        },
        numbers["sites"],
    )


def _in_units(state: State, adapter: AdapterState) -> AdapterState:
    tensors = {key: value.detach().double().cpu() for key, value in adapter.tensors.items()}
    for site in adapter.lora_sites():
        unit = state["numbers"]["sites"][site]["scaling"]
        tensors[f"{site}/B"] = tensors[f"{site}/B"] * (adapter.sites[site].scaling / unit)
    return AdapterState(tensors, adapter.sites)


def _check_values(adapter: AdapterState) -> None:
    for key, value in adapter.tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"{key} has values that are not finite.")
    for site in adapter.lora_sites():
        if adapter.sites[site].scaling == 0:
            raise InputError(f"{site} has the scaling 0, so its factors change nothing.")
