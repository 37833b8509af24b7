"""Adapter folders into one: aggregated once by any strategy (sites that exchange files), or merged by any merger."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from fedpeft import config as configs
from fedpeft.adapters import folder
from fedpeft.adapters.peft_files import require_numbers
from fedpeft.errors import InputError
from fedpeft.folders import filled, require_new
from fedpeft.merging.base import make
from fedpeft.strategies.build import make_named
from fedpeft.strategies.offline import aggregate


def aggregate_folders(
    strategy: str,
    folders: Sequence[str | Path],
    out: str | Path,
    options: Sequence[str] | dict[str, Any] = (),
    weights: Sequence[float] | None = None,
    start: str | Path | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    """Aggregate peft folders into a peft folder whose product is the aggregate.

    Args:
        out: folder of the result, new or empty.
        options: strategy options, as `key=value` or as a mapping.
        weights: one number an adapter; equal if None.
        start: the global adapter before the round.
        base: the base model that all are for, where their folders name it in different ways.

    Raises:
        InputError: unreadable or unlike adapters, bad weights or options, an `out` that is not empty.
    """
    if not folders:
        raise InputError("ADAPTER_DIR: give at least one adapter folder.")
    paths, out, start = _to_paths(folders), Path(out), Path(start) if start else None
    # Before anything is loaded: a result that has no place should cost no wait.
    require_new(out, "--out")
    rule = make_named(strategy, configs.parse_overrides(options), "")
    adapters = [folder.load(path) for path in paths]
    numbers = _to_numbers("--weights", weights, len(paths))
    if numbers is not None and not all(math.isfinite(number) and number > 0 for number in numbers):
        raise InputError(f"--weights: {numbers}: every weight must be positive and finite.")
    about = folder.about_all([*paths, *([start] if start else [])], base)
    names = [str(path) for path in paths]
    result, notes = aggregate(rule, adapters, numbers, folder.load(start) if start else None, names)
    # Finite adapters can have a sum that is not: nobody should get that as a result.
    require_numbers(out, result.tensors)
    with filled(out, "--out") as draft:
        folder.save(result, draft, **about)
    ranks = {result.rank(site) for site in result.lora_sites()}
    return {
        "strategy": strategy,
        "adapters": len(paths),
        "sites": len(result.lora_sites()),
        "rank": max(ranks),
        "notes": notes,
        "out": str(out),
    }


def merge_folders(
    method: str,
    folders: Sequence[str | Path],
    out: str | Path,
    options: Sequence[str] | dict[str, Any] = (),
    numbers: Sequence[float] | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    """Merge peft folders, in the order given, into a peft folder.

    Args:
        out: folder of the result, new or empty.
        options: merger options, as `key=value` or as a mapping.
        numbers: one number an adapter: what the merger says it takes.
        base: the base model that all are for, where their folders name it in different ways.

    Raises:
        InputError: unreadable or unlike adapters, bad numbers or options, an `out` that is not empty.
    """
    paths, out = _to_paths(folders), Path(out)
    require_new(out, "--out")
    merger = make(method, configs.parse_overrides(options))
    merger.require(len(paths))
    if numbers is not None and not merger.number:
        raise InputError(f"--numbers: {method} takes no number with an adapter.")
    values = _to_numbers("--numbers", numbers, len(paths))
    about = folder.about_all(paths, base)
    state, ranks = merger.start(), set[int]()
    for index, path in enumerate(paths):
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
        "adapters": len(paths),
        "sites": len(result.lora_sites()),
        "rank": rank,
        "notes": notes,
        "out": str(out),
    }


def _to_paths(folders: Sequence[str | Path]) -> list[Path]:
    if isinstance(folders, str | Path):
        raise InputError(f"ADAPTER_DIR: {folders} is one folder; give a list of them.")
    return [Path(path) for path in folders]


def parse_numbers(flag: str, text: str | None) -> list[float] | None:
    """`1,2,5` as numbers; `flag` is blamed."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{flag}: '{text}' is not a list of numbers such as 1,2,5.") from error


def _to_numbers(flag: str, numbers: Sequence[float] | None, count: int) -> list[float] | None:
    if numbers is None:
        return None
    if isinstance(numbers, str) or not all(
        isinstance(value, Real) and not isinstance(value, bool) for value in numbers
    ):
        raise InputError(f"{flag}: {numbers!r}: give a list of numbers, one for each adapter.")
    if len(numbers) != count:
        raise InputError(f"{flag}: {len(numbers)} {flag.lstrip('-')} for {count} adapters.")
    return [float(value) for value in numbers]
