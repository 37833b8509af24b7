"""What averaging and privacy make of each of our own adapters, measured as `peft_types` measures peft's.

    python -m fedpeft.simulations.benchmarks.own_adapters      writes fedpeft/assets/own_adapters.json anew
    python docs/make.py                                        puts it into docs/methods.md

Every adapter that is a product of low rank (`adapters.factored`) is tried with its defaults and with each other choice
of each option, at rank 4.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedpeft import registry
from fedpeft.adapters.adapted import build
from fedpeft.adapters.averages import OWN, method_names
from fedpeft.config import AdapterConfig
from fedpeft.config.schema import choices_of, options_of
from fedpeft.files import write_bytes
from fedpeft.simulations.benchmarks.peft_types import LABELS, MODEL, Row, measure_model


def cases() -> list[tuple[str, Row]]:
    """Names, and the options that are not the defaults."""
    found: list[tuple[str, Row]] = []
    for name in method_names():
        found.append((name, {}))
        for key, item in options_of(registry.load("adapters", name)).items():
            found += [(name, {key: choice}) for choice in choices_of(item) if choice != item.default]
    return found


def measure(name: str, options: Row) -> Row:
    """The row of one adapter."""
    model = build(MODEL, AdapterConfig(name=name, r=4, alpha=8.0, options=options), LABELS, 0)
    roles = tuple(role for role in registry.load("adapters", name).averages if model.form.select([role]).tensors)
    return {"name": name, "options": options, **measure_model(model, (*roles, "head"))}


def write(path: Path = OWN) -> None:
    """All rows, a line each."""
    rows = [json.dumps(measure(*case)) for case in cases()]
    write_bytes(path, ("[\n" + ",\n".join(rows) + "\n]\n").encode())


if __name__ == "__main__":
    write()
