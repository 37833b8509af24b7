"""Overrides of a config: `key=value` with dotted keys, put into the tree that a file has given.

An override that changes a name drops the options that the file gave to the entry it replaces, and says so.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from typing import Any

from fedpeft import registry
from fedpeft.config import values
from fedpeft.config.schema import METHOD_SECTIONS, Config, options_of
from fedpeft.config.short_names import SHORT
from fedpeft.errors import InputError

log = logging.getLogger("fedpeft")


def parse_overrides(given: Iterable[str] | dict[str, Any]) -> dict[str, Any]:
    """`key=value` strings as a mapping, or a mapping as it is; what a value means is for the field to say.

    Raises:
        InputError: they are neither.

    >>> parse_overrides(["run.rounds=5", "strategy.wrap=[median]"])
    {'run.rounds': '5', 'strategy.wrap': '[median]'}
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InputError(f"overrides: {given!r} is neither a list of key=value nor a mapping of dotted keys.")
    if wrong := [key for key in given if not isinstance(key, str)]:
        raise InputError(f"overrides: {wrong[0]!r} is no text. A dotted key such as run.rounds is.")
    if isinstance(given, dict):
        return given
    pairs: dict[str, Any] = {}
    for text in given:
        key, separator, value = (part.strip() for part in text.partition("="))
        if not separator or not key:
            raise InputError(f"'{text}': an override is key=value, for example run.rounds=5.")
        # What a shell leaves of KEY=$UNSET: neither null nor an empty text may be guessed.
        if not value:
            raise InputError(f"{key}=: there is no value. Write {key}=null for none, {key}=\"''\" for an empty text.")
        if pairs.get(key, value) != value:
            log.warning("%s is given twice: %s counts, %s does not", key, value, pairs[key])
        pairs[key] = values.Plain(value)
    return pairs


def apply_overrides(tree: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Put the overrides into the tree, in place."""
    pairs = list(_expand_names(overrides))
    for path, section in METHOD_SECTIONS.items():  # a new name first: it drops the options of the method it replaces
        for key, value in pairs:
            if key == f"{path}.{section.key}":
                _rename_entry(tree, path, value)
    for key, value in pairs:
        # Before any value is put in: an option given beside a new name is the new entry's.
        _drop_options(tree, key, value)
    for key, value in pairs:
        node = tree
        *parents, last = key.split(".")
        for depth, parent in enumerate(parents):
            # A section of which all keys are commented out.
            node[parent] = {} if values.is_null(node.get(parent)) else node[parent]
            node = node[parent]
            if not isinstance(node, dict):
                raise InputError(f"{key}: {'.'.join(parents[: depth + 1])} is a value, not a section.")
        node[last] = value


def _expand_names(pairs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Overrides with `strategy=fedsvd` as `strategy.name=fedsvd`, and sections in one line as mappings."""
    sections = {*METHOD_SECTIONS, *(item.name for item in dataclasses.fields(Config))}
    for key, value in pairs.items():
        value = values.structure(value, key) if key in sections else value
        if key in METHOD_SECTIONS and isinstance(value, str) and not values.is_null(value):
            key = f"{key}.{METHOD_SECTIONS[key].key}"
        # Here already, as it is looked up in tables before its field reads it.
        value = values.unquoted(value) if key.endswith((".name", ".method", ".body")) else value
        if key == "adapter.name" and value in SHORT:
            kind, options = SHORT[value]
            yield from ((key, "peft"), ("adapter.type", kind))
            yield from ((f"adapter.options.{name}", chosen) for name, chosen in options.items())
        else:
            yield key, value


def _rename_entry(tree: dict[str, Any], path: str, name: str | None) -> None:
    *parents, last = path.split(".")
    node, key = tree.get(parents[0]) if parents else tree, METHOD_SECTIONS[path].key
    section = node.get(last) if isinstance(node, dict) else None
    # A section that is empty, or none, has nothing to drop; `apply_overrides` refuses one that is no mapping.
    # Options without a name beside them may be meant for the one that is given now.
    if isinstance(node, dict) and isinstance(section, dict) and (old := section.get(key, name)) != name:
        common = {item.name for item in dataclasses.fields(METHOD_SECTIONS[path].config)} - {"options"}
        _say_dropped(f"{path}.{key}", name, old, [item for item in section if item not in common])
        node[last] = {item: value for item, value in section.items() if item in common}


def _drop_options(tree: dict[str, Any], key: str, value: Any) -> None:
    """Take the options of the entry that is named in this field out of the tree, where the field gets another."""
    path, _, field = key.rpartition(".")
    section: Any = tree
    for part in path.split("."):
        section = section.get(part) if isinstance(section, dict) else None
    if not isinstance(section, dict):
        return
    for item in _fields_of(path, section):
        of = item.metadata.get("options_of")
        if of and of[1] == field and isinstance(section.get(item.name), dict) and section.get(field) != value:
            _say_dropped(key, value, section.get(field, "the default"), [item.name])
            del section[item.name]


def _fields_of(path: str, section: dict[str, Any]) -> list[dataclasses.Field[Any]]:
    """Fields of a section's class, and of the method that it names."""
    if path not in METHOD_SECTIONS:
        whole = getattr(Config(), path, None)
        return list(dataclasses.fields(whole)) if dataclasses.is_dataclass(whole) else []
    name = section.get(METHOD_SECTIONS[path].key)
    fields = list(dataclasses.fields(METHOD_SECTIONS[path].config))
    if isinstance(name, str) and name in registry.names(METHOD_SECTIONS[path].table):
        fields += options_of(registry.load(METHOD_SECTIONS[path].table, name)).values()
    return fields


def _say_dropped(key: str, new: Any, old: Any, dropped: list[str]) -> None:
    if dropped:
        log.info("%s=%s: the options of %s are dropped: %s", key, new, old, ", ".join(dropped))
