"""A finished run opened for unlearning: its records by what happens to them, over one plain LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fedpeft import config as configs
from fedpeft.adapters import folder
from fedpeft.config import Config, ContinualConfig, PrivacyConfig, SecAggConfig, StrategyConfig, TTAConfig
from fedpeft.data import split
from fedpeft.data.records import Records
from fedpeft.errors import InputError
from fedpeft.models.quantized import is_quantized
from fedpeft.objectives.base import load_objective
from fedpeft.run.world import World, load_world
from fedpeft.state import AdapterState
from fedpeft.strategies.sequence.build import head_needs_sums, make_body
from fedpeft.unlearning.asked import CLIENT, RECORDS, TASK, Asked
from fedpeft.unlearning.method import Case, UnlearningMethod


def open_case(
    run: Path, config: Config, method: UnlearningMethod, ask: Callable[[Records, dict[str, list[int]]], Asked]
) -> Case:
    """Read a run and its records.

    Args:
        config: of the run, as `read_config` gave it.
        ask: what is to be forgotten, of the training records and the clients' shares.

    Raises:
        InputError: nothing of what is asked was trained on, or nothing else was; the method does not take the run.
    """
    adapter = folder.load(run / "adapter")
    world = load_world(_plain_config(config, adapter), run)
    _require_method(method, world)
    # Adapter and base become one weight, which half precision would round.
    world.local.model.base.make_dense(torch.float32)
    parts = split.load(run / "split.json", world.train.fingerprint, split.client_names(run / "split.json"))
    asked = ask(world.train, parts)
    trained = np.concatenate([data.rows for data in world.local.train_data.values()])
    gone = np.isin(trained, asked.numbers)
    if not gone.any():
        raise InputError(
            f"--{asked.kind} {asked.name}: the run has trained on none of the {len(asked.numbers)} records: they are "
            "no client's, or held out by data.holdout. There is nothing to forget."
        )
    if gone.all():
        raise InputError(f"--{asked.kind} {asked.name}: these are all records that the run has trained on.")
    encoded, kept = world.train_encoded, np.ones(len(world.test), dtype=bool)
    if asked.kind == TASK:
        kept = ~np.isin(world.test.labels, world.train.labels[asked.numbers])
    return Case(
        run,
        config,
        world,
        adapter,
        asked,
        encoded.view(np.sort(trained[gone])),
        encoded.view(np.sort(trained[~gone])),
        encoded.view(_find_alike(world, asked, parts)),
        world.test_encoded.view(np.flatnonzero(kept)),
    )


def read_config(run: Path) -> Config:
    """The config of a run that can be unlearned from.

    Raises:
        InputError: it is of real sites, has not finished, or has no one model that its adapter folder holds.
    """
    config = configs.load(run / "resolved.yaml")
    if config.run.engine == "sites":
        raise InputError(
            f"{run}: a run of real sites (run.engine=sites), whose records are not here. Stop the site "
            "that is to be forgotten, and train a new run without it by `fedpeft server run`: that is exact "
            "retraining. For single records, the site takes them out of its data before the new run."
        )
    if not (run / "adapter" / "adapter_config.json").is_file():
        raise InputError(
            f"{run}: no adapter/adapter_config.json, so there is nothing to unlearn from. Has the run finished? "
            "`fedpeft resume` goes on with it."
        )
    if (run / "adapter" / "clients").is_dir():
        raise InputError(
            f"{run}: with strategy.name={config.strategy.name} every client keeps a part of its own, so there is no "
            "one model to unlearn from. A client that leaves takes its own part along; what the others share is "
            "retrained by `fedpeft simulate` with a data.split without it."
        )
    if load_objective(config.model.task).referred:
        raise InputError(
            f"model.task={config.model.task}: its loss is against the model before training, so what a record's own "
            "loss tells of its membership is not defined here. Retrain by `fedpeft simulate` with a data.split without "
            "it."
        )
    section = config.continual
    if section.body is not None and (head_needs_sums(config) or make_body(section).most_views > 1):
        raise InputError(
            f"continual.body={section.body}, continual.head={section.head}: the run answers by sums or averages that "
            "are not in its adapter, and hold what is to be forgotten. Only bodies with one adapter and "
            "continual.head=linear (or masked) can be unlearned from; else run it again without the records."
        )
    return config


def _plain_config(config: Config, adapter: AdapterState) -> Config:
    """The same base, records and split, under a fresh LoRA at the adapter's layers, and nothing around it."""
    plain = replace(
        config.adapter,
        name="lora",
        options={},
        start=None,
        client_ranks=None,
        penalty=None,
        penalty_options={},
        # By their full names: an ending may fit layers that the run left alone.
        target_modules=sorted(adapter.lora_sites()),
        train_head=any(site.kind == "head" for site in adapter.sites.values()),
    )
    return replace(
        config,
        adapter=plain,
        strategy=StrategyConfig(),
        privacy=PrivacyConfig(),
        secagg=SecAggConfig(),
        tta=TTAConfig(),
        continual=ContinualConfig(),
    )


def _require_method(method: UnlearningMethod, world: World) -> None:
    base = world.local.model.base
    objective = base.objective
    if any(is_quantized(base.layer(site)) for site in world.start.adapter.lora_sites()):
        raise InputError(
            f"model.quantization={world.config.model.quantization}: adapter and base become one weight here, and "
            "a base kept in few bits holds none. `fedpeft export --merge` writes a dense model; a run over that as "
            "model.name can be unlearned from, or run it again with a data.split without the records."
        )
    if method.needs_classes and objective.labelled not in ("class", "tags", "none"):
        raise InputError(
            f"model.task={objective.name}: {type(method).__name__} lowers the score of the right answer among others, "
            f"and its records have {objective.labelled}. Give --method retrain."
        )
    if not method.reruns and "accuracy" not in objective.all_measures:
        raise InputError(
            f"model.task={objective.name}: it has no accuracy, by which {type(method).__name__} sees what is kept. "
            "Give --method retrain."
        )


def _find_alike(world: World, asked: Asked, parts: dict[str, list[int]]) -> np.ndarray:
    """Numbers of the held-out records of the clients that are asked about; of a task none, as others have it too."""
    mine = set(asked.numbers.tolist())
    owners = {
        CLIENT: [asked.name],
        RECORDS: [client for client, part in parts.items() if mine & set(part)],
        TASK: [],
    }[asked.kind]
    rows = [world.local.holdout[client].rows for client in owners]
    held = np.concatenate([np.empty(0, dtype=np.int64), *rows])
    # A file may name records that are held out, which are no reference for themselves.
    return held if asked.kind == CLIENT else held[~np.isin(held, asked.numbers)]
