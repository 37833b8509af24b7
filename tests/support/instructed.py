"""Messages whose instructions say anything at all."""

from __future__ import annotations

import json
from typing import Any

from flwr.app import RecordDict

from fedpeft.state import AdapterState
from fedpeft.strategies.instructions import Instructions
from fedpeft.strategies.wire import PACKED

ROLES = ["A", "B", "head"]
Told = Instructions | dict[str, Any]  # ours, or the JSON of whoever wrote it


def content(received: AdapterState, told: Told) -> RecordDict:
    """The message of an adapter and these instructions, which need not be ours."""
    found = PACKED.content(received, told if isinstance(told, Instructions) else Instructions(1))
    if isinstance(told, dict):
        found.config_records["config"]["task"] = json.dumps(told)
    return found


def changed(told: Instructions, **change: Any) -> Instructions:
    """The instructions with other values in their JSON, as a client reads them."""
    return Instructions.from_json({**told.to_json(), **change})


def task(number: int = 1, **more: Any) -> Instructions:
    """A round's instructions to train and send everything, or what `more` says."""
    return changed(Instructions(number), **{"trains": ROLES, "uploads": ROLES, **more})
