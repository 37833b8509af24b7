"""`run.max_traffic_mb`: a run stops, with what is reached, before the round that would move more bytes than allowed;
and `fedpeft validate --traffic`: what a round of a config would move.

What rounds have moved is read from their events, so a resumed run counts as one that was not interrupted. A round to
come is taken to move what the adapter says, or as much as the largest round before it, whichever is more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpeft.adapters.adapted import build as build_adapted
from fedpeft.config import Config
from fedpeft.errors import InputError
from fedpeft.record import metrics
from fedpeft.run.world import cache_of, data_key, load_records, settle_clients
from fedpeft.state import ServerState
from fedpeft.strategies.base import FederatedStrategy
from fedpeft.strategies.build import build as build_strategy

MB = 10**6
Event = dict[str, Any]


def check(config: Config) -> None:
    """Refuse a limit for a run over tasks, which would end in the middle of one."""
    limit, body = config.run.max_traffic_mb, config.continual.body
    if limit is not None and body is not None:
        raise InputError(
            f"run.max_traffic_mb={limit:g}: with continual.body={body} a run that stops early has not seen all tasks. "
            "Set it to null, and fewer run.rounds or continual.tasks."
        )


def count_round(config: Config) -> dict[str, Any]:
    """Bytes of a client in the first round, up, up of the head, and down; and MB of all that are asked, of a round and
    of the run. The model is loaded, and of the data what says how many labels and clients there are.

    What protects a round comes on top (masks and keys of secure aggregation); a client of a lower rank moves less.

    Raises:
        InputError: model or data cannot be had.
    """
    place = Path("runs/new")  # where a run of this config would be, beside its cache
    clients = len(settle_clients(config, place))
    labels = len(load_records(data_key(config), cache_of(config, place))[0].label_names)
    model = build_adapted(config.model, config.adapter, labels, config.run.seed)
    strategy = build_strategy(config, labels)
    server = strategy.before_round(strategy.initial(model.state(), config.run.seed))
    taken = server.adapter.select(strategy.uploads(server))
    up, down = taken.nbytes, strategy.broadcast(server, "").nbytes
    asked = min(clients, config.run.clients_per_round or clients)
    round_mb = asked * (up + down) / MB
    return {
        "clients": asked,
        "up": up,
        "up_head": taken.select(("head",)).nbytes,
        "down": down,
        "round_mb": round_mb,
        "run_mb": config.run.rounds * round_mb,
    }


@dataclass
class Traffic:
    """What a run has moved and may move, in bytes.

    Attributes:
        asked: clients that a round asks.
        moved: by round.
    """

    limit_mb: float
    asked: int
    planned: int
    moved: dict[int, int] = field(default_factory=dict)

    @classmethod
    def open(cls, config: Config, run: Path) -> Traffic | None:
        """That of a run, by what it has recorded; None without a limit."""
        limit, count = config.run.max_traffic_mb, config.data.clients
        if limit is None or count is None:
            return None
        traffic = cls(limit, min(count, config.run.clients_per_round or count), config.run.rounds)
        for event in metrics.read(run / "metrics.jsonl"):
            traffic.hear(event)
        return traffic

    def hear(self, event: Event) -> None:
        """Take what a round has moved."""
        if event["event"] == "round":
            self.moved[event["round"]] = event["bytes_up"] + event["bytes_down"]

    @property
    def total(self) -> int:
        """Bytes of all rounds so far."""
        return sum(self.moved.values())

    def of_next(self, strategy: FederatedStrategy, server: ServerState) -> int:
        """Bytes that the next round will move, as far as is known before it."""
        state = strategy.before_round(server)
        sent = strategy.broadcast(state, "").nbytes
        taken = state.adapter.select(strategy.uploads(state)).nbytes
        return max(self.asked * (sent + taken), *self.moved.values(), 0)

    def has_room(self, strategy: FederatedStrategy, server: ServerState, rounds: int = 1) -> bool:
        """Whether so many more rounds stay within the limit."""
        return self.total + rounds * self.of_next(strategy, server) <= self.limit_mb * MB

    def require_room(self, strategy: FederatedStrategy, server: ServerState) -> None:
        """Raise InputError where not even one round fits: such a run would have no result."""
        if not self.moved and not self.has_room(strategy, server):
            needed = self.of_next(strategy, server) / MB
            raise InputError(
                f"run.max_traffic_mb={self.limit_mb:g}: a single round moves about {needed:.3g} MB over {self.asked} "
                "clients. Raise it, or set fewer run.clients_per_round or a lower adapter.r."
            )

    def describe(self, done: int) -> dict[str, Any]:
        """For the summary; `stopped` says whether the run ended before its last round."""
        return {
            "limit_mb": self.limit_mb,
            "moved_mb": self.total / MB,
            "stopped": done < self.planned,
            "rounds": self.planned,
        }
