"""peft adapter folders: written so that stock peft loads them, read without loading any model.

adapter_config.json, adapter_model.safetensors   as `PeftModel.save_pretrained` writes them, a trained head included
head.safetensors                                 the trained head alone, under the base model's parameter names
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fedpeft import registry
from fedpeft.adapters.peft_files import (
    PREFIX,
    named_parameter,
    require_numbers,
    require_plain_lora,
    saved_module,
)
from fedpeft.adapters.placed import OWN
from fedpeft.errors import InputError
from fedpeft.files import read_object, write_bytes, write_tensors
from fedpeft.objectives.base import load_objective
from fedpeft.state import AdaptedLayer, AdapterState

CONFIG, WEIGHTS, HEAD = "adapter_config.json", "adapter_model.safetensors", "head.safetensors"
POOLED = "FEATURE_EXTRACTION"


def save(
    adapter: AdapterState,
    folder: Path,
    *,
    base: str,
    task: str | None = None,
    pooled_head: bool = False,
    revision: str | None = None,
    modules: list[str] | None = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Write a flat state (see `flat`) as a peft folder. Of plain LoRA, sites may have different ranks and scales.

    Args:
        base: what `from_pretrained` takes to get the base model.
        pooled_head: the head is fedpeft's mean-pooled one, no module of the base: it goes to head.safetensors only.
        revision: of the base, where it has one.
        modules: full names of the modules that a head is in; None is the part of each name before the first dot.
        settings: the config of another tuner than plain LoRA (`Injected.folder`), of ours with the names of `placed`.

    Raises:
        InputError: there is nothing to save.
    """
    tensors: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    placed = settings is not None and settings["peft_type"].startswith(OWN)
    for key, value in adapter.tensors.items():
        site, _, role = key.rpartition("/")
        kind = adapter.sites[site].kind if site in adapter.sites else "peft"
        if kind == "head":
            head[f"{site}.{role}"] = value
        elif placed:
            tensors[f"{site}.{role}"] = value
        else:
            tensors[f"base_model.{site}" if kind == "peft" else f"{PREFIX}{site}.lora_{role}.weight"] = value
    config = dict(_plain_lora(adapter, folder) if settings is None else settings)
    saved = config.get("modules_to_save") or []
    if head and not (pooled_head or placed):
        saved = [*saved, *(modules or sorted({key.split(".")[0] for key in head}))]
        tensors |= {f"{PREFIX}{name}": value for name, value in head.items()}
    config |= {
        "task_type": POOLED if pooled_head else load_objective(task).peft_task if task else None,
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "modules_to_save": saved or None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors)
    if head:
        write_tensors(folder / HEAD, head)
    # Last: a folder without it is not taken for an adapter.
    write_bytes(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def _plain_lora(adapter: AdapterState, folder: Path) -> dict[str, Any]:
    ranks = {site: adapter.rank(site) for site in adapter.lora_sites()}
    alphas = {site: adapter.sites[site].scaling * rank for site, rank in ranks.items()}
    if not ranks:
        raise InputError(f"{folder}: there is no LoRA factor to save.")
    rank, alpha = max(ranks.values()), max(alphas.values())
    return {
        "peft_type": "LORA",
        "bias": "none",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": sorted(ranks),
        "rank_pattern": {site: value for site, value in ranks.items() if value != rank},
        "alpha_pattern": {site: value for site, value in alphas.items() if value != alpha},
    }


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder.

    Raises:
        InputError: there is none, or none that can be read; of a run's folder with where its adapter is.
    """
    if not (folder / CONFIG).exists() and (folder / "adapter" / CONFIG).is_file():
        raise InputError(f"{folder}: a run folder, and no adapter itself. Its adapter is {folder / 'adapter'}.")
    return read_object(folder / CONFIG)


def about(folder: Path) -> dict[str, Any]:
    """What `save` is told beside the adapter, as an existing peft folder has it."""
    config = read_config(folder)
    kind, saved = config.get("task_type"), config.get("modules_to_save") or []
    found = (saved_module(name.removeprefix(PREFIX), saved) for name in _weight_names(folder)) if saved else ()
    return {
        "base": str(config.get("base_model_name_or_path") or ""),
        "revision": config.get("revision"),
        "task": _task_of(kind),
        "pooled_head": kind == POOLED and (folder / HEAD).exists(),
        "modules": sorted({module for module in found if module}) or None,
    }


def settings_of(folder: Path) -> dict[str, Any]:
    """The config of an existing folder without what `about` says of it: `save` takes it for another tuner's."""
    config, heads = read_config(folder), about(folder)["modules"] or []
    return {**config, "modules_to_save": [name for name in config.get("modules_to_save") or [] if name not in heads]}


def about_all(folders: list[Path], base: str | None = None) -> dict[str, Any]:
    """What `save` is told about an adapter made of these.

    Args:
        base: what the result is to name as its base; the user's word that all adapters are for it.

    Raises:
        InputError: their base models have other names or revisions, and `base` is not given; they are for other tasks.
    """
    first = about(folders[0])
    for path in folders[1:]:
        other = about(path)
        if base is None and (place(other["base"]), other["revision"]) != (place(first["base"]), first["revision"]):
            raise InputError(
                f"{path}: its base model is {_name_base(other)}; that of {folders[0]} is {_name_base(first)}. If both "
                "are one model, say so with --base and the name that the result is to have."
            )
        if other["task"] and first["task"] and other["task"] != first["task"]:
            raise InputError(f"{path}: made for {other['task']}; {folders[0]} for {first['task']}.")
        if other["pooled_head"] != first["pooled_head"]:
            raise InputError(
                f"{path}: its head is {describe_head(other)}; that of {folders[0]} is {describe_head(first)}."
            )
        first = {**first, "task": first["task"] or other["task"]}
    return first if base is None else {**first, "base": base, "revision": None}


def load(folder: Path) -> AdapterState:
    """Read a peft LoRA folder.

    Raises:
        InputError: a file is missing or damaged, the adapter is not plain LoRA, or a value is not finite.
    """
    config = read_config(folder)
    require_plain_lora(folder, config)
    weights, saved, tensors = read_weights(folder), config.get("modules_to_save") or [], {}
    require_numbers(folder, weights)
    for name, value in weights.items():
        tensors["/".join(named_parameter(folder, name, saved))] = value
    if (folder / HEAD).exists():
        head = read_tensors(folder / HEAD)
        require_numbers(folder, head)
        for name, value in head.items():
            site, _, role = name.rpartition(".")
            tensors[f"{site}/{role}"] = value
    return AdapterState(tensors, _build_sites(folder, tensors, config))


def place(base: str) -> str:
    """One spelling of a local path; the name itself where nothing lies there."""
    return str(Path(base).resolve()) if base and Path(base).exists() else base


def _name_base(about: dict[str, Any]) -> str:
    return f"'{about['base']}'" + (f" at revision {about['revision']}" if about["revision"] else "")


def _task_of(kind: str | None) -> str | None:
    """The first objective that peft has this `task_type` for."""
    names = registry.names("objectives") if kind else []
    return next((name for name in names if load_objective(name).peft_task == kind), None)


def describe_head(about: dict[str, Any]) -> str:
    """Whose head an adapter has, in words."""
    return "a mean-pooled one of fedpeft's" if about["pooled_head"] else "the base model's"


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, also of one that an old peft has written.

    Raises:
        InputError: they are missing or damaged.
    """
    pickled = folder / "adapter_model.bin"
    if not (folder / WEIGHTS).exists() and pickled.exists():
        return read_tensors(pickled)
    return read_tensors(folder / WEIGHTS)


def _weight_names(folder: Path) -> list[str]:
    if not (folder / WEIGHTS).exists():
        return list(read_weights(folder))
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            return list(file.keys())
    except Exception as error:
        raise InputError(f"{folder / WEIGHTS}: not readable: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        # An old peft file is a pickle: without `weights_only` it could run code.
        return torch.load(path, map_location="cpu", weights_only=True) if path.suffix == ".bin" else load_file(path)
    except Exception as error:  # safetensors and pickle raise errors of many kinds
        raise InputError(f"{path}: not readable: {error}") from error


def _build_sites(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, AdaptedLayer]:
    sites: dict[str, AdaptedLayer] = {}
    for key in tensors:
        site, _, role = key.rpartition("/")
        if role not in ("A", "B"):
            sites.setdefault(site, AdaptedLayer("head", tuple(tensors[key].shape)))
            continue
        if f"{site}/A" not in tensors or f"{site}/B" not in tensors:
            raise InputError(f"{folder}: {site} has only one LoRA factor.")
        A, B = tensors[f"{site}/A"], tensors[f"{site}/B"]
        rank = A.shape[0]
        if A.ndim != 2 or B.ndim != 2 or B.shape[1] != rank:
            raise InputError(f"{folder}: {site} has factors of shapes {list(B.shape)} and {list(A.shape)}.")
        alpha = _match_pattern(config.get("alpha_pattern") or {}, site, float(config["lora_alpha"]))
        sites[site] = AdaptedLayer(
            "lora", (B.shape[0], A.shape[1]), alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
        )
    return sites


def _match_pattern(pattern: dict[str, float], site: str, default: float) -> float:
    """peft's rule: the first key that matches the module's name, or its ending after a dot, as a regular expression."""
    return next((float(value) for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", site)), default)
