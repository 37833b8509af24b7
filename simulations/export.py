"""The adapter of a run, copied out, or merged into its base model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from fedpeft import config as configs
from fedpeft import models
from fedpeft.adapters import folder
from fedpeft.errors import InputError
from fedpeft.state import AdapterState


def export(run: Path, to: Path, merge: bool) -> dict[str, Any]:
    """Copy `run/adapter` to `to`, or save the base model with the adapter merged in (and its tokenizer or processor).

    Raises:
        InputError: `run` has no finished adapter, or `to` is not empty.
    """
    source = run / "adapter"
    if not (source / "adapter_config.json").is_file():
        raise InputError(f"{run}: no adapter/adapter_config.json; is it a run folder, and has the run finished?")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError(f"--to: {to} is not an empty folder.")
    if not merge:
        shutil.copytree(source, to, dirs_exist_ok=True)
        return {"adapter": str(to)}
    config = configs.load(run / "resolved.yaml")
    adapter = folder.load(source)
    names = _label_names(run / "split.json")
    base = models.load(config.model, len(names), config.run.seed)
    merge_into(base, adapter)
    merged: Any = base.backbone
    if config.model.task != "causal-lm":
        merged.config.id2label = dict(enumerate(names))
        merged.config.label2id = {name: index for index, name in enumerate(names)}
    merged.save_pretrained(to)
    if base.processor is not None:
        base.processor.save_pretrained(to)
    if (source / folder.HEAD).exists():
        shutil.copy2(source / folder.HEAD, to / folder.HEAD)
    return {"model": str(to)}


def _label_names(path: Path) -> list[str]:
    """The classes of a run, in the order of its head's outputs."""
    try:
        return [str(name) for name in json.loads(path.read_text())["histogram"]["labels"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot read the run's label names: {error!r}") from error


@torch.no_grad()
def merge_into(base: models.Base, adapter: AdapterState) -> None:
    """W <- W + s B A at every site, heads replaced."""
    for site in adapter.lora_sites():
        layer = base.backbone.get_submodule(site)
        change = adapter.sites[site].scaling * (adapter[f"{site}/B"].double() @ adapter[f"{site}/A"].double())
        if type(layer).__name__ == "Conv1D":
            change = change.T
        weight = layer.get_parameter("weight")
        weight.copy_((weight.double() + change).to(weight.dtype))
    for key, value in adapter.tensors.items():
        if adapter.role(key) == "head":
            path, _, role = key.rpartition("/")
            name, _, rest = path.partition(".")
            module = base.heads[name].get_submodule(rest) if rest else base.heads[name]
            getattr(module, role).copy_(value)
