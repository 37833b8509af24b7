"""What each client has to train on and to be scored on.

A share is drawn when it is first asked for: a round of 100,000 clients may ask 1,000, and to draw an order for every
other one would cost seconds at each start and resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import numpy as np

from fedpeft.config import Config
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from fedpeft.seeds import numpy_generator

T = TypeVar("T")


class Shares(Mapping[str, T]):
    """Values by client, each made when it is first asked for.

    Args:
        clients: in their order.
        make: the value of a client.
    """

    def __init__(self, clients: Iterable[str], make: Callable[[str], T]) -> None:
        self.clients, self.make = dict.fromkeys(clients), make
        self.made: dict[str, T] = {}

    def __getitem__(self, client: str) -> T:
        if client not in self.made:
            if client not in self.clients:
                raise KeyError(client)
            self.made[client] = self.make(client)
        return self.made[client]

    def __contains__(self, client: object) -> bool:
        return client in self.clients

    def __iter__(self) -> Iterator[str]:
        return iter(self.clients)

    def __len__(self) -> int:
        return len(self.clients)


def hold_out(
    config: Config, parts: Mapping[str, list[int]], data: Encoded
) -> tuple[Shares[np.ndarray], Shares[np.ndarray], dict[str, int]]:
    """Each client's records to train on and to be scored on, by number, and how many it trains on; texts that teach
    nothing are in neither.

    Raises:
        InputError: a client would have none of one kind.
    """
    teaching = data.teaching()
    teaches = None
    if len(teaching) < len(data):
        teaches = np.zeros(len(data), dtype=bool)
        teaches[teaching] = True
    counts = {client: _count_kept(config, client, indices, teaches) for client, indices in parts.items()}

    def order_records(client: str) -> np.ndarray:
        indices = np.array(parts[client])
        # By the client's name, so that a real site draws the same order for its own records.
        order = numpy_generator(config.run.seed, "holdout", client)
        return order.permutation(indices if teaches is None else indices[teaches[indices]])

    def train_on(client: str) -> np.ndarray:
        order = order_records(client)
        # The end of the one order whose beginning is held out: the two can never overlap.
        return order[len(order) - counts[client] :]

    def score_on(client: str) -> np.ndarray:
        order = order_records(client)
        return order[: len(order) - counts[client]]

    return Shares(parts, train_on), Shares(parts, score_on), counts


def _count_kept(config: Config, client: str, indices: list[int], teaches: np.ndarray | None) -> int:
    """Records that a client trains on."""
    count = len(indices) if teaches is None else int(teaches[indices].sum())
    if not count:
        raise InputError(
            f"data.partition: none of the {len(indices)} texts of {client} has a token to predict. Give it others, "
            "or split the data otherwise."
        )
    held = int(count * config.data.holdout)
    if config.data.holdout and not 0 < held < count:
        raise InputError(
            f"data.holdout={config.data.holdout}: {client} has {count} records, of which {held} would be held out."
        )
    return count - held
