"""The config: dataclasses, merged by OmegaConf, checked before anything is loaded.

A section that names a registered method (`strategy`, `adapter`, `data.partition`, `tta`) also takes the options of that
method's own `Config` dataclass. A plain string for such a section is its `name` (of `tta` its `method`, of `continual`
its `body`). Overrides win over the file; an override that changes a `name` drops the file's options of the method it
replaces.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedpeft import registry
from fedpeft.errors import InputError
from fedpeft.sections import (
    INFINITY,
    AdapterConfig,
    ClientConfig,
    Config,
    ContinualConfig,
    DataConfig,
    ModelConfig,
    PartitionConfig,
    PrivacyConfig,
    RunConfig,
    SecAggConfig,
    StrategyConfig,
    TTAConfig,
    option,
)

__all__ = [
    "AdapterConfig",
    "ClientConfig",
    "Config",
    "ContinualConfig",
    "DataConfig",
    "ModelConfig",
    "PartitionConfig",
    "PrivacyConfig",
    "RunConfig",
    "SecAggConfig",
    "StrategyConfig",
    "TTAConfig",
    "option",
]

METHOD_SECTIONS = {"strategy": "strategies", "adapter": "adapters", "data.partition": "partitioners", "tta": "tta",
                   "continual": "server_bodies"}
NAME_KEYS = {"tta": "method", "continual": "body"}  # where the key of the method's name is another than `name`


def load(source: str | Path | dict[str, Any], overrides: Sequence[str] | dict[str, Any] = ()) -> Config:
    """Read a config and its overrides, check every key, value and combination.

    Args:
        source: a YAML file, the name of a shipped config, or a mapping.
        overrides: `key=value` strings with dotted keys, or a mapping of dotted keys.

    Raises:
        InputError: naming the key, what was given, what is allowed and the nearest valid key.
    """
    tree = source if isinstance(source, dict) else read_yaml(find(source))
    tree = _named_sections(tree)
    _apply(tree, overrides)
    config: Config = build(Config, tree, "")
    if config.model.dtype == "auto":
        config.model.dtype = base_dtype(config.run.device)
    check(config)
    return config


def base_dtype(device: str) -> str:
    """The faster dtype of a frozen base: bfloat16 on a GPU that multiplies in it and on a processor with AMX. Without
    AMX it is slower than float32, AVX512-BF16 or not.
    """
    import torch

    if device != "cpu" and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


def find(source: str | Path) -> Path:
    """The file of a config given by path or by shipped name."""
    path = Path(source)
    if path.is_file():
        return path
    shipped = shipped_configs()
    if str(source) in shipped:
        return shipped[str(source)]
    if path.suffix in (".yaml", ".yml") or "/" in str(source):
        raise InputError(f"CONFIG: no file {path}. Shipped configs: {', '.join(shipped)}.")
    raise InputError(registry.unknown("CONFIG", source, shipped))


def shipped_configs() -> dict[str, Path]:
    """Name -> file of every config that comes with the package."""
    import fedpeft.simulations

    folder = Path(fedpeft.simulations.__file__).parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def to_tree(config: Any) -> dict[str, Any]:
    """The config as plain nested dicts, method options beside the section's own keys (as users write them)."""
    tree: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.name == "options":
            tree.update(value)
        else:
            tree[item.name] = to_tree(value) if dataclasses.is_dataclass(value) else value
    return tree


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_tree(config)))


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """`key=value` strings as a mapping; values are read as YAML.

    >>> parse_overrides(["run.rounds=5", "strategy.wrap=[median]"])
    {'run.rounds': 5, 'strategy.wrap': ['median']}
    """
    pairs = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise InputError(f"'{text}': an override is key=value, for example run.rounds=5.")
        try:
            parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"x={value}"]))
            pairs[key.strip()] = parsed["x"]
        except Exception as error:  # OmegaConf and PyYAML errors share no base
            raise InputError(f"{key}: cannot read the value '{value}': {error}") from error
    return pairs


def options_of(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    """Option name (as users write it) -> dataclass field of a registered class's `Config`.

    A field that would be a Python keyword has a trailing underscore that users do not write (`lambda_` is `lambda`).
    """
    config = getattr(cls, "Config", None)
    return {item.name.rstrip("_"): item for item in dataclasses.fields(config)} if config else {}


def default_of(item: dataclasses.Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default


def method(kind: str, name: str, options: dict[str, Any], key: str, **arguments: Any) -> Any:
    """An instance of the registered class `name` from its options (checked; `key` is blamed) and further arguments."""
    cls = registry.load(kind, name, f"{key}.name" if key else kind)
    return cls(**arguments, **_method_options(cls, options, key))


def check(config: Config) -> None:
    """Refuse combinations that cannot work; each message names the keys and the way out."""
    run, client, data, adapter = config.run, config.client, config.data, config.adapter
    if (client.local_steps is None) == (client.local_epochs is None):
        raise InputError(
            f"client.local_steps={client.local_steps} and client.local_epochs={client.local_epochs}: give exactly "
            "one (set the other to null)."
        )
    if run.clients_per_round is not None and run.clients_per_round > data.clients:
        raise InputError(f"run.clients_per_round={run.clients_per_round} is more than data.clients={data.clients}.")
    if run.deadline_s is not None and run.engine == "cohort" and run.workers == 0:
        raise InputError(
            f"run.deadline_s={run.deadline_s} needs run.workers >= 1 (or run.engine=ray): a client that blocks can "
            "only be stopped by ending its process. Set run.workers=1."
        )
    if run.engine == "ray" and run.workers == 0:
        run.workers = 1
    if adapter.client_ranks is not None and not all(1 <= rank <= adapter.r for rank in adapter.client_ranks):
        raise InputError(
            f"adapter.client_ranks={adapter.client_ranks}: every rank must be between 1 and adapter.r={adapter.r}."
        )
    for name in registry.names("checks"):
        registry.load("checks", name)(config)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as YAML: {error}") from error
    except Exception as error:  # PyYAML's own errors share no base with the above
        raise InputError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping of sections, found {type(tree).__name__}.")
    return tree


def _named_sections(tree: dict[str, Any]) -> dict[str, Any]:
    """A copy of the tree where `strategy: fedsvd` has become `strategy: {name: fedsvd}`."""
    tree = copy.deepcopy(tree)
    for path in METHOD_SECTIONS:
        *parents, last = path.split(".")
        node = tree.get(parents[0]) if parents else tree
        if isinstance(node, dict) and isinstance(node.get(last), str):
            node[last] = {NAME_KEYS.get(path, "name"): node[last]}
    return tree


def _apply(tree: dict[str, Any], overrides: Sequence[str] | dict[str, Any]) -> None:
    pairs = list((overrides if isinstance(overrides, dict) else parse_overrides(overrides)).items())
    for path in METHOD_SECTIONS:  # a new name first: it drops the options of the method it replaces
        for key, value in pairs:
            none = value is None and key == f"{path}.{NAME_KEYS.get(path)}"
            if none or (key in (path, f"{path}.{NAME_KEYS.get(path, 'name')}") and isinstance(value, str)):
                _rename(tree, path, value)
    for key, value in pairs:
        if key in METHOD_SECTIONS and isinstance(value, str):
            continue
        node = tree
        *parents, last = key.split(".")
        for depth, parent in enumerate(parents):
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError(f"{key}: {'.'.join(parents[: depth + 1])} is a value, not a section.")
        node[last] = value


def _rename(tree: dict[str, Any], path: str, name: str | None) -> None:
    *parents, last = path.split(".")
    node = tree.setdefault(parents[0], {}) if parents else tree
    section, key = node.get(last) or {}, NAME_KEYS.get(path, "name")
    if section.get(key, name) != name:
        common = {item.name for item in dataclasses.fields(_section_class(path))} - {"options"}
        section = {item: value for item, value in section.items() if item in common}
    node[last] = {**section, key: name}


def _section_class(path: str) -> Any:
    return {"strategy": StrategyConfig, "adapter": AdapterConfig, "data.partition": PartitionConfig,
            "tta": TTAConfig, "continual": ContinualConfig}[path]


def build(cls: Any, tree: Any, path: str) -> Any:
    """A dataclass of options from a mapping, checked; `path` is the key to blame."""
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a section with the keys {', '.join(_keys(cls))}; got {tree!r}.")
    items = {item.name: item for item in dataclasses.fields(cls) if item.name != "options"}
    values: dict[str, Any] = {}
    rest = {key: value for key, value in tree.items() if key not in items}
    for name, item in items.items():
        key = f"{path}.{name}" if path else name
        default = default_of(item)
        if dataclasses.is_dataclass(default):
            values[name] = build(type(default), tree.get(name), key)
        elif name in tree:
            values[name] = _value(cls, item, tree[name], key)
    config = cls(**values)
    name_key = NAME_KEYS.get(path, "name")
    if path in METHOD_SECTIONS and getattr(config, name_key) is not None:
        owner = registry.load(METHOD_SECTIONS[path], getattr(config, name_key), f"{path}.{name_key}")
        checked = _method_options(owner, rest, path, also=list(items))
        config.options = {key.rstrip("_"): value for key, value in checked.items()}
    elif rest:
        raise InputError(_unknown_key(next(iter(rest)), path, list(items)))
    return config


def _method_options(owner: Any, given: dict[str, Any], path: str, also: Sequence[str] = ()) -> dict[str, Any]:
    items = options_of(owner)
    for key in given:
        if key not in items:
            where = f"{path}." if path else ""
            whose = f"{owner.__name__} has the options {', '.join(items) or 'none'}"
            raise InputError(_unknown_key(key, path, [*also, *items]) + f" ({where}name: {whose}.)")
    checked = {}
    for key, item in items.items():
        if key in given:
            checked[item.name] = _value(owner.Config, item, given[key], f"{path}.{key}" if path else key)
        else:
            checked[item.name] = default_of(item)
    return checked


def _value(cls: Any, item: dataclasses.Field[Any], value: Any, key: str) -> Any:
    """The value converted to the field's type and checked against its bounds."""
    if isinstance(value, bool) and item.type in ("int", "float", "int | None", "float | None"):
        raise InputError(f"{key}: {value!r} is not a valid {item.type}.")
    if isinstance(value, int) and item.type in ("float", "float | None"):
        value = float(value)
    try:
        node: DictConfig = OmegaConf.structured(cls)
        node[item.name] = value
        converted: Any = OmegaConf.to_container(node, throw_on_missing=False)
        value = converted[item.name]
    except OmegaConfBaseException as error:
        raise InputError(f"{key}: {value!r} is not a valid {item.type}.") from error
    meta = item.metadata
    if not meta or value is None:
        return value
    if meta["choices"] and value not in meta["choices"]:
        raise InputError(registry.unknown(key, value, [str(choice) for choice in meta["choices"]]))
    finite = not isinstance(value, float) or math.isfinite(value)
    within = not isinstance(value, int | float) or (meta["low"] <= value <= meta["high"] and value > meta["above"])
    if not (finite and within):
        bounds = [
            text
            for text, given in (
                (f">= {meta['low']:g}", meta["low"] > -INFINITY),
                (f"> {meta['above']:g}", meta["above"] > -INFINITY),
                (f"<= {meta['high']:g}", meta["high"] < INFINITY),
                ("finite", not finite),
            )
            if given
        ]
        raise InputError(f"{key}: {value!r} is out of range; allowed: {' and '.join(bounds)}.")
    return value


def _keys(cls: Any) -> list[str]:
    return [item.name for item in dataclasses.fields(cls) if item.name != "options"]


def _unknown_key(key: str, path: str, allowed: list[str]) -> str:
    where = f"{path}." if path else ""
    return registry.unknown(f"config key {where}{key}", key, allowed)
