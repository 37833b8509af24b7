"""peft adapter folders: written so that stock peft loads them, read without loading any model.

    adapter_config.json, adapter_model.safetensors   as `PeftModel.save_pretrained` writes them, a trained head included
    head.safetensors                                 the trained head alone, under the base model's parameter names
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedpeft.errors import InputError
from fedpeft.files import write_bytes, write_tensors
from fedpeft.state import AdapterState, Site

PREFIX = "base_model.model."
TASKS = {"image-classification": None, "sequence-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}


def save(adapter: AdapterState, folder: Path, *, base: str, task: str | None = None, pooled_head: bool = False) -> None:
    """Write a plain LoRA state (see `flat`) as a peft folder. Sites may have different ranks and scales.

    Args:
        base: what `from_pretrained` takes to get the base model.
        pooled_head: the head is fedpeft's mean-pooled one, not a module of the base model: it goes to head.safetensors only.
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
        "peft_type": "LORA", "task_type": TASKS.get(task or ""), "base_model_name_or_path": base, "inference_mode": True, "bias": "none",
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "use_rslora": False, "fan_in_fan_out": False,
        "init_lora_weights": True, "target_modules": sorted(ranks),
        "rank_pattern": {site: value for site, value in ranks.items() if value != rank},
        "alpha_pattern": {site: value for site, value in alphas.items() if value != alpha},
        "modules_to_save": None if pooled_head or not head else sorted({name.split(".")[0] for name in head}),
    }
    if not pooled_head:
        tensors |= {f"{PREFIX}{name}": value for name, value in head.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    if head:
        write_tensors(folder / "head.safetensors", head)
    write_bytes(folder / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())


def base_of(folder: Path) -> str:
    """The base model that a peft folder names."""
    return str(json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path") or "")


def load(folder: Path) -> AdapterState:
    """Read a peft LoRA folder.

    Raises:
        InputError: a file is missing or damaged, or the adapter is not plain LoRA.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no readable adapter_config.json: {error}") from error
    if config.get("peft_type") != "LORA":
        raise InputError(f"{folder}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be read.")
    for option in ("use_dora", "lora_bias", "use_bdlora"):
        if config.get(option):
            raise InputError(f"{folder}: {option} is set; only plain LoRA factors can be read.")
    tensors = {}
    for name, value in _weights(folder).items():
        path = name.removeprefix(PREFIX)
        site, _, role = path.rpartition(".")
        for factor in ("A", "B"):
            if site.endswith(f".lora_{factor}"):
                site, role = site.removesuffix(f".lora_{factor}"), factor
        tensors[f"{site}/{role}"] = value
    head = folder / "head.safetensors"
    if head.exists():
        for name, value in load_file(head).items():
            site, _, role = name.rpartition(".")
            tensors[f"{site}/{role}"] = value
    return AdapterState(tensors, _sites(folder, tensors, config))


def _weights(folder: Path) -> dict[str, Tensor]:
    path = folder / "adapter_model.safetensors"
    try:
        if not path.exists() and (folder / "adapter_model.bin").exists():
            return torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
        return load_file(path)
    except Exception as error:  # safetensors and pickle raise errors of many kinds
        raise InputError(f"{path}: not readable: {error}") from error


def _sites(folder: Path, tensors: dict[str, Tensor], config: dict) -> dict[str, Site]:
    sites = {}
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
        sites[site] = Site("lora", (B.shape[0], A.shape[1]), alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)
    return sites


def _pattern(pattern: dict[str, float], site: str, default: float) -> float:
    """peft's rule: a pattern's key is the module's name or its ending."""
    return next((float(value) for key, value in pattern.items() if site == key or site.endswith(f".{key}")), default)
