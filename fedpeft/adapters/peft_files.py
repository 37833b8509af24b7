"""A peft adapter folder is read as plain LoRA if all that stands in it is understood; anything else is refused.

A field of adapter_config.json that this list does not know may change what the adapter computes, so it is refused
unless it is empty: newer releases of peft write fields of their own, and switch them off by null, false or nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from fedpeft.adapters.placed import OWN
from fedpeft.errors import InputError

PREFIX = "base_model.model."
# Read, or known to leave the function of finished factors as it is: how they were drawn, trained or chosen.
UNDERSTOOD = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
EMPTY: tuple[Any, ...] = (None, False, "", [], {})  # what switches a field off
# Initialisations that move the base weights: the factors alone are not the adapter then.
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def find_unread(config: dict[str, Any]) -> str | None:
    """What in a folder's config says that the factors B A, scaled, are not the whole change; None where they are."""
    if config.get("peft_type") != "LORA":
        return f"peft_type is {config.get('peft_type')!r}; only LORA adapters can be read"
    for name in sorted(set(config) - UNDERSTOOD):
        if config[name] not in EMPTY:
            return f"{name} is set ({str(config[name])[:60]}); only plain LoRA factors can be read"
    if config.get("bias", "none") != "none":
        return f"bias={config['bias']!r}: trained biases of the base cannot be read; only bias='none'"
    return None


def require_base_unmoved(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a config of LoRA whose start has moved the base weights: the folder's file does not say to where."""
    if str(config.get("init_lora_weights")).startswith(MOVES_BASE):
        raise InputError(
            f"{folder}: init_lora_weights={config['init_lora_weights']!r} moves the base weights. Save it as a plain "
            "LoRA first (peft: save_pretrained with path_initial_model_for_weight_conversion)."
        )


def require_plain_lora(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a config under which the factors B A, scaled, are not the whole change.

    Raises:
        InputError: another method, or a field that changes the function or is not known.
    """
    if str(config.get("peft_type")).startswith(OWN):
        raise InputError(
            f"{folder}: peft_type is {config['peft_type']!r}, an adapter of fedpeft's that is no product of factors: "
            "it cannot be merged, aggregated offline, unlearned or gone on from. `fedpeft predict` and `chat` open it "
            "as it is."
        )
    if (unread := find_unread(config)) is not None:
        raise InputError(f"{folder}: {unread}. `fedpeft predict` and `chat` open it as it is.")
    require_base_unmoved(folder, config)
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise InputError(f"{folder}: adapter_config.json: lora_alpha is {alpha!r}; expected a number.")


def named_parameter(folder: Path, name: str, saved: list[str]) -> tuple[str, str]:
    """Site and role of a tensor in an adapter's file: a LoRA factor of a linear layer, or in a saved module.

    Args:
        saved: modules_to_save of the config.

    Raises:
        InputError: it is neither.
    """
    bare = name.removeprefix(PREFIX)
    site, _, role = bare.rpartition(".")
    parent, _, part = site.rpartition(".")
    if name == bare:
        raise InputError(f"{folder}: {name}: no name that peft writes; names begin with {PREFIX}.")
    if part in ("lora_A", "lora_B") and role == "weight":
        return parent, part[-1]
    if re.search(r"\.lora_[AB]\.[^.]+\.weight$", name):
        adapter = name.split(".")[-2]
        raise InputError(
            f"{folder}: {name} has the name of an adapter in it, '{adapter}', as a model's own state has. "
            "Write the folder with peft's save_pretrained, which leaves it out."
        )
    if "base_layer" in site.split("."):
        raise InputError(
            f"{folder}: {name} is a weight of the base model, saved with the adapter because a LoRA is on "
            "an embedding or output layer. Save it with save_pretrained(..., "
            "save_embedding_layers=False)."
        )
    if "lora_" in part or "lora_" in role:
        raise InputError(f"{folder}: {name}: only LoRA factors of linear layers can be read.")
    if saved_module(bare, saved) is None:
        raise InputError(
            f"{folder}: {name} is neither a LoRA factor nor in a module of modules_to_save "
            f"({', '.join(saved) or 'none'}); only these can be read."
        )
    return site, role


def saved_module(name: str, saved: list[str]) -> str | None:
    """The module whose copy peft trains and this parameter is in: peft takes each whose path ends with an entry.

    >>> saved_module("model.norm.weight", ["norm"]), saved_module("classifier.out.bias", ["classifier"])
    ('model.norm', 'classifier')
    """
    parts = name.split(".")[:-1]
    paths = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return next((path for path in paths if any(path.endswith(entry) for entry in saved)), None)


def require_numbers(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Raise InputError unless all are floating-point and finite."""
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise InputError(f"{folder}: {name} has dtype {value.dtype}; expected floating-point numbers.")
        if not bool(value.double().isfinite().all()):
            raise InputError(f"{folder}: {name} has NaN or inf; the adapter is broken.")
