"""The adapter of a run, copied out, or merged into its base model."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fedpeft import config as configs
from fedpeft import folders, registry
from fedpeft.adapters import folder
from fedpeft.adapters.flat import flat
from fedpeft.config import Config
from fedpeft.errors import InputError, RunError
from fedpeft.models import loading
from fedpeft.models.base import Base
from fedpeft.record import checkpoint
from fedpeft.run import identity
from fedpeft.run.best import Best
from fedpeft.state import AdapterState
from fedpeft.strategies.build import build

log = logging.getLogger("fedpeft")


def export(run: Path, to: Path, merge: bool, best: bool = False, round_number: int | None = None) -> dict[str, Any]:
    """Copy `run/adapter` to `to`, or save the base model with the adapter merged in (and its tokenizer or processor).

    Args:
        best: the state that `run.best` has kept, in place of the last one.
        round_number: likewise that of a checkpoint which is still there.

    Raises:
        InputError: `run` has no finished adapter, its base has become another model, or `to` is not empty.
        RunError: the model cannot be written.
    """
    run = folders.run_folder(run)
    source = run / "adapter"
    if not (source / "adapter_config.json").is_file():
        raise InputError(f"{run}: no adapter/adapter_config.json; is it a run folder, and has the run finished?")
    config = configs.load(run / "resolved.yaml")
    with folders.filled(to, "--to") as draft, _chosen(run, config, best, round_number) as source:
        if not merge:
            if config.model.name not in registry.EMBEDDED:
                _compare(run, config)
            shutil.copytree(source, draft, dirs_exist_ok=True)
            if config.model.quantization is not None:
                log.warning(
                    "the adapter was trained over a base that bitsandbytes kept as %s: load it so for the "
                    "same answers (docs/commands.md has the lines)",
                    config.model.quantization,
                )
            return {"adapter": str(to)}
        names = label_names(run / "split.json")
        base = loading.load(config.model, len(names), config.run.seed)
        identity.hold(run, {"base model": identity.of_base(base, config)}, config)
        if config.model.quantization is not None:
            log.warning(
                "the base was kept as %s: the adapter is merged into its dequantised weights, which is what it was "
                "trained over, and the model that is saved is in %s",
                config.model.quantization,
                config.model.dtype,
            )
        base.make_dense()
        merge_into(base, folder.load(source))
        try:
            _save(base, names, draft)
        except SafetensorError as error:  # its writer has no OSError
            raise RunError(f"{to}: the model could not be written: {error}.") from error
        if (source / folder.HEAD).exists():
            shutil.copy2(source / folder.HEAD, draft / folder.HEAD)
        return {"model": str(to)}


@contextmanager
def _chosen(run: Path, config: Config, best: bool, round_number: int | None) -> Iterator[Path]:
    """The adapter folder that is meant, made of a checkpoint where it is not the last one's."""
    if not best and round_number is None:
        yield run / "adapter"
        return
    state = checkpoint.read(_find_state(run, config, best, round_number))
    strategy = build(config, len(label_names(run / "split.json")))
    if strategy.keeps:
        raise InputError(
            f"--round {round_number}: with strategy.name={config.strategy.name} clients keep "
            f"{', '.join(strategy.keeps)}, and no checkpoint holds these. Leave --round out: the last round has an "
            "adapter of each client."
        )
    with tempfile.TemporaryDirectory() as made:
        adapter = flat(strategy.before_round(state).adapter)
        about = folder.about(run / "adapter")
        if any(layer.kind == "peft" for layer in adapter.sites.values()):
            about["settings"] = folder.settings_of(run / "adapter")
        folder.save(adapter, Path(made), **about)
        yield Path(made)


def _find_state(run: Path, config: Config, best: bool, round_number: int | None) -> Path:
    if best and round_number is not None:
        raise InputError(f"--best and --round {round_number}: give one of them.")
    parent, number = run / "checkpoints", round_number
    if best:
        found = Best.open(config, run)
        if found is None:
            raise InputError(f"{run}: --best: the run had no run.best to choose by, so none was kept.")
        parent, number = found.folder, found.find_round(config.run.rounds)
    states = checkpoint.of_round(parent, number or 0)
    if not states:
        there = ", ".join(map(str, checkpoint.rounds(parent))) or "none"
        raise InputError(
            f"{run}: {'--best' if best else f'--round {number}'}: no state of that round is kept in {parent}; there "
            f"are: {there}. run.keep_checkpoints says how many checkpoints stay."
        )
    return states[-1]


def _compare(run: Path, config: Config) -> None:
    """Refuse an adapter whose base has become another one. A base that is not on this machine is said to be unknown."""
    try:
        base = loading.load(config.model, len(label_names(run / "split.json")), config.run.seed)
    except InputError as error:
        log.warning("the base model cannot be loaded here, so whether it is the one of the run is not known: %s", error)
        return
    identity.hold(run, {"base model": identity.of_base(base, config)}, config)


def _save(base: Base, names: list[str], to: Path) -> None:
    merged: Any = base.backbone
    if base.objective.headed:
        merged.config.id2label = dict(enumerate(names))
        merged.config.label2id = {name: index for index, name in enumerate(names)}
    merged.save_pretrained(to)
    if base.processor is not None:
        base.processor.save_pretrained(to)


def label_names(path: Path) -> list[str]:
    """The classes of a run, in the order of its head's outputs."""
    try:
        return [str(name) for name in json.loads(path.read_text())["histogram"]["labels"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot read the run's label names: {error!r}") from error


@torch.no_grad()
def merge_into(base: Base, adapter: AdapterState) -> None:
    """W <- W + s B A at every site, heads replaced."""
    for site in adapter.lora_sites():
        change = adapter.sites[site].scaling * (adapter[f"{site}/B"].double() @ adapter[f"{site}/A"].double())
        weight = base.weight(site)
        weight.copy_((weight.double() + change).to(weight.dtype))
    for key, value in adapter.tensors.items():
        if adapter.role(key) == "head":
            path, _, role = key.rpartition("/")
            name, _, rest = path.partition(".")
            module = base.heads[name].get_submodule(rest) if rest else base.heads[name]
            getattr(module, role).copy_(value)
