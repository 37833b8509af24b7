"""What an average of clients' adapters is: how far it is from what it should do, as was measured of each adapter.

`fedpeft/assets/peft_types.json` has peft's types (`peft_types`), `own_adapters.json` those of ours; tests measure
a part of them again.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from fedpeft import registry
from fedpeft.adapters import peft_types
from fedpeft.config import AdapterConfig

log = logging.getLogger("fedpeft")
OWN = Path(__file__).parents[1] / "assets" / "own_adapters.json"


def read_own() -> list[dict[str, Any]]:
    """What has been measured of ours (`simulations.benchmarks.own_adapters`)."""
    rows: list[dict[str, Any]] = json.loads(OWN.read_text())
    return rows


def find_error(adapter: AdapterConfig) -> float | None:
    """How far a plain average is from the average of what the adapters do, 0 is exact; None where nobody measured it.

    For moves of 0.3 standard deviations (`peft_measure`): about layers and one size of move, not about accuracy.
    """
    if getattr(registry.load("adapters", adapter.name), "rules_of", adapter.name) == "lora":
        return peft_types.average_error("LORA", {})
    if adapter.name == "peft":
        return peft_types.average_error(adapter.options["type"], adapter.options["options"])
    rows = [row for row in read_own() if row["name"] == adapter.name]
    fitting = [row for row in rows if row["options"].items() <= adapter.options.items()]
    # With options that were not tried together, the least biased of what was: one that fixes a side stays exact.
    special = [row["average"] for row in fitting if row["options"]]
    return min(special) if special else fitting[0]["average"] if fitting else None


def warn_of_error(adapter: AdapterConfig) -> None:
    """Say how far an average is off, where it is."""
    error = find_error(adapter)
    if error is None or error > peft_types.EXACT:
        log.warning(
            "adapter.name=%s: an average of these adapters is %s off the average of what they do (for moves of 0.3 "
            "standard deviations; docs/methods.md has all). Averages of paca, svfit, ravan and lora_sb are exact.",
            adapter.name,
            "not known to be how far" if error is None else f"{error:.0%}",
        )
