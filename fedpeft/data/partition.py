"""Splits of training records over clients.

Each partitioner turns labels (or a natural column) into disjoint, sorted index arrays, one per client.

Written in numpy rather than with flwr-datasets' partitioners: its IidPartitioner takes contiguous blocks
(flower#4919), its DirichletPartitioner deals each class out in file order, so that a file sorted by date or author
gives clients more skew than alpha says, and gives up after ten draws; importing it costs seconds at every start. On
records that were shuffled first, `Dirichlet` here gives exactly the clients of its DirichletPartitioner (a test holds
that).

Papers: Dirichlet label skew, Yurochkin et al. 2019 (arXiv:1905.12022) and Hsu et al. 2019 (arXiv:1909.06335); shards,
McMahan et al. 2017 (arXiv:1602.05629).

    >>> import numpy as np
    >>> parts = IID().split(np.array([0, 0, 0, 1, 1, 1]), {}, clients=2, seed=0)
    >>> sorted(np.concatenate(parts).tolist())
    [0, 1, 2, 3, 4, 5]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fedpeft import seeds
from fedpeft.config import option
from fedpeft.data import skipped
from fedpeft.data.columns import EXACT, as_text, has_values
from fedpeft.data.skipped import Skipped
from fedpeft.errors import InputError

TRIES = 100


class Partitioner(Protocol):
    """A registered way to deal records to clients; the same seed deals the same."""

    def split(self, labels: np.ndarray, columns: Mapping[str, np.ndarray], clients: int, seed: int) -> list[np.ndarray]:
        """Sorted, disjoint index arrays, one per client.

        Args:
            labels: int64 [N].
            columns: natural columns by name, each [N].

        Raises:
            InputError: the split is impossible; the message has the numbers.
        """


class IID:
    """Shuffled, equal sizes (they differ by one record at most)."""

    def split(self, labels: np.ndarray, columns: Mapping[str, np.ndarray], clients: int, seed: int) -> list[np.ndarray]:
        _require_records(len(labels), clients, 1)
        order = seeds.numpy_generator(seed, "partition", "order").permutation(len(labels))
        return [np.sort(part) for part in np.array_split(order, clients)]


class Dirichlet:
    """Label skew: the shares of each class over clients are one draw from a symmetric Dirichlet distribution."""

    @dataclass
    class Config:
        alpha: float = option(0.5, "concentration; small is skewed, large is near iid", above=0)
        min_examples: int = option(
            8, "every client gets at least this many records; the shares are drawn again until it does", low=1
        )

    def __init__(self, alpha: float = 0.5, min_examples: int = 8) -> None:
        self.alpha = alpha
        self.min_examples = min_examples

    def split(self, labels: np.ndarray, columns: Mapping[str, np.ndarray], clients: int, seed: int) -> list[np.ndarray]:
        _require_records(len(labels), clients, self.min_examples)
        # A generator of its own: how often the shares are drawn again must not change the order.
        order = seeds.numpy_generator(seed, "partition", "order").permutation(len(labels))
        rng = seeds.numpy_generator(seed, "partition", "shares")
        classes = [order[places] for places in group_alike(labels[order])]
        best = 0
        for _ in range(TRIES):
            dealt = [self._deal_members(members, clients, rng) for members in classes]
            parts = [np.sort(np.concatenate(shares)) for shares in zip(*dealt, strict=True)]
            smallest = min(len(part) for part in parts)
            if smallest >= self.min_examples:
                return parts
            best = max(best, smallest)
        raise InputError(
            f"data.partition: in {TRIES} Dirichlet draws with alpha={self.alpha:g}, {len(labels)} records over "
            f"{clients} clients never gave every client min_examples={self.min_examples} (the smallest had {best} at "
            "best). Lower data.partition.min_examples or data.clients, or raise data.partition.alpha."
        )

    def _deal_members(self, members: np.ndarray, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
        shares = rng.dirichlet(np.full(clients, self.alpha))
        return np.split(members, (np.cumsum(shares) * len(members)).astype(int)[:-1])


class Column:
    """A natural column says who owns a record: the largest groups become the clients, the largest first.

    Records with no value there have no owner, and are left out: together they are nobody's.
    """

    @dataclass
    class Config:
        column: str = option("", "the column, for example maintainer, author or hospital")
        min_examples: int = option(1, "groups with fewer records are no clients", low=1)

    def __init__(self, column: str = "", min_examples: int = 1) -> None:
        self.column = column
        self.min_examples = min_examples

    def owners(self, columns: Mapping[str, np.ndarray], clients: int | None = None) -> list[Any]:
        """The values of the column that become clients, in their order; all of them if no number is given.

        Raises:
            InputError: there is no such column, or it has too few groups; names them.
        """
        if self.column not in columns:
            raise InputError(
                f"data.partition.column: '{self.column}' is no column of the data. Natural columns: "
                f"{', '.join(columns) or 'none'}. Columns of lists or objects, the text and the label are none."
            )
        values = columns[self.column]
        owned = values[has_values(values)]
        _require_exact(self.column, owned)
        groups, sizes = np.unique(owned, return_counts=True)
        # Stable: groups of one size stay in the order of their names, in every version of numpy.
        ranked = [groups[g] for g in np.argsort(-sizes, kind="stable") if sizes[g] >= self.min_examples]
        if len(ranked) < (clients or 1):
            nobodys = len(values) - len(owned)
            shown = ", ".join(map(str, ranked[:10])) + (", ..." if len(ranked) > 10 else "")
            raise InputError(
                f"data.clients={clients}: column '{self.column}' has {len(ranked)} groups with at least "
                f"data.partition.min_examples={self.min_examples} records ({len(sizes)} groups in all"
                f"{f'; {nobodys} records have no value there' if nobodys else ''}). "
                + (
                    f"Set data.clients to at most {len(ranked)}, or to null for all groups: {shown}."
                    if ranked
                    else "Choose another data.partition.column."
                )
            )
        return ranked[:clients]

    def split(self, labels: np.ndarray, columns: Mapping[str, np.ndarray], clients: int, seed: int) -> list[np.ndarray]:
        owners = self.owners(columns, clients)
        values = columns[self.column]
        owned = np.flatnonzero(has_values(values))
        groups = [owned[places] for places in group_alike(values[owned])]
        records = {values[places[0]]: places for places in groups}
        parts = [records[owner] for owner in owners]
        skipped.say(find_unowned(self.column, values, parts))
        return parts


def group_alike(values: np.ndarray) -> list[np.ndarray]:
    """The places of each value, in their order, values from low to high.

    >>> [places.tolist() for places in group_alike(np.array([7, 3, 7]))]
    [[1], [0, 2]]
    """
    # One sort: to look for each value among all takes hours where 100,000 clients share a million records.
    _, which, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return np.split(np.argsort(which, kind="stable"), np.cumsum(sizes)[:-1]) if len(values) else []


def find_owners(values: np.ndarray, parts: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Client -> whose records it has by a natural column, where all of them are of one."""
    found = {client: {as_text(values[index]) for index in part} for client, part in parts.items()}
    return {client: min(names) for client, names in found.items() if len(names) == 1}


def find_unowned(column: str, values: np.ndarray, parts: Sequence[Sequence[int] | np.ndarray]) -> tuple[Skipped, ...]:
    """The records that no client has because of their value in a natural column."""
    rest = np.ones(len(values), dtype=bool)
    for part in parts:
        rest[part] = False
    owned, where = has_values(values), f"data.partition.column={column}"
    nobodys = int((rest & ~owned).sum())
    names = [as_text(value) for value in values[rest & owned]]
    others = tuple(dict.fromkeys(names))
    found: tuple[Skipped, ...] = ()
    if nobodys:
        found += (Skipped(where, "records have no value there, so no owner, and are left out", nobodys, len(values)),)
    if names:
        what = f"records are in the {len(others)} groups that are left out, as they are not among the largest"
        found += (Skipped(where, what, len(names), len(values), others[: skipped.SHOWN]),)
    return found


def _require_exact(column: str, values: np.ndarray) -> None:
    if values.dtype.kind == "f" and len(values) and abs(values).max() >= EXACT:
        raise InputError(
            f"data.partition.column: '{column}' holds numbers up to {abs(values).max():.0f} as floating point, which "
            "tells no two neighbours apart: owners may be mixed up. Save it as whole numbers or strings."
        )


class Shards:
    """Records sorted by label and cut into equal shards; each client gets a few, so it sees a few classes only."""

    @dataclass
    class Config:
        shards_per_client: int = option(2, "shards that a client gets; few shards, few classes", low=1)

    def __init__(self, shards_per_client: int = 2) -> None:
        self.shards_per_client = shards_per_client

    def split(self, labels: np.ndarray, columns: Mapping[str, np.ndarray], clients: int, seed: int) -> list[np.ndarray]:
        _require_records(len(labels), clients, self.shards_per_client)
        order = seeds.numpy_generator(seed, "partition", "order").permutation(len(labels))
        # Shuffled, then sorted stably: within a class the order of the file must not decide who gets what.
        order = order[np.argsort(labels[order], kind="stable")]
        shards = np.array_split(order, clients * self.shards_per_client)
        dealt = seeds.numpy_generator(seed, "partition", "shares").permutation(len(shards)).reshape(clients, -1)
        return [np.sort(np.concatenate([shards[index] for index in hand])) for hand in dealt]


class Quantity:
    """Quantity skew: sizes from a Dirichlet distribution, records dealt at random."""

    @dataclass
    class Config:
        alpha: float = option(1.0, "concentration of the sizes; small is skewed, large is equal", above=0)
        min_examples: int = option(8, "every client gets this many records before the rest is divided", low=1)

    def __init__(self, alpha: float = 1.0, min_examples: int = 8) -> None:
        self.alpha = alpha
        self.min_examples = min_examples

    def split(self, labels: np.ndarray, columns: Mapping[str, np.ndarray], clients: int, seed: int) -> list[np.ndarray]:
        _require_records(len(labels), clients, self.min_examples)
        order = seeds.numpy_generator(seed, "partition", "order").permutation(len(labels))
        shares = seeds.numpy_generator(seed, "partition", "shares").dirichlet(np.full(clients, self.alpha))
        rest = len(labels) - clients * self.min_examples
        ends = (np.cumsum(shares) * rest).astype(int) + self.min_examples * np.arange(1, clients + 1)
        return [np.sort(part) for part in np.split(order, ends[:-1])]


def _require_records(records: int, clients: int, least: int) -> None:
    if clients * least > records:
        raise InputError(
            f"data.clients={clients}: at least {least} records each need {clients * least}, the training set has "
            f"{records}. {records // least} clients are possible; data.partition.min_examples is the {least}."
        )
