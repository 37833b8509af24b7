"""Which of peft's tuners can be had, under which of peft's own options, and what averaging does to them."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

from fedpeft import registry
from fedpeft.config import Config
from fedpeft.errors import InputError

_INPUTS = "it learns inputs of the model and none of its layers, and needs a forward of peft's around the model"
_FORWARD = "part of it is computed in a forward of peft's around the model, which is not run here: "
_AVERAGE = "an average of adapters is about as far from what they do as no adapter is: it averages "
# Every type of the installed peft is here or can be had; a test tries each of both kinds.
CANNOT = {
    "PROMPT_TUNING": _INPUTS,
    "MULTITASK_PROMPT_TUNING": _INPUTS,
    "P_TUNING": _INPUTS,
    "PREFIX_TUNING": _INPUTS,
    "CPT": _INPUTS,
    "CARTRIDGE": _INPUTS,
    "ADALORA": f"{_FORWARD}the penalty, and ranks that fall by a plan over all steps",
    "POLY": f"{_FORWARD}the number of a task with every batch",
    "XLORA": f"{_FORWARD}the mixture of other adapters",
    "SHADOW": f"{_FORWARD}a second model",
    "ADAPTION_PROMPT": "it replaces the attention of Llama and Mistral, by a module that keeps no adapter apart",
    "LILY": "its router takes a mean over a batch, so what it says of a record hangs on the records beside it",
    "OFT": f"{_AVERAGE}rotations",
    "VBLORA": f"{_AVERAGE}scores that choose vectors of a bank",
}
# What a type needs where nothing is said: peft looks targets up by architecture, and ours are what is there.
MEASURED = Path(__file__).parents[1] / "assets" / "peft_types.json"
EXACT, MEANINGLESS = 1e-3, 0.9  # errors of averages: below it is rounding; from here on hardly better than no adapter
PRESETS: dict[str, dict[str, Any]] = {"IA3": {"feedforward_modules": []}}
OTHER_LAYERS = ("LN_TUNING", "TRAINABLE_TOKENS")  # on norms and on embeddings
FROM_DATA = ("eva", "corda", "lora_ga")
MOST_ITERATIONS = 100  # of a randomised SVD; 4 are usual
MOVING = ("pissa", "olora")  # starts W - s B A + s B A
# Fields of peft's configs that are no options: they describe a folder, name modules to import, or make another base.
FIXED = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "layer_replication",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
}
# Keys of the section that are LoRA's, and the options of peft's LoRA that they are.
SECTION = {"r": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dropout": "lora_dropout"}


def allowed_types() -> list[str]:
    """peft's types that can be had, in its order."""
    from peft import PeftType

    return [str(kind.value) for kind in PeftType if kind.value not in CANNOT]


def read_measured() -> list[dict[str, Any]]:
    """What has been measured of types and some of their options (`simulations.benchmarks.peft_types`)."""
    rows: list[dict[str, Any]] = json.loads(MEASURED.read_text())
    return rows


def average_error(name: str, options: dict[str, Any]) -> float | None:
    """How far an average is from what it should do, as measured of the type with the most of these options."""
    rows = [row for row in read_measured() if row["type"] == name]
    # Options that a type needs are there in every row, with whatever values.
    fitting = [row for row in rows if row is rows[0] or row["options"].items() <= options.items()]
    return max(fitting, key=lambda row: len(row["options"]) * (row is not rows[0]))["average"] if rows else None


def config_class(name: str) -> Any:
    """peft's config of a type.

    Raises:
        InputError: peft has no such type, or it cannot be had; says why.
    """
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as KNOWN

    allowed = allowed_types()
    if name in CANNOT:
        raise InputError(f"adapter.type={name}: {CANNOT[name]}. Allowed: {', '.join(allowed)}.")
    if name not in allowed:
        raise InputError(registry.unknown("adapter.type", name, allowed))
    return KNOWN[PeftType(name)]


def options_of_type(name: str) -> dict[str, Any]:
    """The options of a type by peft's names, with the types of their values.

    Raises:
        InputError: as `config_class`.
    """
    cls = config_class(name)
    hints = typing.get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(cls) if item.init and item.name not in FIXED]
    return {item: hints[item] for item in names if not _of_a_class(hints[item])}


def require_options(name: str, given: dict[str, Any]) -> None:
    """Refuse options that peft's config of the type does not have, or not with such values.

    Raises:
        InputError: names the option, its value and what is allowed.
    """
    allowed = options_of_type(name)
    for key, value in given.items():
        if key not in allowed:
            raise InputError(registry.unknown(f"adapter.options.{key} (adapter.type={name})", key, allowed))
        if not fits_hint(value, allowed[key]):
            raise InputError(
                f"adapter.options.{key}: {value!r} is not a valid {_name_hint(allowed[key])} of adapter.type={name}."
            )
    start = str(given.get("init_lora_weights"))
    if start.startswith((*FROM_DATA, "loftq")):
        if start == "loftq":
            why = (
                "begins with what weights lose as they are quantized, which nobody knows of a base that is loaded in "
                "few bits (model.quantization); of another, peft would round the weights in place. Take orthogonal, "
                "gaussian, or leave it out"
            )
        else:
            why = (
                "looks at records before any privacy is paid for. Take pissa, olora, orthogonal, mica, gaussian, or "
                "leave it out"
            )
        raise InputError(f"adapter.options.init_lora_weights={start}: this start {why}.")
    times = start.partition("_niter_")[2]
    if times and not (times.isdecimal() and 0 < int(times[:9]) <= MOST_ITERATIONS):
        raise InputError(
            f"adapter.options.init_lora_weights={start}: {times} iterations; allowed are 1 to {MOST_ITERATIONS}."
        )
    if start.startswith(MOVING) and (others := sorted(set(given) - {"init_lora_weights", *SECTION.values()} - PLACES)):
        raise InputError(
            f"adapter.options.init_lora_weights={start} moves the base weights, and is undone in the adapter that "
            f"leaves: that is plain LoRA of twice the rank, without {', '.join(others)}. Leave them out."
        )


PLACES = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}


def check(config: Config) -> None:
    """Refuse a type, an option or a key of the section that peft would not take, before anything is loaded."""
    adapter = config.adapter
    if adapter.name != "peft":
        return
    name, options = adapter.options["type"], adapter.options["options"]
    require_options(name, options)
    for item in dataclasses.fields(adapter):
        value = getattr(adapter, item.name)
        if item.name in SECTION and value != item.default:
            raise InputError(
                f"adapter.{item.name}={value} is of adapter.name=lora. With adapter.name=peft all is under peft's own "
                f"names: adapter.options.{SECTION[item.name]}={value}, if adapter.type={name} has it."
            )
    if adapter.target_modules is not None and "target_modules" in options:
        raise InputError("adapter.target_modules and adapter.options.target_modules: give one of them.")


def fits_hint(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as an annotation names it; whole numbers are numbers too.

    >>> fits_hint(3, float), fits_hint(True, int), fits_hint(["q"], list[str] | None)
    (True, False, True)
    >>> fits_hint("niter_4", Literal["niter_[n]"])
    True
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(
            value == choice or ("[" in str(choice) and str(value).startswith(str(choice).partition("[")[0]))
            for choice in inner
        )
    if origin in (typing.Union, types.UnionType):
        return any(fits_hint(value, part) for part in inner)
    if origin in (list, tuple):
        size = len(inner) if origin is tuple else None
        return (
            isinstance(value, list | tuple)
            and size in (None, len(value))
            and all(fits_hint(entry, inner[index if size else 0]) for index, entry in enumerate(value))
        )
    if origin is dict:
        return isinstance(value, dict) and all(fits_hint(entry, inner[1]) for entry in value.values())
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def _of_a_class(hint: Any) -> bool:
    """Whether values would be objects of peft's, which a config cannot name."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return False
    if inner:
        return any(_of_a_class(part) for part in inner if part is not type(None))
    return hint not in (int, float, bool, str, dict, list, Any)


def _name_hint(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
