"""What averaging and privacy make of each of our own adapters, measured as `peft_types` measures peft's.

    python -m fedpeft.simulations.benchmarks.own_adapters      writes fedpeft/assets/own_adapters.json anew
    python docs/make.py                                        puts it into docs/methods.md

Every registered adapter is tried with its defaults and with each other choice of each option, at rank 4; what trains of
one that is for certain rules is what the first of them trains.
"""

from __future__ import annotations

import json
from itertools import repeat
from pathlib import Path

from fedpeft import registry
from fedpeft.adapters.adapted import build
from fedpeft.adapters.averages import OWN
from fedpeft.config import AdapterConfig
from fedpeft.config.schema import choices_of, options_of
from fedpeft.files import write_bytes
from fedpeft.simulations.benchmarks.adapter_sizes import formula_of_own
from fedpeft.simulations.benchmarks.peft_types import LABELS, MODEL, Row, measure_model


def cases() -> list[tuple[str, Row]]:
    """Names, and the options that are not the defaults."""
    found: list[tuple[str, Row]] = []
    for name in registry.names("adapters"):
        if name == "peft":
            continue
        found.append((name, {}))
        for key, item in options_of(registry.load("adapters", name)).items():
            found += [(name, {key: choice}) for choice in choices_of(item) if choice != item.default]
    return found


def measure(name: str, options: Row) -> Row:
    """The row of one adapter."""
    model = build(MODEL, AdapterConfig(name=name, r=4, alpha=8.0, options=options), LABELS, 0)
    roles = tuple(role for role in find_roles(name) if model.form.select([role]).tensors)
    upload = formula_of_own(name, options, roles)
    return {"name": name, "options": options, "upload": upload, **measure_model(model, (*roles, "head"))}


def find_roles(name: str) -> tuple[str, ...]:
    """What trains of an adapter, without the head."""
    cls = registry.load("adapters", name)
    averages: tuple[str, ...] | None = getattr(cls, "averages", None)
    rules, whose = (
        map(registry.load, repeat("strategies"), registry.names("strategies")),
        getattr(cls, "rules_of", name),
    )
    trained = averages or next(rule.trains for rule in rules if rule.adapter == whose and not rule.wraps)
    return tuple(role for role in trained if role != "head")


def write(path: Path = OWN) -> None:
    """All rows, a line each."""
    rows = [json.dumps(measure(*case)) for case in cases()]
    write_bytes(path, ("[\n" + ",\n".join(rows) + "\n]\n").encode())


if __name__ == "__main__":
    write()
