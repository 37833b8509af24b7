"""A strategy around another one: it changes what clients do or what is aggregated, and leaves the rule to `inner`.

    >>> from fedpeft.strategies.median import Median
    >>> from fedpeft.strategies.ffa_lora import FFALoRA
    >>> type(Median().inner).__name__, Median(FFALoRA()).trains
    ('FedIT', ('B', 'head'))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedpeft import registry
from fedpeft.errors import InputError
from fedpeft.state import AdapterState
from fedpeft.strategies.base import FederatedStrategy, Needs, Rules, ServerState, Update, same_scale


def _forwarded(name: str) -> Any:
    """An attribute that lives in the inner strategy."""
    return property(lambda self: getattr(self.inner, name), lambda self, value: setattr(self.inner, name, value))


class Wrapper(FederatedStrategy):
    """Delegates everything to `inner` (FedIT if None). A robust rule overrides `transform` alone.

    What the run sets on the wrapper (client_ranks, population, transport, weighting) reaches the innermost strategy.
    """

    wraps: ClassVar[bool] = True
    client_ranks = _forwarded("client_ranks")
    population = _forwarded("population")
    transport = _forwarded("transport")
    weighting = _forwarded("weighting")

    def __init__(self, inner: FederatedStrategy | None = None) -> None:
        self.inner: FederatedStrategy = registry.load("strategies", "fedit")() if inner is None else inner
        individual = Needs.INDIVIDUAL in (type(self).needs, self.inner.needs)
        self.needs = Needs.INDIVIDUAL if individual else Needs.SUM
        self.trains, self.keeps, self.adapter = self.inner.trains, self.inner.keeps, self.inner.adapter
        self.unequal_ranks = self.inner.unequal_ranks
        self.changes_base, self.fixed_basis = self.inner.changes_base, self.inner.fixed_basis
        self.needs_start = type(self).needs_start or self.inner.needs_start
        self.plain_sgd = type(self).plain_sgd or self.inner.plain_sgd

    def initial(self, adapter: AdapterState, seed: int) -> ServerState:
        return self.inner.initial(adapter, seed)

    def before_round(self, server: ServerState) -> ServerState:
        return self.inner.before_round(server)

    def trained(self, server: ServerState) -> tuple[str, ...]:
        return self.inner.trained(server)

    def broadcast(self, server: ServerState, client: str) -> AdapterState:
        return self.inner.broadcast(server, client)

    def uploads(self, server: ServerState) -> tuple[str, ...]:
        return self.inner.uploads(server)

    def choose(self, names: list[str], rules: Rules, number: int) -> list[str]:
        return self.inner.choose(names, rules, number)

    def task(self, server: ServerState) -> dict[str, Any]:
        return self.inner.task(server)

    def transform(self, server: ServerState, updates: list[Update]) -> list[Update]:
        """The updates that the inner strategy aggregates."""
        return updates

    def aggregate(self, server: ServerState, updates: list[Update]) -> ServerState:
        return self.inner.aggregate(server, self.transform(server, same_scale(server, updates)))

    def offline(self, server: ServerState, updates: list[Update]) -> tuple[AdapterState, list[str]]:
        return self.inner.offline(server, self.transform(server, same_scale(server, updates)))


def name_of(strategy: FederatedStrategy) -> str:
    """The registered name of a strategy, or its class's name."""
    cls = type(strategy)
    entry = f"{cls.__module__}:{cls.__name__}"
    return next((name for name, value in registry.table("strategies").items() if value == entry), cls.__name__)


def innermost(strategy: FederatedStrategy) -> FederatedStrategy:
    """The rule inside all wrappers."""
    while isinstance(strategy, Wrapper):
        strategy = strategy.inner
    return strategy


def require_fixed_basis(wrapper: Wrapper) -> None:
    """Raise InputError if the inner strategy changes what coordinates mean between rounds."""
    if not wrapper.fixed_basis:
        able = [name for name in registry.names("strategies") if _keeps_basis(registry.load("strategies", name))]
        raise InputError(f"strategy.wrap: {name_of(wrapper)} carries a value per coordinate from round to round, but "
                         f"{name_of(innermost(wrapper))} changes what the coordinates mean (new factors or a moved "
                         f"base). Strategies with a fixed basis: {', '.join(able)}.")


def _keeps_basis(cls: type[FederatedStrategy]) -> bool:
    return cls.fixed_basis and not cls.wraps


def merged(updates: list[Update], statistic: Callable[[Tensor], Tensor], name: str) -> list[Update]:
    """One update in place of all: `statistic` of each tensor's values stacked to [clients, ...], in float64.

    Raises:
        InputError: shapes differ between clients.
    """
    require_equal_shapes(updates, name)
    first = updates[0].adapter
    tensors = {key: statistic(torch.stack([update.adapter[key].double() for update in updates]))
               for key in first.tensors}
    return [Update(name, sum(update.weight for update in updates), AdapterState(tensors, first.sites),
                   count=sum(update.count for update in updates))]


def median(values: Tensor) -> Tensor:
    """Median over the first dimension; of an even number, the mean of the two in the middle."""
    ordered, count = values.sort(dim=0).values, values.shape[0]
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def require_equal_shapes(updates: list[Update], name: str) -> None:
    """Raise InputError, naming the first difference, unless all updates have the same tensors in the same shapes."""
    first = updates[0]
    for update in updates[1:]:
        for key in sorted({*first.adapter.tensors, *update.adapter.tensors}):
            shapes = [list(one.adapter[key].shape) if key in one.adapter else "nothing" for one in (first, update)]
            if shapes[0] != shapes[1]:
                raise InputError(f"strategy.wrap: {name} compares updates coordinate by coordinate, but {key} is "
                                 f"{shapes[0]} from {first.client} and {shapes[1]} from {update.client}. "
                                 "Use equal ranks (adapter.client_ranks=null).")


def flattened(update: Update) -> Tensor:
    """All uploaded values in one float64 vector, in the order of tensor names."""
    return torch.cat([value.double().flatten() for value in update.adapter.tensors.values()])
