"""What a config describes, made real in one process: model, strategy, clients' data. The same in every process."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context
from flwr.clientapp import ClientApp

from fedpeft import agreement, seeds
from fedpeft import config as configs
from fedpeft.adapters.adapted import build as build_adapted
from fedpeft.clients.app import Local, client_app
from fedpeft.clients.private import Guard
from fedpeft.clients.store import Store
from fedpeft.config import Config
from fedpeft.continual import curriculum
from fedpeft.data import source, split
from fedpeft.data.encode import Encoded, encode
from fedpeft.data.skipped import Skipped, said_elsewhere
from fedpeft.data.source import Records
from fedpeft.data.split import client_name
from fedpeft.errors import InputError
from fedpeft.seeds import numpy_generator
from fedpeft.simulations import faults
from fedpeft.strategies.base import FederatedStrategy, ServerState
from fedpeft.strategies.build import build as build_strategy
from fedpeft.strategies.learning.rounds import learning_of


@dataclass
class World:
    """Everything of one run in one process. `skipped` is what of the data is not learned from, or cut."""

    config: Config
    strategy: FederatedStrategy
    local: Local
    start: ServerState
    train: Records
    test: Records
    train_encoded: Encoded
    test_encoded: Encoded
    skipped: tuple[Skipped, ...] = ()


class Shares(Mapping[str, Encoded]):
    """Each client's records, copied out of the whole set only when asked for: a client costs its list of numbers.

    Args:
        parts: client -> numbers of its records.
    """

    def __init__(self, whole: Encoded, parts: dict[str, np.ndarray]) -> None:
        self.whole, self.parts = whole, parts

    def __getitem__(self, client: str) -> Encoded:
        return self.whole.subset(self.parts[client])

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


@functools.lru_cache(maxsize=1)
def world(text: str, run: Path) -> World:
    """Build (once a process) the world of a resolved config; its split is read from, or written to, the run folder."""
    config = configs.from_yaml(text)
    torch.set_num_threads(config.run.threads)
    train, test = source.load(config.data, config.model.task, config.run.seed)
    labels = len(train.label_names)
    model = build_adapted(config.model, config.adapter, labels, config.run.seed).to(device(config.run.device))
    processor, length = model.base.processor, config.model.max_length
    train_encoded = encode(train, processor, config.model.task, length, "training texts")
    test_encoded = encode(test, processor, config.model.task, length, "test texts")
    if not len(test_encoded.teaching()):
        raise InputError("data.test: no test text has two tokens, so there is nothing to evaluate.")
    agreement.require_records(model.base, train_encoded, "data.source")
    agreement.require_records(model.base, test_encoded, "data.test")
    strategy = build_strategy(config, labels)
    learning = learning_of(strategy)
    start = strategy.initial(model.state(), config.run.seed)
    own: dict[str, np.ndarray] = {}
    held: dict[str, np.ndarray] = {}
    teaches = np.zeros(len(train), dtype=bool)
    teaches[train_encoded.teaching()] = True
    for client, indices in client_split(config, train, run).items():
        mine = np.array(indices)[teaches[indices]]
        if not len(mine):
            raise InputError(f"data.partition: none of the {len(indices)} texts of {client} has two tokens, so nothing "
                             "can be predicted. Give it longer ones, or split the data otherwise.")
        order = numpy_generator(config.run.seed, "holdout", client).permutation(mine)
        kept = int(len(order) * config.data.holdout)
        if config.data.holdout and not 0 < kept < len(order):
            raise InputError(
                f"data.holdout={config.data.holdout}: {client} has {len(order)} records, of which {kept} would be "
                "held out."
            )
        own[client], held[client] = order[kept:], order[:kept]
    store = Store(run / "clients", history=2 * config.run.checkpoint_every + 1)
    guard = Guard(config, run / "ledger", run.name)
    plan = None if learning is None else learning.curriculum
    parts = [own] if plan is None else [{client: plan.of(train.labels[mine], task) for client, mine in own.items()}
                                        for task in range(len(plan.groups))]
    for part in parts:  # every task has an account, and so a plan, of its own
        guard.require({client: len(mine) for client, mine in part.items() if len(mine)})
    shares = Shares(train_encoded, own), Shares(train_encoded, held)
    local = Local(config, model, start.adapter, *shares, store, guard)
    found = train.skipped + train_encoded.skipped + test_encoded.skipped + split.left_out(run / "split.json")
    return World(config, strategy, local, start, train, test, train_encoded, test_encoded, found)


def client_split(config: Config, train: Records, run: Path) -> dict[str, list[int]]:
    """Client name -> indices of its records: the run's own saved split, the one asked for, or a new one (saved)."""
    names = [client_name(index) for index in range(config.data.clients)]
    saved = run / "split.json"
    if not saved.exists():
        if config.data.split:
            parts = split.load(Path(config.data.split), train.fingerprint, names)
        else:
            section = config.data.partition
            partitioner = configs.method("partitioners", section.name, section.options, "data.partition")
            parts = dict(zip(names, _split(config, partitioner, train, len(names)), strict=True))
        split.save(saved, parts, train, config)
    return split.load(saved, train.fingerprint, names)


def _split(config: Config, partitioner: Any, train: Records, clients: int) -> list[list[int]]:
    """Every client's record numbers. In a sequence of tasks each task's records are split anew, so that skew is within
    tasks and every client meets every task; but for records with owners, which stay with their client.
    """
    if config.continual.body is None or config.data.partition.name == "column":
        found: list[list[int]] = partitioner.split(train.labels, train.columns, clients, config.run.seed)
        return found
    plan = curriculum.make(config.continual, len(train.label_names), config.run.rounds, config.run.seed)
    own: list[list[int]] = [[] for _ in range(clients)]
    for task in range(len(plan.groups)):
        mine = plan.of(train.labels, task)
        part = train.take(mine)
        seed = seeds.derive(config.run.seed, "task", task)
        for client, numbers in enumerate(partitioner.split(part.labels, part.columns, clients, seed)):
            own[client] += mine[numbers].tolist()
    return own


def device(name: str) -> torch.device:
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # torch built without that backend asserts
            raise InputError(f"run.device: '{name}' is not usable here: {str(error).splitlines()[0]}") from error
    return (
        torch.accelerator.current_accelerator() or torch.device("cpu")
        if torch.accelerator.is_available()
        else torch.device("cpu")
    )


def name_of(context: Context) -> str:
    return client_name(int(context.node_config["partition-id"]))


def make_app(text: str, run: Path) -> ClientApp:
    """The ClientApp of a run, its world loaded; picklable by name for worker processes and Ray actors."""
    with said_elsewhere():
        local = world(text, run).local
    mods = [faults.mod(local.config.run.faults, name_of)] if local.config.run.faults else []
    return client_app(lambda: local, name_of, mods)


