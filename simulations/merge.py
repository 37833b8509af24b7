"""Adapter folders that were trained one after another, merged into one by any merger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedpeft import config as configs
from fedpeft.adapters import folder
from fedpeft.errors import InputError
from fedpeft.folders import filled, require_new
from fedpeft.merging.base import make
from fedpeft.simulations.aggregate import parse_numbers


def merge_folders(method: str, folders: list[Path], options: list[str], numbers: str | None, out: Path,
                  base: str | None = None) -> dict[str, Any]:
    """Merge peft folders, in the order given, into a peft folder.

    Args:
        options: merger options as `key=value`.
        numbers: one number an adapter, separated by commas: what the merger says it takes.
        base: the base model that all are for, where their folders name it in different ways.

    Raises:
        InputError: unreadable or unlike adapters, bad numbers or options, an `out` that is not empty.
    """
    require_new(out, "--out")
    merger = make(method, configs.parse_overrides(options))
    merger.require(len(folders))
    if numbers is not None and not merger.number:
        raise InputError(f"--numbers: {method} takes no number with an adapter.")
    values = parse_numbers("--numbers", numbers, len(folders))
    about = folder.about_all(folders, base)
    state, ranks = merger.start(), set[int]()
    for index, path in enumerate(folders):
        adapter = folder.load(path)
        try:
            state = merger.add(state, adapter, None if values is None else values[index])
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        ranks |= {adapter.rank(site) for site in adapter.lora_sites()}
    result = merger.result(state)
    with filled(out, "--out") as draft:
        folder.save(result, draft, **about)
    rank = max(result.rank(site) for site in result.lora_sites())
    notes = merger.notes(state)
    if rank > max(ranks):
        notes.append(f"rank {rank}, above the adapters' {max(ranks)}; `fedpeft merge --method lora_squeeze rank=...` "
                     "lowers it")
    return {"method": method, "adapters": len(folders), "sites": len(result.lora_sites()), "rank": rank,
            "notes": notes, "out": str(out)}
