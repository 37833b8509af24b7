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
from safetensors.torch import load_file
from torch import Tensor

from fedpeft.errors import InputError
from fedpeft.files import write_bytes, write_tensors
from fedpeft.state import AdapterState, Site

WEIGHTS, HEAD = "adapter_model.safetensors", "head.safetensors"
PREFIX = "base_model.model."
TASKS = {"image-classification": None, "sequence-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
POOLED = "FEATURE_EXTRACTION"
# Initialisations that move the base weights: the factors alone are not the adapter then.
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def save(adapter: AdapterState, folder: Path, *, base: str, task: str | None = None, pooled_head: bool = False) -> None:
    """Write a plain LoRA state (see `flat`) as a peft folder. Sites may have different ranks and scales.

    Args:
        base: what `from_pretrained` takes to get the base model.
        pooled_head: the head is fedpeft's mean-pooled one, no module of the base: it goes to head.safetensors only.
    """
    tensors: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for key, value in adapter.tensors.items():
        site, _, role = key.rpartition("/")
        if adapter.sites[site].kind == "head":
            head[f"{site}.{role}"] = value
        else:
            tensors[f"{PREFIX}{site}.lora_{role}.weight"] = value
    for site in adapter.lora_sites():
        ranks[site] = adapter.rank(site)
        alphas[site] = adapter.sites[site].scaling * ranks[site]
    if not ranks:
        raise InputError(f"{folder}: there is no LoRA factor to save.")
    rank, alpha = max(ranks.values()), max(alphas.values())
    config = {
        "peft_type": "LORA",
        "task_type": POOLED if pooled_head else TASKS.get(task or ""),
        "base_model_name_or_path": base,
        "inference_mode": True,
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
        "modules_to_save": None if pooled_head or not head else sorted({name.split(".")[0] for name in head}),
    }
    if not pooled_head:
        tensors |= {f"{PREFIX}{name}": value for name, value in head.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors)
    if head:
        write_tensors(folder / HEAD, head)
    write_bytes(folder / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())


def about(folder: Path) -> dict[str, Any]:
    """What `save` is told beside the adapter, as an existing peft folder has it: base, task, pooled_head."""
    config = _config(folder)
    kind = config.get("task_type")
    return {"base": str(config.get("base_model_name_or_path") or ""),
            "task": next((name for name, value in TASKS.items() if value and value == kind), None),
            "pooled_head": kind == POOLED and (folder / HEAD).exists()}


def load(folder: Path) -> AdapterState:
    """Read a peft LoRA folder.

    Raises:
        InputError: a file is missing or damaged, or the adapter is not plain LoRA.
    """
    config = _config(folder)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{folder}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be read.")
    for option in ("use_dora", "lora_bias", "use_bdlora"):
        if config.get(option):
            raise InputError(f"{folder}: {option} is set; only plain LoRA factors can be read.")
    if config.get("bias", "none") != "none":
        raise InputError(
            f"{folder}: bias={config['bias']!r}: trained biases of the base cannot be read; only bias='none'."
        )
    if str(config.get("init_lora_weights")).startswith(MOVES_BASE):
        raise InputError(
            f"{folder}: init_lora_weights={config['init_lora_weights']!r} moves the base weights. Save it as a plain "
            "LoRA first (peft: save_pretrained with path_initial_model_for_weight_conversion)."
        )
    if not isinstance(config.get("lora_alpha"), int | float):
        raise InputError(
            f"{folder}: adapter_config.json: lora_alpha is {config.get('lora_alpha')!r}; expected a number."
        )
    tensors = {}
    for name, value in _weights(folder).items():
        site, _, role = name.removeprefix(PREFIX).rpartition(".")
        parent, _, part = site.rpartition(".")
        if part in ("lora_A", "lora_B"):
            site, role = parent, part[-1]
        elif "lora_" in part or "lora_" in role:
            raise InputError(f"{folder}: {name}: only LoRA factors of linear layers can be read.")
        tensors[f"{site}/{role}"] = value
    if (folder / HEAD).exists():
        for name, value in _read(folder / HEAD).items():
            site, _, role = name.rpartition(".")
            tensors[f"{site}/{role}"] = value
    return AdapterState(tensors, _sites(folder, tensors, config))


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no readable adapter_config.json: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{folder}: adapter_config.json holds {type(config).__name__}, not an object.")
    return config


def _weights(folder: Path) -> dict[str, Tensor]:
    pickled = folder / "adapter_model.bin"
    if not (folder / WEIGHTS).exists() and pickled.exists():
        return _read(pickled)
    return _read(folder / WEIGHTS)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True) if path.suffix == ".bin" else load_file(path)
    except Exception as error:  # safetensors and pickle raise errors of many kinds
        raise InputError(f"{path}: not readable: {error}") from error


def _sites(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Site]:
    sites: dict[str, Site] = {}
    for key in tensors:
        site, _, role = key.rpartition("/")
        if role not in ("A", "B"):
            sites.setdefault(site, Site("head", tuple(tensors[key].shape)))
            continue
        if f"{site}/A" not in tensors or f"{site}/B" not in tensors:
            raise InputError(f"{folder}: {site} has only one LoRA factor.")
        A, B = tensors[f"{site}/A"], tensors[f"{site}/B"]
        rank = A.shape[0]
        if A.ndim != 2 or B.ndim != 2 or B.shape[1] != rank:
            raise InputError(f"{folder}: {site} has factors of shapes {list(B.shape)} and {list(A.shape)}.")
        alpha = _pattern(config.get("alpha_pattern") or {}, site, float(config["lora_alpha"]))
        sites[site] = Site(
            "lora", (B.shape[0], A.shape[1]), alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
        )
    return sites


def _pattern(pattern: dict[str, float], site: str, default: float) -> float:
    """peft's rule: the first key that matches the module's name, or its ending after a dot, as a regular expression."""
    return next((float(value) for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", site)), default)
