"""Adapter folders into one: aggregated once by any strategy (sites that exchange files), or merged by any merger."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fedpeft import config as configs
from fedpeft.adapters import folder
from fedpeft.adapters.peft_files import require_numbers
from fedpeft.errors import InputError
from fedpeft.folders import filled, require_new
from fedpeft.merging.base import make
from fedpeft.strategies.build import named
from fedpeft.strategies.offline import aggregate


def aggregate_folders(
    strategy: str,
    folders: list[Path],
    options: list[str],
    weights: str | None,
    start: Path | None,
    out: Path,
    base: str | None = None,
) -> dict[str, Any]:
    """Aggregate peft folders into a peft folder whose product is the aggregate.

    Args:
        options: strategy options as `key=value`.
        weights: one number an adapter, separated by commas; equal if None.
        start: the global adapter before the round.
        base: the base model that all are for, where their folders name it in different ways.

    Raises:
        InputError: unreadable or unlike adapters, bad weights or options, an `out` that is not empty.
    """
    if not folders:
        raise InputError("ADAPTER_DIR: give at least one adapter folder.")
    # Before anything is loaded: a result that has no place should cost no wait.
    require_new(out, "--out")
    given = configs.parse_overrides(options)
    rule = named(strategy, given, "")
    adapters = [folder.load(path) for path in folders]
    numbers = parse_numbers("--weights", weights, len(folders))
    if numbers is not None and not all(math.isfinite(number) and number > 0 for number in numbers):
        raise InputError(f"--weights: {weights}: every weight must be positive and finite.")
    about = folder.about_all([*folders, *([start] if start else [])], base)
    names = [str(path) for path in folders]
    result, notes = aggregate(rule, adapters, numbers, folder.load(start) if start else None, names)
    require_numbers(out, result.tensors)
    with filled(out, "--out") as draft:
        folder.save(result, draft, **about)
    ranks = {result.rank(site) for site in result.lora_sites()}
    return {
        "strategy": strategy,
        "adapters": len(folders),
        "sites": len(result.lora_sites()),
        "rank": max(ranks),
        "notes": notes,
        "out": str(out),
    }


def merge_folders(
    method: str, folders: list[Path], options: list[str], numbers: str | None, out: Path, base: str | None = None
) -> dict[str, Any]:
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
        notes.append(
            f"rank {rank}, above the adapters' {max(ranks)}; `fedpeft merge --method lora_squeeze rank=...` lowers it"
        )
    return {
        "method": method,
        "adapters": len(folders),
        "sites": len(result.lora_sites()),
        "rank": rank,
        "notes": notes,
        "out": str(out),
    }


def parse_numbers(flag: str, text: str | None, count: int) -> list[float] | None:
    """`1,2,5` as one number for each adapter; `flag` is blamed."""
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{flag}: '{text}' is not a list of numbers such as 1,2,5.") from error
    if len(numbers) != count:
        raise InputError(f"{flag}: {len(numbers)} {flag.lstrip('-')} for {count} adapters.")
    return numbers
