"""Faults that a simulation can give to clients, as a Flower mod: to see that a run survives them and names them.

run.faults: {client-003: nan, client-005: hang}
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable

from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod

from fedpeft.config import RunConfig
from fedpeft.errors import InputError
from fedpeft.registry import unknown

FAULTS = {
    "nan": "every value of its update is NaN",
    "scale": "its update is multiplied by 1000",
    "shape": "its update is one value short",
    "empty": "it sends no arrays",
    "crash": "it raises an exception",
    "die": "its process ends (needs run.workers >= 1)",
    "hang": "it never answers (needs run.deadline_s)",
}


def check(run: RunConfig, clients: list[str]) -> None:
    """Refuse faults of clients that are not there, and those that the engine could not survive."""
    for client, fault in run.faults.items():
        if client not in clients:
            raise InputError(unknown("run.faults", client, clients))
        if fault not in FAULTS:
            raise InputError(unknown(f"run.faults.{client}", fault, FAULTS))
        if fault == "die" and run.workers == 0:
            raise InputError(f"run.faults.{client}=die needs run.workers >= 1: it would end this process.")
        if fault == "hang" and run.deadline_s is None:
            raise InputError(f"run.faults.{client}=hang needs run.deadline_s: the round would never end.")


def mod(faults: dict[str, str], name: Callable[[Context], str]) -> Mod:
    """A mod that damages the replies of the clients in `faults`."""

    def damage(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        fault = faults.get(name(context))
        if fault == "crash":
            raise RuntimeError("injected crash")
        if fault == "die":
            os._exit(1)
        if fault == "hang":
            while True:
                time.sleep(1)
        reply = call_next(message, context)
        if fault is None:
            return reply
        values = reply.content.array_records["arrays"]["adapter"].numpy()
        if fault == "empty":
            reply.content["arrays"] = ArrayRecord()
        else:
            damaged = values[:-1] if fault == "shape" else values * {"nan": math.nan, "scale": 1000}[fault]
            reply.content["arrays"] = ArrayRecord({"adapter": Array(damaged)})
        return reply

    return damage
