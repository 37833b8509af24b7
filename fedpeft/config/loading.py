"""The config: dataclasses, filled from YAML, mappings and overrides, checked before anything is loaded.

A section that names a registered method (`strategy`, `adapter`, `data.partition`, `tta`) also takes the options of that
method's own `Config` dataclass. A plain string for such a section is its `name` (of `tta` its `method`, of `continual`
its `body`). Overrides win over the file; an override that changes a `name` drops the file's options of the method it
replaces, and says so. What a text means, its field says (`values`); `${...}` is resolved after the overrides.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpeft import other_names, registry
from fedpeft.config import values
from fedpeft.config.checks import check
from fedpeft.config.option import FEDERATION, INFINITY, LEARNER
from fedpeft.config.overrides import apply_overrides, parse_overrides
from fedpeft.config.schema import (
    METHOD_SECTIONS,
    Config,
    choices_of,
    default_of,
    options_of,
)
from fedpeft.config.short_names import expand_name
from fedpeft.errors import InputError
from fedpeft.files import read_text


def load(
    source: str | Path | dict[str, Any], overrides: Sequence[str] | dict[str, Any] = (), foreign: bool = False
) -> Config:
    """Read a config and its overrides, check every key, value and combination.

    Args:
        source: a YAML file, the name of a shipped config, or a mapping.
        overrides: `key=value` strings with dotted keys, or a mapping of dotted keys.
        foreign: another party wrote it, so nothing of this machine may be looked up for it: no `${...}`.

    Raises:
        InputError: naming the key, what was given, what is allowed and the nearest valid key.
    """
    return complete(read(source, overrides, foreign))


def read(
    source: str | Path | dict[str, Any], overrides: Sequence[str] | dict[str, Any] = (), foreign: bool = False
) -> dict[str, Any]:
    """The tree of a config with its overrides, for `complete`; arguments and errors are those of `load`."""
    tree = source if isinstance(source, dict) else _read_mapping(find(source))
    # A copy, so that the caller's mapping stays; before the overrides, which go into sections.
    tree = _named_sections(tree)
    given = parse_overrides(overrides)
    apply_overrides(tree, given)
    # After them: only then is it seen whether a number was given for the column that counts.
    _count_by_column(tree, given)
    try:
        return values.interpolated(tree, to_tree(Config()), foreign)
    except InputError as error:
        raise error if isinstance(source, dict) else InputError(f"{find(source)}: {error}") from error


def complete(tree: dict[str, Any]) -> Config:
    """The config of a tree that `read` has made, with all defaults, checked; errors are those of `load`."""
    config: Config = build(Config, tree, "")
    check(config)
    return config


def find(source: str | Path) -> Path:
    """The file of a config given by path or by shipped name."""
    path = Path(os.path.expanduser(source))
    # A user's own file comes before a shipped config of its name.
    if path.is_file():
        return path
    shipped = shipped_configs() | job_configs()
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


def job_configs() -> dict[str, Path]:
    """`jobs/NAME` -> file of every config of another project's job, with the names of its real model and data."""
    import fedpeft.simulations

    folder = Path(fedpeft.simulations.__file__).parent / "configs" / "jobs"
    return {f"jobs/{path.stem}": path for path in sorted(folder.glob("*.yaml"))}


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
    """YAML that `from_yaml` makes the same config of."""
    return values.written(values.escaped(to_tree(config)))


def from_yaml(text: str) -> Config:
    """The config of a text that `to_yaml` has made."""
    return load(values.read(text, "config"))


def method(kind: str, name: str, options: dict[str, Any], key: str, **arguments: Any) -> Any:
    """An instance of the registered class `name` from its options (checked; `key` is blamed) and further arguments."""
    cls = registry.load(kind, name, f"{key}.name" if key else kind)
    return cls(**arguments, **read_options(cls, options, key))


def read_yaml(path: Path) -> dict[str, Any]:
    """A file's mapping, `${...}` resolved within it; its scalars are for `build` to read.

    Raises:
        InputError: it cannot be read, or is no mapping.
    """
    tree = _read_mapping(path)
    try:
        return values.interpolated(tree, {})
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _read_mapping(path: Path) -> dict[str, Any]:
    tree = values.read(read_text(path), str(path))
    if values.is_null(tree):
        return {}
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping of sections, found {type(tree).__name__}.")
    return tree


def _named_sections(tree: dict[str, Any]) -> dict[str, Any]:
    """A copy of the tree where `strategy: fedsvd` has become `strategy: {name: fedsvd}`."""
    tree = copy.deepcopy(tree)
    for path, method_section in METHOD_SECTIONS.items():
        *parents, last = path.split(".")
        node = tree.get(parents[0]) if parents else tree
        if isinstance(node, dict) and isinstance(node.get(last), str) and not values.is_null(node[last]):
            node[last] = {method_section.key: node[last]}
    if isinstance(tree.get("adapter"), dict):
        tree["adapter"] = expand_name(tree["adapter"])
    return tree


def _count_by_column(tree: dict[str, Any], given: dict[str, Any]) -> None:
    """Set data.clients to null where it is not given beside the column that the clients are groups of.

    A file's number belongs to the file's column: an override of the column, or to it, drops the number.
    """
    data = tree.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("partition"), dict):
        return
    changed = {"data.partition", "data.partition.name", "data.partition.column"} & set(given)
    if data["partition"].get("name") == "column" and "data.clients" not in given and ("clients" not in data or changed):
        data["clients"] = None


def build(cls: Any, tree: Any, path: str) -> Any:
    """A dataclass of options from a mapping, checked; `path` is the key to blame."""
    tree = values.structure(tree, path)
    if values.is_null(tree):
        tree = {}
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a section with the keys {', '.join(_field_names(cls))}; got {tree!r}.")
    items = {item.name: item for item in dataclasses.fields(cls) if item.name != "options"}
    nested = {name: default_of(item) for name, item in items.items() if dataclasses.is_dataclass(default_of(item))}
    found = {
        name: build(type(default), tree.get(name), f"{path}.{name}" if path else name)
        for name, default in nested.items()
    }
    own = {key: value for key, value in tree.items() if key in items and key not in nested}
    found |= _fill_fields({name: item for name, item in items.items() if name not in nested}, own, path)
    rest = {key: value for key, value in tree.items() if key not in items}
    config = cls(**found)
    section = METHOD_SECTIONS.get(path)
    if section is not None and getattr(config, section.key) is not None:
        owner = registry.load(section.table, getattr(config, section.key), f"{path}.{section.key}")
        checked = read_options(owner, rest, path, also=list(items))
        # As users write them: `lambda`, of the field `lambda_`.
        config.options = {key.rstrip("_"): value for key, value in checked.items()}
    elif rest:
        raise InputError(_unknown_key(next(iter(rest)), path, list(items)))
    return config


def read_options(owner: Any, given: dict[str, Any], path: str, also: Sequence[str] = ()) -> dict[str, Any]:
    """Options of a registered class, typed and checked, by the names of their fields.

    Raises:
        InputError: one is not its own, or of its other kind of run, or out of bounds; `path` is the key to blame.
    """
    # The one section of a federation that names a body; benchmarks ask for one learner's.
    kind = FEDERATION if path == "continual" else LEARNER
    items, every = options_of(owner, kind), options_of(owner)
    for key in given:
        if key not in items:
            where = f"{path}." if path else ""
            whose = f"{owner.__name__} has the options {', '.join(items) or 'none'}"
            if key in every:
                raise InputError(f"{where}{key}: {every[key].metadata['help']}. {kind.capitalize()} {whose}.")
            name_key = METHOD_SECTIONS[path].key if path in METHOD_SECTIONS else "name"
            named = f"{where}{name_key}: " if path else ""
            raise InputError(_unknown_key(key, path, [*also, *items]) + f" ({named}{whose}.)")
    return _fill_fields(items, given, path)


def _fill_fields(items: dict[str, dataclasses.Field[Any]], given: dict[str, Any], path: str) -> dict[str, Any]:
    """Values of all fields: those given, typed and checked, and the defaults of the others."""
    found = {
        item.name: _read_value(item, given[key], f"{path}.{key}" if path else key) if key in given else default_of(item)
        for key, item in items.items()
    }
    for key, item in items.items():
        # In a second pass: what options may be hangs on a name beside them, which may be a later field.
        of = item.metadata.get("options_of")
        if not of or not found[item.name]:
            continue
        name = found.get(of[1])
        if key not in given and name != default_of(items[of[1]]):
            found[item.name] = {}  # its default is of the default entry
        elif key in given and of[0]:
            found[item.name] = _entry_options(of, name, found[item.name], f"{path}.{key}" if path else key)
    return found


def _entry_options(of: tuple[str, str], name: Any, given: Any, key: str) -> Any:
    """Options of a registry entry, or a list of entries with options, each typed by the entry's own field."""
    if isinstance(given, list):
        return [_read_entry(of, entry, key) for entry in given]
    if name is None:
        named = f"{key.rpartition('.')[0]}.{of[1]}"
        raise InputError(
            f"{key}: options {', '.join(given)}, but {named}=null has none. Set {named} to one of "
            f"{', '.join(registry.names(of[0]))}, or leave the options out."
        )
    owner = registry.load(of[0], name, key)
    checked = read_options(owner, given, key)
    items = options_of(owner)
    # Without defaults, so that resolved.yaml has what was given; whoever makes the entry fills them in.
    return {option: checked[items[option].name] for option in given}


def _read_entry(of: tuple[str, str], entry: Any, key: str) -> Any:
    """One of a list of registry entries: a name, or a mapping with a name and options."""
    if isinstance(entry, str):
        return str(values.unquoted(entry))
    if not isinstance(entry, dict) or not isinstance(entry.get(of[1]), str):
        return entry
    name = str(values.unquoted(entry[of[1]]))
    options = {option: value for option, value in entry.items() if option != of[1]}
    return {of[1]: name, **_entry_options(of, name, options, f"{key}.{name}")}


def _read_value(item: dataclasses.Field[Any], value: Any, key: str) -> Any:
    """The value converted to the field's type and checked against its bounds."""
    meta = item.metadata
    if meta and meta["options_of"] and meta["options_of"][0]:
        return _keep_untyped(value, str(item.type), key)
    value = values.to_annotation(value, str(item.type), key)
    # The Config of another package may have plain fields, with a type and no bounds.
    if not meta or value is None:
        return value
    if meta["path"]:
        return os.path.expanduser(value)  # not pathlib's, which raises RuntimeError for ~NOBODY
    allowed = choices_of(item)
    if allowed and str(value) not in allowed:
        raise InputError(registry.unknown(key, value, allowed))
    _require_within(value, meta, key)
    return value


def _keep_untyped(value: Any, kind: str, key: str) -> Any:
    """A list or mapping whose scalars are typed later, by the fields of the entry that it is for."""
    values.to_annotation(value, kind, key)
    return values.structure(value, key)


def _require_within(value: Any, meta: Any, key: str) -> None:
    # Where there is no bound, infinity lies within.
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


def _field_names(cls: Any) -> list[str]:
    return [item.name for item in dataclasses.fields(cls) if item.name != "options"]


def _unknown_key(key: str, path: str, allowed: list[str]) -> str:
    where = f"{path}." if path else ""
    theirs = other_names.ours(key)
    if theirs is not None:
        return f"config key {where}{key}: {theirs}"
    return registry.unknown(f"config key {where}{key}", key, allowed)
