"""The config: dataclasses, merged by OmegaConf, checked before anything is loaded.

A section that names a registered method (`strategy`, `adapter`, `data.partition`) also takes the options of that
method's own `Config` dataclass. A plain string for such a section is its `name`. Overrides win over the file; an
override that changes a `name` drops the file's options of the method it replaces.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedpeft import registry
from fedpeft.errors import InputError

METHOD_SECTIONS = {"strategy": "strategies", "adapter": "adapters", "data.partition": "partitioners"}
INFINITY = float("inf")


def option(default: Any, help: str, *, low: float = -INFINITY, high: float = INFINITY, above: float = -INFINITY,
           choices: tuple[Any, ...] = ()) -> Any:
    """A dataclass field with its meaning and its bounds: `low` <= value <= `high`, value > `above`, or `choices`."""
    meta = {"help": help, "low": low, "high": high, "above": above, "choices": choices}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass
class ModelConfig:
    name: str = option("tiny-vit", "embedded (tiny-vit, tiny-bert, tiny-llama) or prepared model, local path or hub id")
    task: str = option("image-classification", "what the model does",
                       choices=("image-classification", "sequence-classification", "causal-lm"))
    pooling: str = option("auto", "text classification head: the model's own, or a linear one on mean-pooled features; "
                          "auto is mean for sentence encoders", choices=("auto", "model", "mean"))
    max_length: int = option(128, "longest input in tokens; longer texts are cut", low=1)
    dtype: str = option("float32", "dtype of the frozen base", choices=("float32", "bfloat16"))
    trust_remote_code: bool = option(False, "let transformers run code that comes with the model")


@dataclass
class AdapterConfig:
    name: str = option("lora", "registered adapter")
    r: int = option(4, "rank", low=1)
    alpha: float = option(8.0, "scale: the product is multiplied by alpha / r (alpha / sqrt(r) with rslora)", above=0)
    rslora: bool = option(False, "scale by alpha / sqrt(r)")
    dropout: float = option(0.0, "dropout before A", low=0, high=0.99)
    target_modules: list[str] | None = option(
        None,
        "module name endings to adapt; looked up per architecture when null; "
        "['all-linear'] adapts every linear layer but the head",
    )
    train_head: bool = option(True, "train and share the classification head too")
    client_ranks: list[int] | None = option(
        None, "rank of client i is client_ranks[i mod length]; every rank <= r; the scale stays that of r"
    )
    options: dict[str, Any] = option({}, "options of the adapter named above")


@dataclass
class PartitionConfig:
    name: str = option("dirichlet", "registered partitioner")
    options: dict[str, Any] = option({}, "options of the partitioner named above")


@dataclass
class DataConfig:
    source: str = option("digits", "embedded or prepared data set, file, folder (csv, jsonl, parquet, saved) or hub id")
    test: str | None = option(None, "file or folder with the test set; else test_fraction of the source is held out")
    test_fraction: float = option(0.25, "share of the source held out for the server's test set", above=0, high=0.9)
    text: str | None = option(None, "text column; found by name when null")
    image: str | None = option(None, "image column; found by name when null")
    label: str | None = option(None, "label column; found by name when null")
    limit: int | None = option(None, "use at most this many training records", low=1)
    clients: int = option(10, "how many clients the data is split over", low=1)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    split: str | None = option(None, "reuse the split saved in this split.json")
    holdout: float = option(0.0, "share of each client's records kept for its own evaluation", low=0, high=0.9)


@dataclass
class StrategyConfig:
    name: str = option("fedit", "registered strategy")
    weighting: str = option("examples", "client weights: by examples, or all equal", choices=("examples", "uniform"))
    wrap: list[Any] = option([], "strategies put around it, innermost first: names, or mappings with name and options")
    options: dict[str, Any] = option({}, "options of the strategy named above")


@dataclass
class ClientConfig:
    optimizer: str = option("adamw", "local optimizer, new every round", choices=("adamw", "sgd"))
    lr: float = option(1e-3, "local learning rate", above=0)
    momentum: float = option(0.0, "of sgd", low=0, high=1)
    weight_decay: float = option(0.0, "decoupled for adamw, L2 for sgd", low=0)
    local_steps: int | None = option(None, "optimizer steps a round; give this or local_epochs", low=1)
    local_epochs: int | None = option(1, "passes over the client's data a round; give this or local_steps", low=1)
    batch_size: int = option(16, "examples a step", low=1)
    max_grad_norm: float | None = option(None, "clip the gradient of a step to this norm", above=0)


@dataclass
class PrivacyConfig:
    unit: str = option("none", "what differential privacy protects", choices=("none",))


@dataclass
class RunConfig:
    rounds: int = option(10, "federated rounds", low=1)
    clients_per_round: int | None = option(None, "clients asked each round; null is all", low=1)
    seed: int = option(0, "root of every random choice", low=0)
    engine: str = option("cohort", "cohort: in this process or in worker processes; ray: Flower's simulation engine",
                         choices=("cohort", "ray"))
    workers: int = option(0, "worker processes; 0 trains clients in this process (Ray takes 1)", low=0)
    threads: int = option(1, "threads per process", low=1)
    device: str = option("auto", "torch device; auto takes an accelerator when there is one")
    evaluate_every: int = option(1, "rounds between evaluations of the global model; the last one always is", low=1)
    baselines: bool = option(True, "fit logistic regressions on frozen features and on pixels or words, for the table")
    checkpoint_every: int = option(1, "rounds between checkpoints", low=1)
    deadline_s: float | None = option(None, "seconds that a round waits for replies; needs workers or ray", above=0)
    quorum: float = option(0.5, "share of the asked clients whose good replies a round needs", above=0, high=1)
    max_update_norm: float | None = option(None, "quarantine updates farther from what was sent (L2)", above=0)
    faults: dict[str, Any] = option(
        {}, "client name -> fault to inject (nan, scale, shape, empty, crash, die, hang): for tests of robustness"
    )


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    run: RunConfig = field(default_factory=RunConfig)


def load(source: str | Path | dict[str, Any], overrides: Sequence[str] | dict[str, Any] = ()) -> Config:
    """Read a config and its overrides, check every key, value and combination.

    Args:
        source: a YAML file, the name of a shipped config, or a mapping.
        overrides: `key=value` strings with dotted keys, or a mapping of dotted keys.

    Raises:
        InputError: naming the key, what was given, what is allowed and the nearest valid key.
    """
    tree = source if isinstance(source, dict) else _read_yaml(find(source))
    tree = _named_sections(tree)
    _apply(tree, overrides)
    config: Config = _build(Config, tree, "")
    check(config)
    return config


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


def _read_yaml(path: Path) -> dict[str, Any]:
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
            node[last] = {"name": node[last]}
    return tree


def _apply(tree: dict[str, Any], overrides: Sequence[str] | dict[str, Any]) -> None:
    pairs = list((overrides if isinstance(overrides, dict) else parse_overrides(overrides)).items())
    for path in METHOD_SECTIONS:  # a new name first: it drops the options of the method it replaces
        for key, value in pairs:
            if key in (path, f"{path}.name") and isinstance(value, str):
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


def _rename(tree: dict[str, Any], path: str, name: str) -> None:
    *parents, last = path.split(".")
    node = tree.setdefault(parents[0], {}) if parents else tree
    section = node.get(last) or {}
    if section.get("name", name) != name:
        common = {item.name for item in dataclasses.fields(_section_class(path))} - {"options"}
        section = {key: value for key, value in section.items() if key in common}
    node[last] = {**section, "name": name}


def _section_class(path: str) -> Any:
    return {"strategy": StrategyConfig, "adapter": AdapterConfig, "data.partition": PartitionConfig}[path]


def _build(cls: Any, tree: Any, path: str) -> Any:
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
            values[name] = _build(type(default), tree.get(name), key)
        elif name in tree:
            values[name] = _value(cls, item, tree[name], key)
    config = cls(**values)
    if path in METHOD_SECTIONS:
        owner = registry.load(METHOD_SECTIONS[path], config.name, f"{path}.name")
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
    if isinstance(value, int | float) and not (meta["low"] <= value <= meta["high"] and value > meta["above"]):
        bounds = [
            text
            for text, given in (
                (f">= {meta['low']:g}", meta["low"] > -INFINITY),
                (f"> {meta['above']:g}", meta["above"] > -INFINITY),
                (f"<= {meta['high']:g}", meta["high"] < INFINITY),
            )
            if given
        ]
        raise InputError(f"{key}: {value!r} is out of range; allowed: {' and '.join(bounds) or 'a finite number'}.")
    return value


def _keys(cls: Any) -> list[str]:
    return [item.name for item in dataclasses.fields(cls) if item.name != "options"]


def _unknown_key(key: str, path: str, allowed: list[str]) -> str:
    where = f"{path}." if path else ""
    return registry.unknown(f"config key {where}{key}", key, allowed)
