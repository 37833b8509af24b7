"""What `fedpeft show` and docs/methods.md say of an adapter, and of each of peft's tuners.

Averages, uploads, gradients, cohorts and merging are as they were measured (`simulations.benchmarks.own_adapters` and
`peft_types`). With what strategies, wrappers and protection an adapter goes, the checks of a config are asked: nothing
of that is written down anywhere.
"""

from __future__ import annotations

import json
from typing import Any

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.adapters.averages import read_own
from fedpeft.adapters.peft_types import EXACT, read_measured
from fedpeft.config.short_names import SHORT
from fedpeft.errors import InputError

Row = dict[str, Any]
WAYS = {"together": "in one pass", "alone": "in a pass of its own", "none": "refused"}
MERGES = {"export": "yes", "peft": "by stock peft", "no": "no"}
ROUNDING = 1e-5  # of a logit
# What no check refuses for the adapter's sake: everything else may be what a combination fails by.
PLAIN: Row = {
    "client.optimizer": "sgd",
    "client.local_steps": 1,
    "client.local_epochs": None,
    "data.clients": 20,
    "data.holdout": 0.2,
    "data.partition.name": "iid",
    "strategy.weighting": "uniform",
}
UNITS: dict[str, Row] = {
    unit: {"privacy.unit": unit, "privacy.epsilon": 8.0, "privacy.release_metrics": True}
    for unit in ("sample", "client")
}


def tuner_names() -> list[str]:
    """peft's types in small letters, and the short names of those with a switch, as `adapter=dora`."""
    types = dict.fromkeys(row["type"].lower() for row in read_measured())
    return [*types, *(name for name in SHORT if name not in types)]


def rows_of_tuner(name: str) -> list[Row]:
    """What was measured of a tuner, by its name in small letters; the first row is of the name itself."""
    kind, options = SHORT.get(name, (name.upper(), {}))
    return [row for row in read_measured() if row["type"] == kind and options.items() <= row["options"].items()]


def section_of_tuner(name: str) -> Row:
    """The section `adapter` of a tuner at the options that it was measured with."""
    row = rows_of_tuner(name)[0]
    return {"name": "peft", "type": row["type"], "options": row["options"]}


def describe_tuner(name: str) -> Row:
    """All that is known of one of peft's tuners."""
    section = section_of_tuner(name)
    options = "".join(f" adapter.options.{key}={json.dumps(value)}" for key, value in section["options"].items())
    short = f"adapter={name} is " if name in SHORT else ""
    written = f"{short}adapter.name=peft adapter.type={section['type']}{options if short else ''}"
    return {"notes": [written], **describe_adapter(rows_of_tuner(name), section)}


def summarise_tuner(name: str) -> str:
    """A line on one of peft's tuners."""
    row = rows_of_tuner(name)[0]
    options = "".join(f" with {key}={json.dumps(value)}" for key, value in row["options"].items() if name in SHORT)
    return f"peft's {row['type']}{options}"


def rows_of_own(name: str) -> list[Row]:
    """What was measured of one of our adapters."""
    return [row for row in read_own() if row["name"] == name]


def write_brief(rows: list[Row]) -> Row:
    """What a list says of an adapter, of what was measured: of its defaults."""
    if not rows:
        return {}
    cells = write_cells(rows[0])
    return {key: cells[key] for key in ("average", "a layer sends")}


def write_cells(row: Row) -> dict[str, str]:
    """What was measured of one choice of options, by the heads of a table."""
    options = ", ".join(f"{key}={json.dumps(value)[:20]}" for key, value in row["options"].items())
    return {
        "options": options,
        "start": "exact" if row["start"] < ROUNDING else f"{row['start']:.1g}",
        "a layer sends": row["upload"] or "no formula",
        "bytes up": f"{4 * row['values']:,}",
        "average": "exact" if row["average"] < EXACT else f"{row['average']:.0%} off",
        "gradient of one record": WAYS[row["per_sample"]],
        "trains in a cohort": "yes" if row["cohort"] else "no",
        "merges": MERGES[row["merges"]],
    }


def describe_adapter(rows: list[Row], section: Row) -> Row:
    """What was measured of an adapter with each choice of options, and what goes with it, as `measured` and
    `works_with`; nothing where nothing was measured.

    Args:
        rows: of the tables of what was measured; the first has the defaults.
        section: `adapter` of a config, for the checks.
    """
    if not rows:
        return {}
    found = find_companions(section)
    if rows[0]["per_sample"] == "none":
        found["privacy"].remove("sample")  # its gradients are refused once the model is there
    return {"measured": rows, "works_with": found}


def find_companions(section: Row) -> dict[str, list[str]]:
    """The strategies that take an adapter, the wrappers that go around one of these, the units of privacy, and whether
    secure aggregation and sequences of tasks do: all that a config with this section `adapter` is not refused for.
    """
    names = registry.names("strategies")
    wraps = {name: registry.load("strategies", name).wraps for name in names}
    rules = [name for name in names if not wraps[name] and is_allowed(section, {"strategy.name": name})]
    wrappers = [
        name
        for name in names
        if wraps[name] and any(is_allowed(section, {"strategy.name": rule, "strategy.wrap": [name]}) for rule in rules)
    ]

    def any_rule(changes: Row) -> bool:
        return any(is_allowed(section, {"strategy.name": rule, **changes}) for rule in rules)

    bodies = [name for name in registry.names("bodies") if any_rule({"continual.body": name})]
    return {
        "strategies": rules,
        "wrappers": wrappers,
        "privacy": [unit for unit, changes in UNITS.items() if any_rule(changes)],
        "secure aggregation": [rule for rule in rules if is_allowed(section, _with_secagg(rule))],
        "sequences of tasks": bodies,
    }


def _with_secagg(rule: str) -> Row:
    return {"strategy.name": rule, "secagg.enabled": True}


def is_allowed(section: Row, changes: Row) -> bool:
    """Whether a config with this section `adapter` is valid."""
    try:
        configs.load({"adapter": section}, {**PLAIN, **changes})
    except InputError:
        return False
    return True
