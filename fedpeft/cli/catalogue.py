"""`fedpeft list` and `fedpeft show` say what a config can name: from the registry and the classes themselves.

The package's own entries are read from `assets/methods.json`, which `python docs/make.py` writes from the classes.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedpeft import config as configs
from fedpeft import other_names, registry
from fedpeft.cli import adapter_facts
from fedpeft.config import schema
from fedpeft.config.option import INFINITY
from fedpeft.errors import InputError

DESCRIBED = Path(__file__).parents[1] / "assets" / "methods.json"
TABLES = (
    "strategies",
    "objectives",
    "adapters",
    "tuners",
    "penalties",
    "optimizers",
    "datasets",
    "partitioners",
    "tta",
    "bodies",
    "heads",
    "streams",
    "mergers",
    "unlearning",
    "models",
    "recipes",
    "sections",
    "configs",
)


def entries(table: str | None = None, short: bool = False) -> dict[str, list[dict[str, Any]]]:
    """Rows (name, summary, ...) of one table, or of all.

    Args:
        short: names and summaries alone, for which no method is imported.
    """
    if table is not None and table not in TABLES:
        raise InputError(registry.unknown("list", table, TABLES))
    return {
        name: [_describe_row(name, entry, short) for entry in _names_in(name)]
        for name in ([table] if table else TABLES)
    }


def describe(name: str) -> dict[str, Any]:
    """One entry in full: options with defaults and meaning, paper, needs.

    Args:
        name: an entry, or `table/entry` where several tables have one of that name; `also` names the others.
    """
    wanted, slash, entry = name.partition("/")
    entry = entry if slash else name
    found = [table for table in TABLES if (not slash or table == wanted) and entry in _names_in(table)]
    if not found:
        raise InputError(_say_unknown(name))
    table, *others = sorted(found, key="tuners".__eq__)  # peft's names come after ours
    also = [f"{other}/{entry}" for other in others]
    about = _read_described(table, entry) or {**_describe_row(table, entry), **_describe_entry(table, entry)}
    return {"table": table, **about, "also": also}


def describe_all() -> dict[str, dict[str, Any]]:
    """Every entry of the package's own registry, and every tuner of peft's, as `table/name`, in full: what
    `python docs/make.py` writes down.
    """
    return {
        f"{table}/{entry}": {**_describe_row(table, entry), **_describe_entry(table, entry)}
        for table in TABLES
        for entry in (_names_in(table) if table == "tuners" else registry.TABLES.get(table, ()))
    }


def _read_described(table: str, entry: str) -> dict[str, Any] | None:
    """What is written down of an entry, for which no method and so no torch is imported; None where nothing is.

    Nothing is where another package has added entries, which may be among the values that an option takes.
    """
    if registry.is_extended():
        return None
    found: dict[str, dict[str, Any]] = json.loads(DESCRIBED.read_text())
    return found.get(f"{table}/{entry}")


def _say_unknown(name: str) -> str:
    """Three names that are near, and, of a key of a config, where it stands."""
    for section in dataclasses.fields(configs.Config):
        keys = dataclasses.fields(type(getattr(configs.Config(), section.name)))
        if name in {item.name for item in keys} | {f"{section.name}.{item.name}" for item in keys}:
            beside = f", and `fedpeft list {name}s` its values" if f"{name}s" in TABLES else ""
            if name in ("partition", "data.partition"):
                beside = ", and `fedpeft list partitioners` its values"
            key = f"{section.name}.{name.rpartition('.')[2]}"
            return f"show: {name} is a key of a config, {key}. `fedpeft show {section.name}` has it{beside}."
    for key in other_names.REFUSED:
        if why := other_names.why_refused(key, name):
            return f"show: {name} is no value of {key}. {why}"
    near = difflib.get_close_matches(name, [entry for table in TABLES for entry in _names_in(table)], n=3)
    hint = f" Did you mean {', '.join(map(repr, dict.fromkeys(near)))}?" if near else ""
    return f"show: '{name}' is not known.{hint} `fedpeft list` has all names."


def _names_in(table: str) -> list[str]:
    if table == "configs":
        return list(configs.shipped_configs())
    if table == "sections":
        return [item.name for item in dataclasses.fields(configs.Config)]
    if table == "tuners":
        return adapter_facts.tuner_names()
    if table == "models":
        return list(registry.EMBEDDED)
    if table == "recipes":
        from fedpeft.data.prepare import recipes

        return list(recipes())
    return registry.names(table)


def _describe_row(table: str, name: str, short: bool = False) -> dict[str, Any]:
    if table == "configs":
        text = configs.shipped_configs()[name].read_text()
        return {"name": name, "summary": text.splitlines()[0].lstrip("# ")}
    if table == "sections":
        return {"name": name, "summary": "config section"}
    if table == "tuners":
        measured = adapter_facts.write_brief(adapter_facts.rows_of_tuner(name))
        return {"name": name, "summary": adapter_facts.summarise_tuner(name), **measured}
    if table == "models":
        return {"name": name, "summary": f"embedded, for {registry.EMBEDDED[name]}"}
    if table == "recipes":
        from fedpeft.data.prepare import recipes

        return {"name": name, "summary": recipes()[name]}
    row: dict[str, Any] = {"name": name, "summary": registry.summary(table, name)}
    if table == "adapters":
        row |= adapter_facts.write_brief(adapter_facts.rows_of_own(name))
    if short:
        return row
    cls = registry.load(table, name)
    if table == "strategies":
        row |= {"paper": cls.paper, "needs": cls.needs.value, "wraps": cls.wraps}
    if table == "bodies":
        row |= {"paper": cls.paper, "needs": ", ".join(cls.needs), "federates": not cls.stays_central}
    return row


def _describe_entry(table: str, name: str) -> dict[str, Any]:
    if table == "configs":
        path = configs.shipped_configs()[name]
        return {"path": str(path), "description": path.read_text()}
    if table == "sections":
        cls = type(getattr(configs.Config(), name))
        keys = {item.name: item for item in dataclasses.fields(cls) if item.name != "options"}
        return {"options": [*_describe_options(keys), *([_describe_partition()] if name == "data" else [])]}
    if table in ("models", "recipes"):
        return {}
    if table == "tuners":
        return adapter_facts.describe_tuner(name)
    cls = registry.load(table, name)
    notes = []
    if table == "strategies":
        parts = cls if not cls.wraps else cls()
        notes = [
            f"clients train: {', '.join(parts.trains)}" + (f"; keep: {', '.join(parts.keeps)}" if parts.keeps else ""),
            f"adapter: {parts.adapter}; unequal ranks: {'yes' if parts.unequal_ranks else 'no'}; "
            f"moves the base weights: {'yes' if parts.changes_base else 'no'}",
        ]
        if cls.wraps:
            notes.append("goes around another strategy: strategy.wrap=[" + name + "]; alone it goes around fedit")
    if table == "bodies":
        notes = [
            f"needs: {', '.join(cls.needs) or 'nothing'}; heads: {', '.join(cls.heads or ['all'])}",
            f"in a federation: no, it {cls.stays_central}"
            if cls.stays_central
            else f"in a federation: continual.body={name}",
        ]
    facts: dict[str, Any] = {}
    if table == "adapters":
        facts = adapter_facts.describe_adapter(adapter_facts.rows_of_own(name), {"name": name})
        notes = cls.notes() if hasattr(cls, "notes") else []
    if table == "heads":
        notes = [f"classes that compete in the training loss: {cls.loss}"]
    if table == "streams":
        notes = [f"scenario: {cls.scenario}"]
    description = inspect.getdoc(inspect.getmodule(cls)) or ""
    if table == "bodies" and name in registry.names("server_bodies"):
        half = inspect.getmodule(registry.load("server_bodies", name))
        # Without the example, which would stand between the two halves.
        central = description.partition("\n    >>>")[0]
        description = f"{central}\n\nIn a federation\n---------------\n\n{inspect.getdoc(half)}"
    return {
        "options": list(_describe_options(configs.options_of(cls))),
        "paper": getattr(cls, "paper", ""),
        **facts,
        "notes": notes,
        "description": description,
    }


def _describe_partition() -> dict[str, Any]:
    return {
        "name": "partition",
        "default": configs.Config().data.partition.name,
        "allowed": ", ".join(registry.names("partitioners")),
        "help": "how records are split over clients; the options of each: fedpeft show NAME",
    }


def _describe_options(items: dict[str, dataclasses.Field[Any]]) -> Iterator[dict[str, Any]]:
    for name, item in items.items():
        meta = item.metadata
        if not meta:
            continue
        bounds = [f">= {meta['low']:g}"] * (meta["low"] > -INFINITY) + [f"> {meta['above']:g}"] * (
            meta["above"] > -INFINITY
        )
        bounds += [f"<= {meta['high']:g}"] * (meta["high"] < INFINITY)
        choices = ", ".join(schema.choices_of(item))
        allowed = choices or " and ".join(bounds) or re.sub(r"typing\.", "", str(item.type))
        yield {"name": name, "default": configs.default_of(item), "allowed": allowed, "help": meta["help"]}
