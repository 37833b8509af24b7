"""Model, strategy and client of a run, without any data: what the coordinator and a site have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpeft.adapters.adapted import Adapted
from fedpeft.adapters.adapted import build as build_adapted
from fedpeft.clients.app import Local
from fedpeft.clients.guard import Guard
from fedpeft.clients.store import Store
from fedpeft.config import Config
from fedpeft.data.encode import Encoded
from fedpeft.data.records import Records
from fedpeft.errors import InputError
from fedpeft.run import identity
from fedpeft.run.start import require_sent, write_start
from fedpeft.run.world import World, find_device
from fedpeft.strategies.base import FederatedStrategy
from fedpeft.strategies.build import build as build_strategy

LEDGER = Path("ledger") / "server.jsonl"  # in a run's folder: the server's own


class LaterWorld(World):
    """A world of which there are config and strategy; the rest is loaded when some of it is first asked for."""

    def __init__(self, config: Config, strategy: FederatedStrategy, load: Callable[[], World]) -> None:
        self.config, self.strategy, self.load = config, strategy, load

    def __getattr__(self, name: str) -> Any:
        # Python asks here for what is not there, so each field at most once.
        if name not in World.__dataclass_fields__:
            raise AttributeError(name)
        self.__dict__ |= {**vars(self.load()), "strategy": self.strategy}
        return self.__dict__[name]


def bare(config: Config, run: Path, labels: list[str], ledger: Path | None = None, name: str | None = None) -> World:
    """The world of a run whose clients' data are elsewhere.

    Args:
        run: folder of client state.
        labels: names of the classes.
        ledger: folder of the ledgers; default is in the run's.
        name: of the run in the ledgers; default is the folder's.
    """
    torch.set_num_threads(config.run.threads)
    model = build_adapted(config.model, config.adapter, len(labels), config.run.seed).to(find_device(config.run.device))
    content = write_start(config, model, labels)
    strategy = build_strategy(config, len(labels), ledger=run / LEDGER)
    start = strategy.initial(model.state(), config.run.seed)
    if config.adapter.start is not None:
        identity.hold(run, content, config)
        require_sent(strategy, start, config.adapter.start)
        _require_base_reference(model, config.adapter.start)
    store = Store(run, history=2 * config.run.checkpoint_every + 1)
    guard = Guard(config, ledger or run / "ledger", name or run.name)
    local = Local(config, model, start.adapter, {}, {}, store, guard)
    kind = model.base.objective.records
    none = Records(np.zeros((0, 1, 1, 1), np.uint8) if kind == "image" else [], np.zeros(0, np.int64), labels, {}, kind)
    nothing = Encoded({}, torch.zeros(0, dtype=torch.int64))
    return World(config, strategy, local, start, none, none, nothing, nothing)


def _require_base_reference(model: Adapted, path: str) -> None:
    """Refuse to compare with a start that sites do not have."""
    objective = model.base.objective
    if objective.referred and objective.config.reference == "start":
        raise InputError(
            f"adapter.start={path}: sites do not have the folder, so they cannot compare with it. Set "
            "model.task_options.reference=base; or merge the folder into the base model (`fedpeft export RUN --merge`) "
            "and give that as model.name."
        )
