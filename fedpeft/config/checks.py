"""Combinations of a config's keys that cannot work, refused before anything is loaded."""

from __future__ import annotations

import math
from collections import Counter

from fedpeft import registry
from fedpeft.config.schema import Config
from fedpeft.errors import InputError

AUGMENTATIONS = ("crop", "flip", "colour")


def check(config: Config) -> None:
    """Refuse combinations that cannot work; each message names the keys and the way out."""
    run, client, data, adapter = config.run, config.client, config.data, config.adapter
    if (client.local_steps is None) == (client.local_epochs is None):
        raise InputError(
            f"client.local_steps={client.local_steps} and client.local_epochs={client.local_epochs}: give exactly "
            "one (set the other to null)."
        )
    if data.clients is None and data.partition.name != "column" and data.split is None:
        raise InputError(
            f"data.clients=null: all groups of a column, but data.partition.name={data.partition.name}. "
            "Give a number, or set data.partition.name=column and data.partition.column."
        )
    if run.clients_per_round is not None and data.clients is not None and run.clients_per_round > data.clients:
        raise InputError(f"run.clients_per_round={run.clients_per_round} is more than data.clients={data.clients}.")
    if run.deadline_s is not None and run.engine == "cohort" and run.workers == 0:
        raise InputError(
            f"run.deadline_s={run.deadline_s} needs run.workers >= 1 (or run.engine=ray): a client that blocks can "
            "only be stopped by ending its process. Set run.workers=1."
        )
    # 0 is the default, of the other engine; Ray has no client in this process.
    if run.engine == "ray" and run.workers == 0:
        run.workers = 1
    ranks = adapter.client_ranks
    if ranks is not None and not (ranks and all(1 <= rank <= adapter.r for rank in ranks)):
        raise InputError(
            f"adapter.client_ranks={ranks}: every rank must be between 1 and adapter.r={adapter.r}; null gives all "
            "clients that one."
        )
    if client.memory_mb is not None:
        _check_memory(config)
    twice = sorted(name for name, count in Counter(data.labels).items() if count > 1)
    if twice or data.labels == []:
        what = f"{', '.join(twice)} stands there twice" if twice else "there is no name"
        raise InputError(f"data.labels={data.labels}: {what}. Every class has one name; null takes the source's.")
    if config.model.batched_attention and config.model.dtype == "float32":
        raise InputError(
            f"model.batched_attention={config.model.batched_attention}: of attention in bfloat16, and model.dtype is "
            "float32. Leave it out, or set model.dtype=bfloat16 or auto."
        )
    _check_trained_baselines(config)
    if wrong := [name for name in data.augment if name not in AUGMENTATIONS]:
        raise InputError(registry.unknown("data.augment", wrong[0], AUGMENTATIONS))
    # In the table's order: its first completes the config, and all others are to see that.
    for name in registry.names("checks"):
        registry.load("checks", name)(config)


def _check_memory(config: Config) -> None:
    memory, ranks = config.client.memory_mb or [], config.adapter.client_ranks
    if ranks is not None:
        raise InputError(
            f"client.memory_mb={memory} finds what adapter.client_ranks={ranks} gives. Set one of them to null."
        )
    if not memory or not all(0 < each < math.inf for each in memory):
        raise InputError(f"client.memory_mb={memory}: every client has more than 0 MB; null sets no limit.")


def _check_trained_baselines(config: Config) -> None:
    names = config.run.trained_baselines
    for name in names:
        if name not in ("local", "central"):
            raise InputError(registry.unknown("run.trained_baselines", name, ("local", "central")))
        if names.count(name) > 1:
            raise InputError(f"run.trained_baselines={names}: {name} stands there twice.")
    if names and config.run.engine == "sites":
        raise InputError(
            f"run.trained_baselines={names}: they are trained where the clients' records are, and with real sites "
            "those are not here. Set run.trained_baselines=[]."
        )
    if names and config.continual.body is not None:
        raise InputError(
            f"run.trained_baselines={names}: with continual.body={config.continual.body} records come task by task, "
            "and a run is compared with the frozen model's head. Set run.trained_baselines=[]."
        )
