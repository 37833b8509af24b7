"""A world is a config made real in one process: model, strategy, clients' data. It is the same in every process."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpeft import config as configs
from fedpeft import seeds
from fedpeft.adapters.adapted import Adapted
from fedpeft.adapters.adapted import build as build_adapted
from fedpeft.clients.app import Local
from fedpeft.clients.guard import Guard
from fedpeft.clients.reference import with_reference
from fedpeft.clients.store import Store
from fedpeft.config import Config, DataConfig
from fedpeft.continual import curriculum
from fedpeft.data import from_python, source, split
from fedpeft.data.cache import FOLDER, Cache
from fedpeft.data.encode import Encoded, encode, explain_silence
from fedpeft.data.partition import Column
from fedpeft.data.records import Records
from fedpeft.data.skipped import Skipped
from fedpeft.data.split import client_name
from fedpeft.data.wording import require_asked
from fedpeft.errors import InputError
from fedpeft.models import agreement
from fedpeft.run import identity
from fedpeft.run.shares import Shares, hold_out
from fedpeft.run.start import write_start
from fedpeft.state import ServerState
from fedpeft.strategies.base import FederatedStrategy
from fedpeft.strategies.build import build as build_strategy
from fedpeft.strategies.sequence.sequence import find_sequence
from fedpeft.uncollected import uncollected


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


@uncollected()
def load_world(config: Config, run: Path) -> World:
    """The world of a resolved config; its split is read from, or written to, the run folder."""
    torch.set_num_threads(config.run.threads)
    from_python.follow(config.data, run)
    cache = cache_of(config, run)
    train, test = load_records(data_key(config), cache)
    labels = len(train.label_names)
    model = build_adapted(config.model, config.adapter, labels, config.run.seed).to(find_device(config.run.device))
    processor, length = model.base.processor, config.model.max_length
    require_asked(config, test.wording)
    train_encoded = encode(train, processor, config.model.task, length, "training texts", cache)
    test_encoded = encode(test, processor, config.model.task, length, "test texts", cache)
    if not len(test_encoded.teaching()):
        raise InputError(f"data.test: {explain_silence(test_encoded)}, so there is nothing to evaluate.")
    agreement.require_records(model.base, train_encoded, "data.source")
    agreement.require_records(model.base, test_encoded, "data.test")
    # Before the first round: a resumed run must not go on with another model or other records under the same name.
    identity.hold(
        run,
        {
            "base model": identity.of_base(model.base, config),
            "training records": train.fingerprint,
            "test records": test.fingerprint,
            "processed inputs": identity.of_inputs(train_encoded, test_encoded),
            **write_start(config, model, train.label_names),
        },
        config,
    )
    train_encoded, test_encoded = (with_reference(config, model, part, cache) for part in (train_encoded, test_encoded))
    return make_world(config, run, model, (train, test), (train_encoded, test_encoded))


def make_world(
    config: Config,
    run: Path,
    model: Adapted,
    records: tuple[Records, Records],
    encoded: tuple[Encoded, Encoded],
) -> World:
    """The world of a model and records that are there already; its split is read from, or written to, the run folder.

    Args:
        records: to train on and to test on.
        encoded: the same ones as the model takes them.
    """
    (train, test), (train_encoded, test_encoded) = records, encoded
    labels = len(train.label_names)
    parts = client_split(config, train, run)
    strategy = build_strategy(config, labels, list(parts), run / "ledger" / "server.jsonl")
    sequence = find_sequence(strategy)
    start = strategy.initial(model.state(), config.run.seed)
    own, held, counts = hold_out(config, parts, train_encoded)
    # Two checkpoints are kept, and the older may be resumed from: client state has to reach as far back.
    store = Store(run / "clients", history=2 * config.run.checkpoint_every + 1)
    guard = Guard(config, run / "ledger", identity.name_of(run))
    plan = None if sequence is None else sequence.curriculum
    tasks = [counts]
    if plan is not None:  # every task has an account, and so a plan, of its own
        tasks = [
            {client: len(plan.of(train.labels[mine], task)) for client, mine in own.items()}
            for task in range(len(plan.groups))
        ]
    for each in tasks:
        guard.require({client: count for client, count in each.items() if count})
    train_data = Shares(parts, lambda client: train_encoded.view(own[client]))
    holdout = Shares(parts, lambda client: train_encoded.view(held[client]))
    local = Local(config, model, start.adapter, train_data, holdout, store, guard)
    if guard.private:
        # Now, and not in the first round: a model that mixes records cannot be trained privately at all.
        local.require_apart(train_encoded)
    found = train.skipped + train_encoded.skipped + test_encoded.skipped + split.left_out(run / "split.json")
    return World(config, strategy, local, start, train, test, train_encoded, test_encoded, found)


@functools.lru_cache(maxsize=1)
def load_records(text: str, cache: Cache) -> tuple[Records, Records]:
    """Training and test records (read once a process) of a config that `data_key` made the text of."""
    tree = json.loads(text)
    return source.load(configs.build(DataConfig, tree["data"], "data"), tree["task"], tree["seed"], cache)


def cache_of(config: Config, run: Path) -> Cache:
    """Where what was read and tokenized is kept: the config's folder, else one beside the run's folder."""
    named = config.data.cache
    return Cache(run.absolute().parent / FOLDER) if named is None else Cache(Path(named), 0, named=True)


def data_key(config: Config) -> str:
    """What reading the data depends on."""
    data = configs.to_tree(config.data)
    # How records are split among clients is not part of reading them, so many splits share one reading.
    own = {
        key: value for key, value in data.items() if key not in ("clients", "partition", "split", "holdout", "cache")
    }
    return json.dumps({"data": own, "task": config.model.task, "seed": config.run.seed})


def settle_clients(config: Config, run: Path) -> list[str]:
    """The names of a config's clients; sets `data.clients` where it is null and so for the data to say.

    Args:
        run: the folder of the run, which need not be there yet.
    """
    names = client_names(config, run)
    if config.data.clients is None:
        config.data.clients = len(names)
        configs.check(config)
    return names


def client_names(config: Config, run: Path) -> list[str]:
    """The clients of a config, in their order; those that own their records are named by the data, which are read."""
    if config.data.split:
        return split.client_names(Path(config.data.split))
    partitioner = partitioner_of(config)
    if isinstance(partitioner, Column):
        train, _ = load_records(data_key(config), cache_of(config, run))
        return split.owner_names(partitioner.owners(train.columns, config.data.clients))
    return [client_name(index) for index in range(config.data.count)]


def partitioner_of(config: Config) -> Any:
    """The partitioner of the config, with its options.

    Raises:
        InputError: an unknown name or option, or a value out of bounds.
    """
    section = config.data.partition
    return configs.method("partitioners", section.name, section.options, "data.partition")


def client_split(config: Config, train: Records, run: Path) -> dict[str, list[int]]:
    """Client name -> indices of its records: the run's own saved split, the one asked for, or a new one (saved)."""
    saved, count = run / "split.json", config.data.count
    if not saved.exists():
        partitioner = partitioner_of(config)
        if config.data.split:
            parts = _load_saved(Path(config.data.split), train, count)
        elif isinstance(partitioner, Column):
            names = split.owner_names(partitioner.owners(train.columns, count))
            found = partitioner.split(train.labels, train.columns, count, config.run.seed)
            parts = dict(zip(names, map(np.ndarray.tolist, found), strict=True))
        else:
            names = [client_name(index) for index in range(count)]
            parts = dict(zip(names, _split_records(config, partitioner, train, count), strict=True))
        # Saved, then read back: a new run and a resumed one take the same way.
        split.save(saved, parts, train, config)
    return _load_saved(saved, train, count)


def _load_saved(path: Path, train: Records, count: int) -> dict[str, list[int]]:
    names = split.client_names(path)
    expected = names if len(names) == count else [client_name(index) for index in range(count)]
    return split.load(path, train.fingerprint, expected)


def _split_records(config: Config, partitioner: Any, train: Records, clients: int) -> list[list[int]]:
    """Every client's record numbers. In a sequence of tasks each task's records are split anew, so that skew is within
    tasks and every client meets every task; but for records with owners, which stay with their client.
    """
    if config.continual.body is None or config.data.partition.name == "column":
        found: list[list[int]] = partitioner.split(train.labels, train.columns, clients, config.run.seed)
        return found
    plan = curriculum.make_curriculum(config.continual, len(train.label_names), config.run.rounds, config.run.seed)
    own: list[list[int]] = [[] for _ in range(clients)]
    for task in range(len(plan.groups)):
        mine = plan.of(train.labels, task)
        part = train.take(mine)
        # Another seed a task: with one, every task would be skewed towards the same clients.
        seed = seeds.derive(config.run.seed, "task", task)
        for client, numbers in enumerate(partitioner.split(part.labels, part.columns, clients, seed)):
            own[client] += mine[numbers].tolist()
    return own


def find_device(name: str) -> torch.device:
    """The torch device of this name; auto is the accelerator that torch has, else the CPU.

    Raises:
        InputError: torch cannot use it here.
    """
    if name != "auto":
        try:
            # A tensor, as `torch.device` takes names of what this machine does not have.
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # torch built without that backend asserts
            raise InputError(f"run.device: '{name}' is not usable here: {str(error).splitlines()[0]}") from error
    return (
        torch.accelerator.current_accelerator() or torch.device("cpu")
        if torch.accelerator.is_available()
        else torch.device("cpu")
    )
