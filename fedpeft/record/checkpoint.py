"""Atomic save and load of a run's server state: tensors as safetensors, the rest as JSON, one hash.

    checkpoints/round-000007/state.safetensors   adapter and memory tensors
    checkpoints/round-000007/state.json          sites, round, numbers, sha256 over both; written last

A folder appears under its final name only when complete and synced, and none is ever written over: a second state of a
round (a task that is closed after its last round, a damaged folder) is round-000007.1. `latest` skips folders that do
not check out and says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load as loads
from safetensors.torch import save

from fedpeft import folders
from fedpeft.errors import InputError
from fedpeft.files import sync_folder, write_bytes
from fedpeft.state import from_dict, to_dict

if TYPE_CHECKING:
    from fedpeft.state import ServerState

log = logging.getLogger("fedpeft")
RESUMED = 2  # newest rounds that a run may go on from: a damaged checkpoint has the one before


def write(folder: Path, server: ServerState, keep: int | None = 2) -> Path:
    """Save the state of a complete round below `folder`; keep those of the newest `keep` rounds, None is all."""
    final = folder / _name_state(server.round, folder)
    temporary = folder / f".{final.name}.{os.getpid()}"
    for left in folder.glob(".round-*"):  # of a process that was killed; one process at a time has the run
        shutil.rmtree(left, ignore_errors=True)
    tensors = {f"adapter:{key}": value for key, value in server.adapter.tensors.items()}
    tensors |= {f"memory:{key}": value for key, value in server.memory.items()}
    data = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    meta = {"round": server.round, "numbers": server.numbers, "sites": to_dict(server.adapter)}
    try:
        write_bytes(temporary / "state.safetensors", data)
        write_bytes(temporary / "state.json", json.dumps({**meta, "sha256": _digest_state(data, meta)}).encode())
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # A rename is on the disk only when the folder that holds the name is.
    sync_folder(folder)
    # Old ones go last: at no moment is there no checkpoint.
    kept = rounds(folder) if keep is None else rounds(folder)[-keep:]
    for old in (path for path in _list_folders(folder) if _place_of(path)[0] < kept[0]):
        shutil.rmtree(old)
    return final


def read(path: Path) -> ServerState:
    """Load one checkpoint folder.

    Raises:
        InputError: a file is missing, truncated or was changed.
    """
    from fedpeft.state import ServerState

    try:
        meta = json.loads((path / "state.json").read_text())
        data = (path / "state.safetensors").read_bytes()
        if meta.pop("sha256") != _digest_state(data, meta):
            raise InputError(
                f"{path}: its content does not have the sha256 that state.json gives; the checkpoint is damaged."
            )
        tensors = loads(data)
        adapter = {key.removeprefix("adapter:"): value for key, value in tensors.items() if key.startswith("adapter:")}
        memory = {key.removeprefix("memory:"): value for key, value in tensors.items() if key.startswith("memory:")}
        return ServerState(from_dict(adapter, meta["sites"]), int(meta["round"]), memory, meta["numbers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a complete checkpoint: {error}") from error


def _digest_state(data: bytes, meta: dict[str, Any]) -> str:
    # Sorted keys: what was read back must give the same text as what was written.
    return hashlib.sha256(data + json.dumps(meta, sort_keys=True).encode()).hexdigest()


def latest(folder: Path) -> ServerState | None:
    """The newest checkpoint that checks out; damaged ones are named in the log and skipped. None if there is none.

    Raises:
        InputError: there are checkpoints, and every one is damaged.
    """
    # Clients' state reaches as far back; what is kept besides is there to be exported.
    recent = rounds(folder)[-RESUMED:]
    found = [path for path in reversed(_list_folders(folder)) if _place_of(path)[0] in recent]
    for number, path in enumerate(found):
        try:
            return read(path)
        except InputError as error:
            if number == len(found) - 1:
                hint = "No other checkpoint is left; start the run again in a new folder."
                raise InputError(f"{error} {hint}") from error
            log.warning("%s Using the one before.", error)
    return None


def rounds(folder: Path) -> list[int]:
    """Rounds of which there are checkpoints, in their order."""
    return sorted({_place_of(path)[0] for path in _list_folders(folder)})


def of_round(folder: Path, number: int) -> list[Path]:
    """The checkpoints of one round, the oldest state first."""
    return [path for path in _list_folders(folder) if _place_of(path)[0] == number]


def _list_folders(folder: Path) -> list[Path]:
    """Checkpoints, the oldest state first."""
    found = (path for path in folder.glob("round-*") if folders.CHECKPOINT.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=_place_of)


def _place_of(path: Path) -> tuple[int, int]:
    """Round, and which of the states of that round."""
    number, _, again = path.name.removeprefix("round-").partition(".")
    return int(number), int(again or 0)


def _name_state(number: int, folder: Path) -> str:
    # Beside the first: a rename replaces no folder with files in it, and removing it before would leave none.
    again = max((place[1] + 1 for path in _list_folders(folder) if (place := _place_of(path))[0] == number), default=0)
    return f"round-{number:06d}" + (f".{again}" if again else "")
