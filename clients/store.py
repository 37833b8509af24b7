"""A client keeps personal factors, control variates, its optimizer's state (`client.keep_optimizer`) and a test-time
method's state on its own disk, one file a round.

A file is named by the round that wrote it and written whole or not at all, so that a run resumed at round t reads what
was true before round t, whatever a killed process had begun.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fedpeft.files import write_bytes, write_tensors
from fedpeft.state import AdapterState

log = logging.getLogger("fedpeft")
Counted = Callable[[], Set[str] | None]
EXTRA = "extra:"  # in a file's names, of what travels beside an adapter
MOMENTS = "optimizer:"  # in a client's kept tensors, of its optimizer's state
ROUND, STATE = "round-*.safetensors", "tta-*.pt"


def moments_of(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of an optimizer among what a client kept; empty before its first round."""
    return {key.removeprefix(MOMENTS): value for key, value in kept.items() if key.startswith(MOMENTS)}


class Store:
    """Client state below one folder.

    Args:
        root: folder of the run; each client has a folder below it.
        history: rounds back for which a resume may ask.
    """

    def __init__(self, root: Path, history: int) -> None:
        self.root, self.history = root, history

    def load(self, client: str, before: int, counted: Counted = lambda: None) -> dict[str, Tensor]:
        """The newest state written before round `before`; empty if there is none.

        Args:
            counted: releases in the client's ledger, which is read where there is a state. A state of another is left
                out: its noised steps would be part of the next update, and nothing would have paid for them. None takes
                all.
        """
        # Not simply the newest: a process that was killed may have written the round that is now done again.
        versions = [number for number in self._list_versions(client) if number < before]
        known = counted() if versions else None
        for number in reversed(versions):
            release = None if known is None else self._release(client, number)
            if known is None or release in known:
                return load_file(self._path_of(client, number))
            why = "that round was never counted" if release else "an earlier fedpeft did not write down its release"
            log.warning("%s: what it kept of round %d is left out, as %s", client, number, why)
        return {}

    def save(
        self, client: str, number: int, tensors: dict[str, Tensor], release: str = "", counted: Counted = lambda: None
    ) -> None:
        """Write the state after round `number`, and drop what no resume can ask for.

        Args:
            release: that the state belongs to, as the ledger will name it.
            counted: as `load` has it.
        """
        write_tensors(self._path_of(client, number), tensors, {"release": release})
        old = [version for version in self._list_versions(client) if version < number - self.history]
        known = counted() if old else None
        good = [version for version in old if known is None or self._release(client, version) in known]
        # The last good one stays: a client that sat rounds out has nothing newer to resume from.
        for version in set(old) - set(good[-1:]):
            self._path_of(client, version).unlink(missing_ok=True)

    def load_state(self, client: str, before: int) -> dict[str, Any] | None:
        """The newest plain-data state (`TTAMethod.state`) from before round `before`, on the CPU; None if none."""
        versions = [number for number in self._list_versions(client, STATE) if number < before]
        if not versions:
            return None
        file = self._path_of(client, max(versions), STATE)
        # Without `weights_only` a file in the store could run code.
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return state

    def save_state(self, client: str, number: int, state: dict[str, Any]) -> None:
        """Write a state after the evaluation of round `number`, and drop what no resume can ask for."""
        file = io.BytesIO()
        torch.save(state, file)
        write_bytes(self._path_of(client, number, STATE), file.getvalue())
        old = [version for version in self._list_versions(client, STATE) if version < number - self.history]
        for version in old[:-1]:
            self._path_of(client, version, STATE).unlink(missing_ok=True)

    def reply(self, client: str, number: int, request: str) -> tuple[AdapterState, dict[str, float]] | None:
        """The update, without its sites, and the metrics that answered this very request of round `number`."""
        path = self.root / client / f"reply-{number:06d}.safetensors"
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Other values under the same round number are another request, whose answer must be computed.
            if metadata.get("request") != request:
                return None
            named = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        extra = {key.removeprefix(EXTRA): value for key, value in named.items() if key.startswith(EXTRA)}
        tensors = {key: value for key, value in named.items() if not key.startswith(EXTRA)}
        return AdapterState(tensors, extra=extra), json.loads(metadata.get("metrics", "{}"))

    def save_reply(
        self, client: str, number: int, request: str, update: AdapterState, metrics: dict[str, float]
    ) -> None:
        """Keep an answer, so that a repeated request need not release anything new; drop what no resume asks for."""
        folder = self.root / client
        named = {**update.tensors, **{f"{EXTRA}{name}": value for name, value in update.extra.items()}}
        write_tensors(
            folder / f"reply-{number:06d}.safetensors", named, {"request": request, "metrics": json.dumps(metrics)}
        )
        for path in folder.glob("reply-*.safetensors"):
            if int(path.stem.removeprefix("reply-")) < number - self.history:
                path.unlink(missing_ok=True)

    def sums(self, client: str, number: int) -> list[dict[str, Any]]:
        """What the client has given shares for in round `number`: the start state, and the clients of each sum."""
        path = self.root / client / f"sums-{number:06d}.json"
        found: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        return found

    def save_sum(self, client: str, number: int, start: str, clients: list[str]) -> None:
        """Remember, durably, that shares for the sum over these clients from this start state are given away."""
        known = self.sums(client, number)
        entry = {"start": start, "clients": sorted(clients)}
        if entry not in known:
            path = self.root / client / f"sums-{number:06d}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, json.dumps([*known, entry]).encode())

    def _release(self, client: str, number: int) -> str:
        with safe_open(self._path_of(client, number), framework="pt") as file:
            return str((file.metadata() or {}).get("release", ""))

    def _path_of(self, client: str, number: int, pattern: str = ROUND) -> Path:
        return self.root / client / pattern.replace("*", f"{number:06d}")

    def _list_versions(self, client: str, pattern: str = ROUND) -> list[int]:
        return sorted(int(path.stem.partition("-")[2]) for path in (self.root / client).glob(pattern))
