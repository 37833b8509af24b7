"""A strategy around another one: it changes what clients do or what is aggregated, and leaves the rule to `inner`.

>>> from fedpeft.strategies.wrappers.median import Median
>>> from fedpeft.strategies.rules.ffa_lora import FFALoRA
>>> type(Median().inner).__name__, Median(FFALoRA()).trains
('FedIT', ('B', 'head'))
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedpeft import registry
from fedpeft.errors import InputError
from fedpeft.state import AdapterState, Needs, Rules, RunContext, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy, same_scale
from fedpeft.strategies.instructions import Instructions


class Wrapper(FederatedStrategy):
    """Delegates everything to `inner` (FedIT if None). A robust rule overrides `transform` alone."""

    wraps: ClassVar[bool] = True

    def __init__(
        self, inner: FederatedStrategy | None = None, *, context: RunContext = RunContext(), **options: Any
    ) -> None:
        fedit = registry.load("strategies", "fedit")
        self.inner: FederatedStrategy = fedit(context=context) if inner is None else inner
        # Of the strategy inside, whatever was given here: all layers know one run.
        super().__init__(context=self.inner.context, **options)
        self.treated: dict[str, str] = {}  # what `transform` last did to whom
        # One layer that looks at single updates is enough to rule out sums.
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
        return self.inner.broadcast(server, client).beside(self.extra(server))

    def uploads(self, server: ServerState) -> tuple[str, ...]:
        return self.inner.uploads(server)

    def choose(self, names: list[str], rules: Rules, number: int) -> list[str]:
        return self.inner.choose(names, rules, number)

    def instructions(self, server: ServerState) -> Instructions:
        return self.inner.instructions(server)

    def transform(self, server: ServerState, updates: list[Update]) -> list[Update]:
        """The updates that the inner strategy aggregates; `treated` then says whom it cut, clipped or left out."""
        return updates

    def treatments(self) -> dict[str, str]:
        inner = self.inner.treatments()
        # A client may be clipped by one layer and left out by the next: neither is to hide the other.
        both = {client: f"{what}, {inner[client]}" for client, what in self.treated.items() if client in inner}
        return {**self.treated, **inner, **both}

    def aggregate(self, server: ServerState, updates: list[Update]) -> ServerState:
        return self.inner.aggregate(server, self.transform(server, same_scale(server, updates)))

    def offline(self, server: ServerState, updates: list[Update]) -> tuple[AdapterState, list[str]]:
        return self.inner.offline(server, self.transform(server, same_scale(server, updates)))


def name_of(strategy: FederatedStrategy) -> str:
    """The registered name of a strategy, or its class's name."""
    cls = type(strategy)
    entry = f"{cls.__module__}:{cls.__name__}"
    return next((name for name, value in registry.table("strategies").items() if value == entry), cls.__name__)


def innermost_rule(strategy: FederatedStrategy) -> FederatedStrategy:
    """The rule inside all wrappers."""
    while isinstance(strategy, Wrapper):
        strategy = strategy.inner
    return strategy


def require_fixed_basis(wrapper: Wrapper) -> None:
    """Raise InputError if the inner strategy changes what coordinates mean between rounds."""
    if not wrapper.fixed_basis:
        able = [name for name in registry.names("strategies") if _keeps_basis(registry.load("strategies", name))]
        raise InputError(
            f"strategy.wrap: {name_of(wrapper)} carries a value per coordinate from round to round, but "
            f"{name_of(innermost_rule(wrapper))} changes what the coordinates mean (new factors or a moved "
            f"base). Strategies with a fixed basis: {', '.join(able)}."
        )


def _keeps_basis(cls: type[FederatedStrategy]) -> bool:
    return cls.fixed_basis and not cls.wraps


def merge_updates(updates: list[Update], cut: int, name: str) -> tuple[list[Update], dict[str, str]]:
    """One update in place of all: the mean of each coordinate's values without `cut` at each end, in float64; and the
    clients that hardly count in it, with how much of each was cut.

    Of the coordinates in which the clients differ, chance cuts 2 cut / n of a client's; a client is named where at most
    half of what chance leaves was left.

    Raises:
        InputError: shapes differ between clients.
    """
    require_equal_shapes(updates, name)
    first, count = updates[0].adapter, len(updates)
    tensors, extra, outside, differ = {}, {}, torch.zeros(count, dtype=torch.int64), 0
    for key in first.extra:  # coordinate by coordinate too: a rate or a control of one client may be anything
        extra[key] = _trimmed_mean([update.adapter.extra[key] for update in updates], cut)[0]
    for key in first.tensors:
        values = torch.stack([update.adapter[key].double() for update in updates])
        tensors[key], ordered, kept = _trimmed_mean(list(values), cut)
        outside += ((values < kept[0]) | (values > kept[-1])).reshape(count, -1).sum(1).cpu()
        differ += int((ordered[0] != ordered[-1]).sum())
    shares = (outside / max(differ, 1)).tolist()
    limit = (1 + 2 * cut / count) / 2
    return (
        [
            Update(
                name,
                sum(update.weight for update in updates),
                AdapterState(tensors, first.sites, extra),
                count=sum(update.count for update in updates),
            )
        ],
        {
            update.client: f"trimmed in {100 * share:.0f} % of its values"
            for update, share in zip(updates, shares, strict=True)
            if cut and share > limit
        },
    )


def _trimmed_mean(values: list[Tensor], cut: int) -> tuple[Tensor, Tensor, Tensor]:
    """The mean without `cut` values at each end of every coordinate; all in order, and those that it is of."""
    ordered = torch.stack([value.double() for value in values]).sort(dim=0).values
    kept = ordered[cut : len(values) - cut]
    return kept.mean(dim=0), ordered, kept


def require_equal_shapes(updates: list[Update], name: str) -> None:
    """Raise InputError, naming the first difference, unless all updates have the same tensors in the same shapes."""
    first = updates[0]
    for update in updates[1:]:
        for key in sorted({*first.adapter.tensors, *update.adapter.tensors}):
            shapes = [list(one.adapter[key].shape) if key in one.adapter else "nothing" for one in (first, update)]
            if shapes[0] != shapes[1]:
                raise InputError(
                    f"strategy.wrap: {name} compares updates coordinate by coordinate, but {key} is "
                    f"{shapes[0]} from {first.client} and {shapes[1]} from {update.client}. "
                    "Use equal ranks (adapter.client_ranks=null)."
                )


def flatten_update(update: Update, beside: Collection[str] = ()) -> Tensor:
    """All uploaded values in one float64 vector, in the order of tensor names; then those of these names beside, which
    finished adapters do not have.
    """
    extra = update.adapter.extra
    chosen = [*update.adapter.tensors.values(), *(extra[name] for name in sorted(beside) if name in extra)]
    return torch.cat([value.double().flatten() for value in chosen])
